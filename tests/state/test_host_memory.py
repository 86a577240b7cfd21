from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_shadowkv.state import host_memory
from vllm_shadowkv.state.host_memory import GIB, cgroup, free_bytes

ROOT = "0::/\n"


def group(path: Path, limit: str, used: int, inactive_file: int = 0) -> None:
    """A group of version 2."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\n")


def old_group(path: Path, limit: int, used: int, inactive_file: int = 0) -> None:
    """A group of version 1."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (path / "memory.usage_in_bytes").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive_file}\n")


def test_no_control_group_has_no_limit(tmp_path: Path) -> None:
    assert cgroup(tmp_path, ROOT) is None
    assert cgroup(tmp_path, "") is None


def test_version_2(tmp_path: Path) -> None:
    group(tmp_path, str(8 * GIB), used=3 * GIB, inactive_file=GIB)
    assert cgroup(tmp_path, ROOT) == (8 * GIB, 6 * GIB)
    group(tmp_path, "max", used=3 * GIB)
    assert cgroup(tmp_path, ROOT) is None


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    group(tmp_path / "slice", str(8 * GIB), used=7 * GIB)
    group(tmp_path / "slice" / "unit", str(4 * GIB), used=GIB)
    group(tmp_path / "slice" / "sibling", str(GIB), used=GIB)
    assert cgroup(tmp_path, "0::/slice/unit\n") == (8 * GIB, GIB)
    assert cgroup(tmp_path, "0::/slice/other\n") == (8 * GIB, GIB)
    assert cgroup(tmp_path, "0::/elsewhere\n") is None


def test_version_1(tmp_path: Path) -> None:
    text = "9:name=systemd:/\n4:cpuset,memory:/docker/abc\n0::/\n"
    old_group(tmp_path / "memory", 9223372036854771712, used=3)
    assert cgroup(tmp_path, text) is None
    old_group(tmp_path / "memory" / "docker" / "abc", 20 * GIB, used=15 * GIB, inactive_file=GIB)
    assert cgroup(tmp_path, text) == (20 * GIB, 6 * GIB)


def test_a_path_of_the_host_is_looked_for_at_the_mount(tmp_path: Path) -> None:
    # A container without a cgroup namespace: its path is the host's, its mount shows the container's own files.
    old_group(tmp_path / "memory", 8 * GIB, used=3 * GIB)
    assert cgroup(tmp_path, "4:memory:/docker/abc\n") == (8 * GIB, 5 * GIB)


def test_a_path_that_leaves_the_mount_counts_as_the_mount(tmp_path: Path) -> None:
    group(tmp_path / "mount", str(8 * GIB), used=GIB)
    group(tmp_path, str(GIB), used=GIB)
    assert cgroup(tmp_path / "mount", "0::/../..\n") == (8 * GIB, 7 * GIB)


def test_a_full_group_has_nothing_free(tmp_path: Path) -> None:
    group(tmp_path, str(GIB), used=2 * GIB)
    assert cgroup(tmp_path, ROOT) == (GIB, 0)


def test_this_process_s_groups_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group(tmp_path / "unit", str(4 * GIB), used=GIB)
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "cgroup")
    assert cgroup(tmp_path) is None
    (tmp_path / "cgroup").write_text("0::/unit\n")
    assert cgroup(tmp_path) == (4 * GIB, 3 * GIB)


def test_the_less_of_machine_and_group_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=5 * GIB))
    monkeypatch.setattr(host_memory, "psutil", memory)
    for limit, free in ((None, 5 * GIB), ((9 * GIB, 3 * GIB), 3 * GIB), ((9 * GIB, 7 * GIB), 5 * GIB)):
        monkeypatch.setattr(host_memory, "cgroup", lambda limit=limit: limit)
        assert free_bytes() == free
