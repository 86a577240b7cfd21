"""The documentation is what the code says, and builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import benchmarks.step_model.__main__ as step_model

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_is_current() -> None:
    text = (DOCS / "configuration.md").read_text()
    assert text == script("configuration_reference").reference(), "run scripts/configuration_reference.py"


def test_the_predictions_are_what_the_step_model_prints() -> None:
    sheets = step_model.answer(step_model.parser().parse_args([]))
    text = (DOCS / "gpu_predictions.md").read_text()
    assert text == step_model.updated(text, sheets), "run benchmarks.step_model --update docs/gpu_predictions.md"
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == len(sheets), "a table of the page is not the model's"


def test_the_pictures_are_current(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script("draw").main(tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert drawn
    assert [name for name, data in drawn.items() if (DOCS / "images" / name).read_bytes() != data] == []


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("material")
    # Not --quiet, which also keeps --strict from counting warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")}
    for page in pages:
        at = tmp_path / "site" / ("" if page == "index" else page) / "index.html"
        assert at.exists(), page
        loaded = re.findall(r'<(?:script|link rel="stylesheet"|img)[^>]*(?:src|href)="(https?:[^"]*)"', at.read_text())
        assert loaded == [], "a page fetches from the network"


def test_the_tour_names_every_file() -> None:
    tour = (DOCS / "tour.md").read_text()
    assert len(tour.splitlines()) <= 60
    files = [path for path in (ROOT / "vllm_shadowkv").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    helpers = {"extension.py", "versions.py", "rotary.py", "layer.py"}  # found where they are imported
    assert {path.name for path in files} - helpers - set(re.findall(r"(\w+\.py)", tour)) == set()


def test_decisions_are_numbered_and_complete() -> None:
    for number, path in enumerate(sorted((DOCS / "adr").glob("*.md")), 1):
        text = path.read_text()
        assert path.name.startswith(f"{number:04}-")
        assert text.startswith(f"# {number}. ")
        for part in ("Context", "Decision", "Why", "Cost"):
            assert f"**{part}.**" in text, f"{path.name} lacks {part}"
