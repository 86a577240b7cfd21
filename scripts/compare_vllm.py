"""Compares two trees of vLLM at the seams that vllm_shadowkv uses, without importing either.

usage: compare_vllm.py OLD NEW, each the folder of a `vllm` package (`pip download vllm==X --no-deps`, unzipped).

Every name that the plugin imports must be there. Of every function, and of every method of a class that it imports, the
signature is compared; and the bodies of what it overrides, patches or relies on are compared by their text.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "vllm_shadowkv"
# What is used without being imported by name: called through an object, wrapped, or copied.
RELIED_ON = {
    "v1.worker.cpu_worker": ["CPUWorker.determine_available_memory"],
    "v1.worker.gpu_worker": ["Worker.determine_available_memory", "Worker.sleep"],
    "v1.engine.core": ["EngineCore.preprocess_add_request", "EngineCoreProc._handle_request_preproc_error"],
    "v1.kv_cache_interface": ["KVCacheConfig.needs_kv_cache_zeroing"],
    "v1.core.kv_cache_manager": ["KVCacheManager.allocate_slots", "KVCacheManager.new_step_starts"],
    "v1.core.kv_cache_coordinator": ["KVCacheCoordinator.new_step_starts"],
    "v1.core.kv_cache_utils": ["_auto_fit_max_model_len", "_estimate_max_model_len_from_groups"],
    "v1.executor.ray_executor_v2": ["RayWorkerProc.initialize_worker"],
    "platforms": ["resolve_current_platform_cls_qualname"],
    "v1.attention.backends.registry": ["register_backend"],
    "platforms.cpu": ["CpuPlatform.get_attn_backend_cls"],
    "platforms.cuda": ["CudaPlatformBase.get_attn_backend_cls"],
    "config.parallel": ["ParallelConfig.reconfigure_for_independent_dp_rank"],
    "config.speculative": ["SpeculativeConfig.uses_draft_model"],
    "model_executor.layers.attention.attention": ["Attention.__init__", "Attention.forward"],
}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def imported() -> set[tuple[str, str]]:
    """Modules below vllm and names in them, as the plugin imports them."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                found |= {(node.module.removeprefix("vllm").lstrip("."), alias.name) for alias in node.names}
    return found


def source(tree: Path, module: str) -> Path | None:
    """The file of a module."""
    path = tree.joinpath(*module.split(".")) if module else tree
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def find(tree: Path, module: str, name: str) -> ast.AST | None:
    """The definition of a name, followed through imports; the importing statement where it leads elsewhere."""
    file = source(tree, module)
    if file is None:
        return None
    if source(tree, f"{module}.{name}".lstrip(".")):
        return ast.Pass()  # a module
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, Definition) and node.name == name:
            return node
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            if node.level == 0 and node.module and node.module.startswith("vllm"):
                return find(tree, node.module.removeprefix("vllm").lstrip("."), name) or node
            return node
    text = file.read_text()
    return ast.Pass() if f'"{name}"' in text or f" {name}" in text else None  # made at run time


def signatures(node: ast.AST | None) -> dict[str, str]:
    """A function's, or those of a class's methods; a class's fields with their types."""
    if isinstance(node, ast.ClassDef):
        fields = {
            item.target.id: ast.unparse(item.annotation)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
        return fields | {item.name: _signature(item) for item in methods}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name: _signature(node)}
    return {}


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else None}"


def main() -> int:
    """Prints the differences; 1 where something is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args()
    names, missing = sorted(imported()), 0
    for module, name in names:
        old, new = (find(tree, module, name) for tree in (given.old, given.new))
        if new is None:
            missing += 1
            print(f"missing: vllm.{module}.{name}")
            continue
        before, after = signatures(old), signatures(new)
        for key in before.keys() & after.keys():
            if before[key] != after[key]:
                print(f"changed: vllm.{module}.{name}: {key}\n  {before[key]}\n  {after[key]}")
        for key in sorted(before.keys() - after.keys()):
            print(f"gone: vllm.{module}.{name}: {key} {before[key]}")
        for key in sorted(after.keys() - before.keys()):
            print(f"new: vllm.{module}.{name}: {key} {after[key]}")
    for module, paths in RELIED_ON.items():
        for path in paths:
            texts = [
                _text(find(tree, module, path.split(".")[0]), path.split(".")[1:]) for tree in (given.old, given.new)
            ]
            if texts[1] is None:
                missing += 1
                print(f"missing: vllm.{module}.{path}")
            elif texts[0] != texts[1]:
                print(f"another text: vllm.{module}.{path}")
    print(f"{len(names)} imported names and {sum(map(len, RELIED_ON.values()))} others compared, {missing} missing")
    return int(missing > 0)


def _text(node: ast.AST | None, path: list[str]) -> str | None:
    for name in path:
        body = node.body if isinstance(node, ast.ClassDef) else []
        node = next((item for item in body if isinstance(item, Definition) and item.name == name), None)
    if isinstance(node, Definition) and ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return None if node is None else ast.unparse(node)


if __name__ == "__main__":
    raise SystemExit(main())
