"""Compares two trees of vLLM at the seams that vllm_shadowkv uses, without importing either.

usage: compare_vllm.py [--diff] OLD NEW, each the folder of a `vllm` package. `make vllm-check` calls it.

Every name that the plugin imports must be there. Of every function, and of every method of a class that it imports, the
signature is compared; and by their text the bodies of vLLM's methods that it overrides, and of what it patches, copies
or relies on.
"""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "vllm_shadowkv"
# What is used without being imported by name: called through an object, wrapped, or copied.
RELIED_ON = {
    "v1.worker.cpu_worker": ["CPUWorker.determine_available_memory"],
    "v1.worker.gpu_worker": ["Worker.determine_available_memory", "Worker.sleep"],
    "v1.worker.gpu_model_runner": ["GPUModelRunner._dummy_run", "GPUModelRunner._init_minimal_kv_cache_for_profiling"],
    "v1.worker.gpu.model_runner": ["GPUModelRunner._dummy_run"],
    "v1.worker.gpu.cudagraph_utils": ["_init_minimal_kv_cache_for_profiling"],
    "v1.worker.gpu.block_table": ["BlockTables.gather_block_tables"],
    "v1.worker.gpu.warmup": ["_warmup_kernels"],
    "v1.engine.core": ["EngineCore.preprocess_add_request", "EngineCoreProc._handle_request_preproc_error"],
    "v1.kv_cache_interface": ["KVCacheConfig.needs_kv_cache_zeroing"],
    "v1.core.sched.async_scheduler": ["AsyncScheduler"],
    "v1.core.kv_cache_manager": ["KVCacheManager.allocate_slots", "KVCacheManager.new_step_starts"],
    "v1.core.kv_cache_coordinator": ["KVCacheCoordinator.new_step_starts"],
    "v1.core.kv_cache_utils": ["_auto_fit_max_model_len", "_estimate_max_model_len_from_groups"],
    "v1.executor.ray_executor_v2": ["RayWorkerProc.initialize_worker", "RayExecutorV2"],
    "platforms": ["resolve_current_platform_cls_qualname"],
    "v1.attention.backends.registry": ["register_backend"],
    "platforms.cpu": ["CpuPlatform.get_attn_backend_cls"],
    "platforms.cuda": ["CudaPlatformBase.get_attn_backend_cls"],
    "config.parallel": ["ParallelConfig.reconfigure_for_independent_dp_rank"],
    "config.speculative": ["SpeculativeConfig.uses_draft_model"],
    "model_executor.layers.attention.attention": ["Attention.__init__", "Attention.forward"],
}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax."""
    return ast.parse(path.read_text())


def names_of(path: Path) -> dict[str, tuple[str, str]]:
    """What a file imports of vLLM: module below vllm and name there, by the name here."""
    found = {}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
            module = node.module.removeprefix("vllm").lstrip(".")
            found |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
    return found


def imported() -> set[tuple[str, str]]:
    """Modules below vllm and names in them, as the plugin imports them."""
    return {pair for path in PACKAGE.rglob("*.py") for pair in names_of(path).values()}


def subclassed() -> Iterator[tuple[str, str, ast.ClassDef]]:
    """Module and name of each class of vLLM's with a class of ours that derives from it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        names = names_of(path)
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if isinstance(base, ast.Name) and base.id in names:
                        yield *names[base.id], node


def source(tree: Path, module: str) -> Path | None:
    """The file of a module."""
    path = tree.joinpath(*module.split(".")) if module else tree
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def find(tree: Path, module: str, name: str) -> tuple[str, ast.AST] | None:
    """The module with the definition of a name, followed through imports, and the definition.

    That is the importing statement where it leads elsewhere, and `pass` for a module and what is made at run time.
    """
    file = source(tree, module)
    if file is None:
        return None
    if source(tree, f"{module}.{name}".lstrip(".")):
        return module, ast.Pass()
    for node in ast.walk(parsed(file)):
        if isinstance(node, Definition) and node.name == name:
            return module, node
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return module, node
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            if node.level == 0 and node.module and node.module.startswith("vllm"):
                return find(tree, node.module.removeprefix("vllm").lstrip("."), name) or (module, node)
            return module, node
    text = file.read_text()
    return (module, ast.Pass()) if f'"{name}"' in text or f" {name}" in text else None


