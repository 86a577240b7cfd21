"""Who may import what, and how long a file may be."""

from __future__ import annotations

import ast
import sys
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
    "config.py": {"pydantic"},
    "extension.py": {"torch"},
    "ops.py": {"torch", f"{OURS}.extension", f"{OURS}.page", f"{OURS}.rotary"},
    "page.py": {"torch", f"{OURS}.config"},
    "exposition.py": {"prometheus_client", "psutil"},
    "metrics.py": {"prometheus_client", f"{OURS}.exposition", f"{OURS}.page", f"{OURS}.state"},
    "plugin.py": {"prometheus_client", "vllm", f"{OURS}.exposition"},
    "reference.py": {"torch", f"{OURS}.config", f"{OURS}.page", f"{OURS}.rotary"},
    "rotary.py": {"torch"},
    "versions.py": set(),
    "state": {
        "torch",
        "psutil",
        *(f"{OURS}.{part}" for part in ("config", "page", "rotary", "ops", "state")),
    },
    "cli": {
        *("torch", "psutil", "rich", "matplotlib", OURS),
        *(f"{OURS}.{part}" for part in ("cli", "config", "extension", "page", "state", "versions")),
    },
    "integration": {
        *("torch", "vllm", "xformers"),
        *(
            f"{OURS}.{part}"
            for part in ("config", "extension", "metrics", "ops", "page", "plugin", "rotary", "state", "versions")
        ),
        f"{OURS}.integration",
    },
}
MOST_LINES = 400
MOST_PACKAGE_LINES = 7200


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0]


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it; `import x` under TYPE_CHECKING included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == OURS:
                found |= {OURS if alias.name.startswith("_") else f"{OURS}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def fits(module: str, allowed: str) -> bool:
    return module == allowed or (allowed != OURS and module.startswith(f"{allowed}."))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_part_may(path: Path) -> None:
    foreign = {module for module in imports(path) if module.split(".")[0] not in sys.stdlib_module_names}
    allowed = ALLOWED[part_of(path)]
    assert [module for module in sorted(foreign) if not any(fits(module, other) for other in allowed)] == []


def test_kernels_and_their_parameters_know_no_torch() -> None:
    for path in (*ROOT.glob("csrc/params/*"), *ROOT.glob("csrc/cpu/kernels/*")):
        assert "#include <torch" not in path.read_text(), path


def test_files_are_short() -> None:
    sources = [*files(), *(path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_the_package_is_small() -> None:
    assert sum(len(path.read_text().splitlines()) for path in files()) <= MOST_PACKAGE_LINES
