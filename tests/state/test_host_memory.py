from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_shadowkv.state import host_memory
from vllm_shadowkv.state.host_memory import GIB, cgroup, free_bytes


def group(path: Path, limit: str, used: int, inactive_file: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\n")


def test_no_control_group_has_no_limit(tmp_path: Path) -> None:
    assert cgroup(tmp_path, "/") is None


def test_version_2(tmp_path: Path) -> None:
    group(tmp_path, str(8 * GIB), used=3 * GIB, inactive_file=GIB)
    assert cgroup(tmp_path, "/") == (8 * GIB, 6 * GIB)
    group(tmp_path, "max", used=3 * GIB)
    assert cgroup(tmp_path, "/") is None


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    group(tmp_path / "slice", str(8 * GIB), used=7 * GIB)
    group(tmp_path / "slice" / "unit", str(4 * GIB), used=GIB)
    assert cgroup(tmp_path, "/slice/unit") == (8 * GIB, GIB)
    assert cgroup(tmp_path, "/slice/other") == (8 * GIB, GIB)
    assert cgroup(tmp_path, "/elsewhere") is None


def test_version_1(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    (memory / "memory.usage_in_bytes").write_text(str(GIB))
    (memory / "memory.stat").write_text("inactive_file 0\n")
    (memory / "memory.limit_in_bytes").write_text(str(2 * GIB))
    assert cgroup(tmp_path, "/") == (2 * GIB, GIB)
    (memory / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert cgroup(tmp_path, "/") is None


def test_a_full_group_has_nothing_free(tmp_path: Path) -> None:
    group(tmp_path, str(GIB), used=2 * GIB)
    assert cgroup(tmp_path, "/") == (GIB, 0)


@pytest.mark.parametrize(
    ("text", "own"), [("0::/slice/unit\n", "/slice/unit"), ("1:cpu:/x\n0::/\n", "/"), ("0::/../..\n", "/"), (None, "/")]
)
def test_this_processs_group(text: str | None, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        (tmp_path / "cgroup").write_text(text)
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "cgroup")
    assert host_memory._own() == own


def test_the_less_of_machine_and_group_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=5 * GIB))
    monkeypatch.setattr(host_memory, "psutil", memory)
    for limit, free in ((None, 5 * GIB), ((9 * GIB, 3 * GIB), 3 * GIB), ((9 * GIB, 7 * GIB), 5 * GIB)):
        monkeypatch.setattr(host_memory, "cgroup", lambda limit=limit: limit)
        assert free_bytes() == free