def moved(tree: Path, name: str) -> tuple[str, ast.AST] | None:
    """Where else a class or a function of this name is defined."""
    for path in sorted(tree.rglob("*.py")):
        if f"def {name}(" in (text := path.read_text()) or f"class {name}" in text:
            for node in parsed(path).body:
                if isinstance(node, Definition) and node.name == name:
                    return ".".join(path.relative_to(tree).with_suffix("").parts), node
    return None


def method(tree: Path, module: str, owner: str, name: str) -> tuple[str, ast.AST] | None:
    """A method of a class or of the class of vLLM's that it has it from: its full name, and the definition."""
    found = find(tree, module, owner)
    if found is None or not isinstance(found[1], ast.ClassDef):
        return None
    for item in found[1].body:
        if isinstance(item, Definition) and item.name == name:
            return f"{found[0]}.{owner}.{name}", item
    for base in found[1].bases:
        if isinstance(base, ast.Name) and (inherited := method(tree, found[0], base.id, name)):
            return inherited
    return None


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


def compare_imported(old_tree: Path, new_tree: Path) -> int:
    """Prints what became of imported names and of their signatures; returns how many are missing."""
    missing = 0
    for module, name in sorted(imported()):
        old, new = (find(tree, module, name) for tree in (old_tree, new_tree))
        if new is None:
            missing += 1
            print(f"missing: vllm.{module}.{name}")
            continue
        before, after = signatures(old and old[1]), signatures(new[1])
        for key in sorted(before.keys() & after.keys()):
            if before[key] != after[key]:
                print(f"changed: vllm.{module}.{name}: {key}\n  {before[key]}\n  {after[key]}")
        for key in sorted(before.keys() - after.keys()):
            print(f"gone: vllm.{module}.{name}: {key} {before[key]}")
        for key in sorted(after.keys() - before.keys()):
            print(f"new: vllm.{module}.{name}: {key} {after[key]}")
    return missing


def compare_bodies(old_tree: Path, new_tree: Path, diff: bool) -> tuple[int, int]:
    """Prints which texts differ of what is overridden or relied on; returns how many there are, and are missing."""
    pairs: dict[str, tuple[ast.AST | None, ast.AST | None]] = {}
    for module, owner, ours in subclassed():
        for item in ours.body:
            if isinstance(item, Definition) and (old := method(old_tree, module, owner, item.name)):
                new = method(new_tree, module, owner, item.name)
                pairs[f"{old[0]}, which {ours.name} overrides"] = old[1], new and new[1]
    for module, paths in RELIED_ON.items():
        for path in paths:
            name, *rest = path.split(".")
            old = find(old_tree, module, name)
            new = find(new_tree, module, name)
            if new is None and (new := moved(new_tree, name)):
                print(f"moved: vllm.{module}.{path} to vllm.{new[0]}")
            pairs[f"{module}.{path}"] = _within(old and old[1], rest), _within(new and new[1], rest)
    missing = 0
    for name, (before, after) in sorted(pairs.items()):
        if after is None:
            missing += 1
            print(f"missing: vllm.{name}")
        elif (texts := (_text(before), _text(after)))[0] != texts[1]:
            print(f"another text: vllm.{name}")
            if diff:
                lines = difflib.unified_diff(*(text.splitlines() for text in texts), lineterm="", n=2)
                print(*(f"  {line}" for line in list(lines)[2:]), sep="\n")
    return len(pairs), missing


def _within(node: ast.AST | None, path: list[str]) -> ast.AST | None:
    for name in path:
        body = node.body if isinstance(node, ast.ClassDef) else []
        node = next((item for item in body if isinstance(item, Definition) and item.name == name), None)
    return node


def _text(node: ast.AST | None) -> str:
    """Without comments and docstrings."""
    for inner in ast.walk(node) if node is not None else ():
        if isinstance(inner, Definition) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return "" if node is None else ast.unparse(node)


def main() -> int:
    """Prints the differences; 1 where something is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diff", action="store_true", help="show how the texts differ")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args()
    missing = compare_imported(given.old, given.new)
    bodies, gone = compare_bodies(given.old, given.new, given.diff)
    print(f"{len(imported())} imported names and {bodies} bodies compared, {missing + gone} missing")
    return int(missing + gone > 0)


if __name__ == "__main__":
    raise SystemExit(main())
