"""What tells us what a new vLLM means: the comparison of two trees at our seams, operators, requirements."""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from benchmarks.wheels import Cached, MissingError, Wheel
from scripts import compare_vllm, vllm_check, vllm_operators, vllm_overlay

MANAGER = "v1/core/manager.py"
OURS = """
from vllm.v1.core.manager import Manager
class Ours(Manager):
    def free(self): ...
    def own(self): ...
"""
OLD = {
    "v1/core/base.py": "class Base:\n    def free(self):\n        return 1\n",
    MANAGER: "from vllm.v1.core.base import Base\nclass Manager(Base):\n    def take(self, n):\n        return n\n",
    "v1/core/relied.py": "def relied(a):\n    '''Old.'''\n    return a\n",
}


@pytest.fixture
def seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What is printed of a tree that differs from `OLD` in some files; None takes one away."""
    package = tmp_path / "ours"
    package.mkdir()
    (package / "ours.py").write_text(OURS)
    monkeypatch.setattr(compare_vllm, "PACKAGE", package)
    monkeypatch.setattr(compare_vllm, "RELIED_ON", {"v1.core.relied": ["relied"]})

    def compare(**changed: str | None) -> tuple[int, str]:
        new = OLD | {f"v1/core/{name}.py": text for name, text in changed.items()}
        for folder, files in (("old", OLD), ("new", new)):
            for name, text in files.items():
                if text is not None:
                    path = tmp_path / folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text)
        monkeypatch.setattr(sys, "argv", ["compare", "--diff", str(tmp_path / "old"), str(tmp_path / "new")])
        return compare_vllm.main(), capsys.readouterr().out

    return compare


def test_equal_trees_differ_in_nothing(seams) -> None:
    assert seams() == (0, "1 imported names and 2 bodies compared, 0 missing\n")


def test_another_body_of_an_overridden_method_is_seen_where_it_is_inherited(seams) -> None:
    code, said = seams(base=OLD["v1/core/base.py"].replace("return 1", "return 2"))
    assert "another text: vllm.v1.core.base.Base.free, which Ours overrides\n" in said
    assert "  -    return 1\n  +    return 2\n" in said
    assert code == 0, "it is there, and may be as good"


def test_docstrings_and_comments_are_not_compared(seams) -> None:
    said = seams(relied="def relied(a):\n    '''New.'''\n    return a  # now\n")[1]
    assert said.count("\n") == 1


def test_what_is_relied_on_is_found_where_it_moved(seams) -> None:
    code, said = seams(relied=None, elsewhere="def relied(a):\n    return -a\n")
    assert "moved: vllm.v1.core.relied.relied to vllm.v1.core.elsewhere\n" in said
    assert "another text: vllm.v1.core.relied.relied\n" in said
    assert code == 0


def test_what_is_missing_fails(seams) -> None:
    code, said = seams(relied=None, manager="class Other: ...\n")
    assert "missing: vllm.v1.core.manager.Manager\n" in said
    assert "missing: vllm.v1.core.relied.relied\n" in said
    assert "missing: vllm.v1.core.base.Base.free, which Ours overrides\n" in said
    assert code == 1


def test_another_signature_is_seen(seams) -> None:
    changed = OLD[MANAGER].replace("take(self, n)", "take(self, n, m)") + "    def new(self): ...\n"
    said = seams(manager=changed)[1]
    assert "changed: vllm.v1.core.manager.Manager: take\n  (self, n) -> None\n  (self, n, m) -> None\n" in said
    assert "new: vllm.v1.core.manager.Manager: new" in said


def test_everything_that_we_rely_on_is_in_the_vllm_of_this_environment() -> None:
    """Else a comparison with the next one would begin with what is missing already."""
    import vllm

    tree = Path(vllm.__file__).parent
    for module, paths in compare_vllm.RELIED_ON.items():
        for path in paths:
            name, *rest = path.split(".")
            found = compare_vllm.find(tree, module, name) or compare_vllm.moved(tree, name)
            assert found is not None, path
            assert compare_vllm._within(found[1], rest) is not None, path
    overridden = {
        (ours.name, item.name)
        for module, owner, ours in compare_vllm.subclassed()
        for item in ours.body
        if hasattr(item, "name") and compare_vllm.method(tree, module, owner, item.name)
    }
    assert {("PublishingManager", "cache_blocks"), ("ShadowSpec", "merge")} <= overridden


# -- Operators -------------------------------------------------------------------------------------------------------


def test_calls_that_operators_do_not_take_are_seen(tmp_path: Path) -> None:
    library = torch.library.Library("_scripts_test", "DEF")
    library.define("op(Tensor a, int b, *, int c=1) -> Tensor")
    schemas = {("_scripts_test", "op"): [torch._C._get_schema("_scripts_test::op", "")]}
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    (old / "a.py").write_text("torch.ops._scripts_test.op(a)\n")
    calls = ["op(a)", "op(a, 1)", "op(a, b=1, c=2)", "op.default(*a)", "op(a, 1, 2, 3)", "op(a, 1, d=1)", "op(b=1)"]
    (new / "a.py").write_text("".join(f"torch.ops._scripts_test.{call}\n" for call in calls))
    (new / "cpu.py").write_text("torch.ops._scripts_test.other(a)\n")
    (new / "cuda.py").write_text("torch.ops._scripts_test.other(a)\n")
    found = [line.splitlines()[0] for line in vllm_operators.differences(old, new, schemas)]
    assert found == [
        "another schema: _scripts_test::op, called in a.py:5 with 4 arguments",
        "another schema: _scripts_test::op, called in a.py:6 with 2 arguments, d=",
        "another schema: _scripts_test::op, called in a.py:7 with 0 arguments, b=",
        "no such operator: _scripts_test::other, called in cpu.py:1",
    ]


# -- The overlay -----------------------------------------------------------------------------------------------------


def test_requirements_that_are_not_met() -> None:
    wanted = ["torch==1.0", "pytest>=1", "pytest<1", "no-such-thing>=2", "none; extra == 'x'", "tilelang==0.1.12"]
    text = "Name: vllm\n" + "".join(f"Requires-Dist: {requirement}\n" for requirement in wanted)
    assert list(vllm_overlay.unmet(text)) == ["pytest<1", "no-such-thing>=2"]


def test_of_the_wheel_only_what_runs_without_cuda_is_kept(tmp_path: Path) -> None:
    kept = ["vllm/a.py", "vllm/b/c.json", "vllm-1.dist-info/METADATA"]
    with ZipFile(tmp_path / "wheel.zip", "w") as wheel:
        for name in [*kept, "vllm/_C.abi3.so", "vllm/vllm-rs", "vllm/x.cuh"]:
            wheel.writestr(name, "Version: 1\n")
    with ZipFile(tmp_path / "wheel.zip") as wheel:
        vllm_overlay.unpack(wheel, tmp_path / "tree")
    files = [str(path.relative_to(tmp_path / "tree")) for path in (tmp_path / "tree").rglob("*") if path.is_file()]
    assert sorted(files) == sorted(kept)
    assert vllm_overlay.metadata(tmp_path / "tree") == "Version: 1\n"


def test_a_wheel_that_is_pinned_is_held_against_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of one that is not, what the index has is taken, under another name in the cache."""

    def fetch(command: list[str], **options: object) -> object:
        (Path(command[command.index("--dest") + 1]) / "vllm-1-py3-none-any.whl").write_bytes(b"wheel")
        return type("Result", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr("subprocess.run", fetch)
    assert Wheel("vllm", "1", None, 1).download(tmp_path).read_bytes() == b"wheel"
    with pytest.raises(MissingError, match=r"has the sha256 .*, not 00"):
        Wheel("vllm", "1", "00", 1).download(tmp_path)
    names = {
        Cached("vllm-1", Wheel("vllm", "1", sha256, 1), vllm_overlay.unpack, "").path.name for sha256 in (None, "00")
    }
    assert names == {"vllm-1-unpinned", "vllm-1-00"}


def test_the_newest_version_is_what_the_index_says(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = type(
        "Result", (), {"returncode": 0, "stderr": "no index", "stdout": "vllm (0.34.0)\nAvailable versions: …\n"}
    )
    monkeypatch.setattr(vllm_check.subprocess, "run", lambda *command, **options: answer)
    assert vllm_check.newest() == "0.34.0"
    answer.stdout = ""
    with pytest.raises(MissingError, match="no index"):
        vllm_check.newest()
