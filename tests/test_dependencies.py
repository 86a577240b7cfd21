"""Who may import what, and how long a file may be."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vllm_shadowkv"
OURS = "vllm_shadowkv"

# What a part of the package may import beside Python's own library: other packages, and parts of ours. A part is a file
# or a folder; the longest name that fits counts.
ALLOWED: dict[str, set[str]] = {
    "__init__.py": {f"{OURS}.extension"},
    "__main__.py": {f"{OURS}.cli"},
    "codes.py": {"torch"},
    "config.py": {"pydantic"},
    "extension.py": {"torch"},
    "ops.py": {"torch", f"{OURS}.extension", f"{OURS}.page", f"{OURS}.rotary"},
    "page.py": {"torch", f"{OURS}.config"},
    "exposition.py": {"prometheus_client", "psutil"},
    "metrics.py": {"prometheus_client", f"{OURS}.exposition", f"{OURS}.page", f"{OURS}.state"},
    "query_scales.py": {"torch", f"{OURS}.rotary"},
    "plugin.py": {"prometheus_client", "vllm", f"{OURS}.exposition"},
    "reference.py": {"torch", f"{OURS}.codes", f"{OURS}.config", f"{OURS}.page", f"{OURS}.rotary"},
    "rotary.py": {"torch"},
    "versions.py": set(),
    "state": {
        *("torch", "psutil", "safetensors"),
        *(f"{OURS}.{part}" for part in ("config", "page", "rotary", "ops", "state")),
    },
    "cli": {
        *("torch", "psutil", "rich", "matplotlib", OURS),
        *(f"{OURS}.{part}" for part in ("cli", "config", "extension", "page", "state", "versions")),
    },
    # Seams: what vLLM is told. Below them the two processes, which know nothing of each other, and below those what a
    # worker computes with and what it knows of the model.
    "integration": {
        *("torch", "vllm", "huggingface_hub", "psutil", OURS),
        *(f"{OURS}.{part}" for part in ("config", "extension", "metrics", "page", "plugin", "state", "versions")),
        f"{OURS}.integration",
    },
    "integration/scheduler": {
        "vllm",
        *(f"{OURS}.integration.{part}" for part in ("compat", "refusals", "scheduler", "stored")),
        f"{OURS}.metrics",
    },
    "integration/worker": {
        *("torch", "numpy", "vllm", "ray"),
        *(f"{OURS}.{part}" for part in ("config", "metrics", "page", "query_scales", "rotary", "state")),
        *(
            f"{OURS}.integration.{part}"
            for part in ("compat", "refusals", "specs", "stored", "attention", "model", "worker")
        ),
    },
    "integration/attention": {
        *("torch", "vllm", "xformers"),
        *(f"{OURS}.{part}" for part in ("page", "state", "integration.attention")),
    },
    "integration/model": {
        *("torch", "vllm"),
        *(f"{OURS}.{part}" for part in ("page", "rotary", "state.layers_beside", "integration.model")),
    },
}
MOST_LINES = 400
MOST_PACKAGE_LINES = 10480


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return next(part for part in ("/".join(relative.parts[:2]), relative.parts[0]) if part in ALLOWED)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it, for types too."""
    modules = {module_of(file) for file in files()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in modules else node.module for name in names}
    return found


def fits(module: str, allowed: str) -> bool:
    return module == allowed or (allowed != OURS and module.startswith(f"{allowed}."))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_part_may(path: Path) -> None:
    foreign = {module for module in imports(path) if module.split(".")[0] not in sys.stdlib_module_names}
    allowed = ALLOWED[part_of(path)]
    assert [module for module in sorted(foreign) if not any(fits(module, other) for other in allowed)] == []


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, the first one found; an empty list where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_make_no_circle() -> None:
    """Those within functions and for types included: whoever reads a file reads what it imports."""
    modules = {module_of(path): path for path in files()}
    graph = {module: imports(path) & modules.keys() for module, path in modules.items()}
    assert sum(map(len, graph.values())) > 100
    assert circle(graph) == []
    graph[f"{OURS}.page"] |= {f"{OURS}.integration.worker.planner"}
    assert len(circle(graph)) > 3, "a circle is not seen"


def test_kernels_and_their_parameters_know_no_torch() -> None:
    for path in (*ROOT.glob("csrc/params/*"), *ROOT.glob("csrc/cpu/kernels/*")):
        assert "#include <torch" not in path.read_text(), path


def test_files_are_short() -> None:
    sources = [*files(), *(path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_the_package_is_small() -> None:
    assert sum(len(path.read_text().splitlines()) for path in files()) <= MOST_PACKAGE_LINES
