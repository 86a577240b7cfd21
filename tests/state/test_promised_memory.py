from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_shadowkv.state import promised_memory
from vllm_shadowkv.state.promised_memory import Promise, promised_to_others

GIB = 2**30
MIB = 2**20

OTHER = """
import sys
from pathlib import Path
from vllm_shadowkv.state import promised_memory
promised_memory.FOLDER = Path(sys.argv[1])
promise = promised_memory.Promise(int(sys.argv[2]), sys.argv[3])
print("promised", flush=True)
for line in sys.stdin:
    if line == "touch\\n":
        touched = b"x" * (512 << 20)
    else:
        del promise
    print("done", flush=True)
"""


class Other:
    """A server in a process of its own."""

    def __init__(self, folder: Path, num_bytes: int, server: str) -> None:
        command = [sys.executable, "-c", OTHER, str(folder), str(num_bytes), server]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._wait("promised")

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        self._wait("done")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _wait(self, answer: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{answer}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(promised_memory, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def other(folder: Path) -> Iterator[Other]:
    started = Other(folder, 4 * GIB, "theirs")
    yield started
    started.kill()


def test_an_idle_server_keeps_what_it_was_promised(other: Other) -> None:
    assert promised_to_others("ours") == 4 * GIB
    assert promised_to_others() == 4 * GIB, "as a command asks"
    assert promised_to_others("theirs") == 0, "ranks of one server share by their own rule"


def test_what_a_server_has_touched_is_no_longer_free_and_does_not_count_twice(other: Other) -> None:
    other.tell("touch")
    left = promised_to_others()
    assert 3.4 * GIB < left <= 4 * GIB - 512 * MIB


def test_a_promise_ends_with_the_pool_and_with_the_process(other: Other, folder: Path) -> None:
    second = Other(folder, GIB, "another")
    assert promised_to_others() == 5 * GIB
    second.tell("let go")
    assert promised_to_others() == 4 * GIB
    second.kill()
    other.kill()  # no chance to clean up
    assert list(folder.glob("*/*"))
    assert promised_to_others() == 0
    assert not list(folder.glob("*/*")), "notes of the dead are removed"


def test_promises_of_this_process() -> None:
    promise = Promise(GIB, "ours")
    assert promised_to_others("ours") == 0
    assert GIB - 64 * MIB < promised_to_others() <= GIB
    del promise
    assert promised_to_others() == 0


def test_without_a_folder_nobody_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(promised_memory, "FOLDER", tmp_path / "not here")
    Promise(GIB, "ours")
    assert promised_to_others() == 0
