"""What a worker says of files that it cannot write or read; that blocks come back is in `test_stored_prefixes.py`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_shadowkv.integration.stored import Rank, StepTransfers
from vllm_shadowkv.integration.worker import transfers
from vllm_shadowkv.integration.worker.transfers import Transfers
from vllm_shadowkv.metrics import FILES
from vllm_shadowkv.state.block_state import BlockState
from vllm_shadowkv.state.block_store import BlockFolder, BlockStore

LAYERS, BLOCKS, PAGE, ROW = 2, 8, 96, 40
HASHES = [bytes([number] * 32) for number in range(BLOCKS)]


class Worker:
    """Layers with pages and rows of random bytes, and a store."""

    def __init__(self, path: Path, name: str) -> None:
        self.labels = {"model_name": name, "engine": "0"}
        self.folder = BlockFolder(path, {})
        self.store = BlockStore(self.folder, "rank", {}, 2**30)
        self.layers = [
            SimpleNamespace(
                pages=torch.randint(0, 256, (BLOCKS, PAGE), dtype=torch.uint8),
                host_pool=torch.randint(0, 256, (BLOCKS, ROW), dtype=torch.uint8),
            )
            for _ in range(LAYERS)
        ]
        self.bound = SimpleNamespace(
            memories=dict(enumerate(self.layers)),
            state=BlockState(BLOCKS, 8, torch.device("cpu")),
            exact_start=torch.zeros(1, dtype=torch.int32),
            reading={},
        )
        memory: Any = SimpleNamespace(bind=lambda: self.bound)
        layout: Any = SimpleNamespace(page_bytes=PAGE)
        planner: Any = SimpleNamespace(seal_due=lambda: None)
        self.threads = ThreadPoolExecutor(1)
        rank = Rank(self.folder, "rank")
        self.transfers = Transfers(planner, memory, layout, self.store, rank, self.threads, self.threads, self.labels)

    def save(self, *blocks: int) -> None:
        self.transfers.begin(StepTransfers(computes=True, saves=[(HASHES[block], block) for block in blocks]))
        self.threads.submit(lambda: None).result()

    def load(self, hashes: list[bytes], blocks: list[int]) -> tuple[set[str], set[str]]:
        loads = {"request": list(zip(hashes, blocks, strict=True))}
        self.transfers.begin(StepTransfers(computes=True, loads=loads))
        self.threads.submit(lambda: None).result()
        return self.transfers.finish_loads()

    def block(self, block: int) -> list[bytes]:
        return [bytes(part[block].tolist()) for layer in self.layers for part in (layer.pages, layer.host_pool)]

    def files(self, kind: str) -> float:
        """Of the metric."""
        return FILES.labels(**self.labels, kind=kind)._value.get()


@pytest.fixture
def worker(tmp_path: Path, request: pytest.FixtureRequest) -> Worker:
    return Worker(tmp_path / "blocks", request.node.name)


def test_a_block_that_was_saved_is_loaded(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    worker.save(1, 2)
    assert worker.load(HASHES[1:3], [5, 6]) == ({"request"}, set())
    assert [worker.block(block) for block in (5, 6)] == [worker.block(block) for block in (1, 2)]
    assert worker.block(5) != worker.block(6)
    assert [worker.files(kind) for kind in ("saved", "loaded", "refused", "unsaved")] == [2, 2, 0, 0]
    assert worker.transfers.finish_loads() == (set(), set())
    assert not caplog.records


def test_a_block_that_is_not_what_it_should_be_is_computed(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    worker.save(1, 2)
    before = worker.block(6)
    file = worker.folder.file("rank", HASHES[2])
    file.write_bytes(file.read_bytes()[:-1] + b"\0\0")
    assert worker.load(HASHES[1:3], [5, 6]) == (set(), {"request"})
    assert worker.block(6) == before
    (record,) = caplog.records
    assert record.getMessage().startswith(f"shadowkv: block {HASHES[2].hex()} in {worker.folder} cannot be read: ")
    assert record.getMessage().endswith("; it is computed.")
    assert not worker.store.has(HASHES[2]), "so that a good one can be written"
    assert worker.store.has(HASHES[1])
    assert [worker.files(kind) for kind in ("loaded", "refused")] == [0, 1]


def test_a_folder_that_cannot_be_written_to_is_told_of(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    Path(str(worker.folder)).parent.write_text("in the way")
    worker.save(1)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"shadowkv: blocks cannot be written to {worker.folder}: ")
    assert "Not a directory" in record.getMessage()
    assert [worker.files(kind) for kind in ("saved", "unsaved")] == [0, 1]


def test_a_slow_disk_does_not_fill_the_memory(
    worker: Worker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only two blocks wait to be written. One beyond is not saved, and that is said once."""
    monkeypatch.setattr(transfers, "MOST_WAITING_BYTES", 2 * LAYERS * PAGE)
    blocked = threading.Event()
    worker.threads.submit(blocked.wait)
    saves = [(HASHES[block], block) for block in range(5)]
    worker.transfers.begin(StepTransfers(computes=True, saves=saves))
    blocked.set()
    worker.threads.submit(lambda: None).result()
    assert [worker.store.has(block_hash) for block_hash in HASHES[:5]] == [True, True, False, False, False]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"shadowkv: files are written to {worker.folder} more slowly than blocks are sealed; contexts end early there."
    )
    worker.save(2, 3)
    assert [worker.store.has(block_hash) for block_hash in HASHES[:5]] == [True, True, True, True, False]
    assert [worker.files(kind) for kind in ("saved", "unsaved")] == [4, 3]


def test_what_nobody_expects_is_told_of_and_computed(
    worker: Worker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.save(1)
    pages, values = worker.store.read(HASHES[1])
    monkeypatch.setattr(worker.store, "read", lambda block_hash: (pages[:1], values))
    assert worker.load(HASHES[1:2], [5]) == (set(), {"request"})
    (record,) = caplog.records
    assert record.getMessage() == "shadowkv: blocks could not be filled and are computed."
    assert record.exc_info is not None
    assert "zip()" in str(record.exc_info[1])
