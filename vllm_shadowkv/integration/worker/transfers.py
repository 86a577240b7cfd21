"""A worker's side of the KV connector: sealed blocks are written to files, and read from them, off the step's path.

Everything begins after a step's forward pass, which may still read what a load overwrites, and a block counts as sealed
from the step on that follows the end of its load. On a CPU the threads copy by NumPy, because PyTorch would give each a
team of OpenMP threads of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_shadowkv.integration.stored import Rank, StepTransfers, open_store
from vllm_shadowkv.integration.worker.memory import Memory
from vllm_shadowkv.integration.worker.planner import Planner
from vllm_shadowkv.integration.worker.runtime import Runtime
from vllm_shadowkv.metrics import count_files, labels_of
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.state.block_store import BadBlockError, BlockStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_shadowkv.state.layer import LayerMemory

logger = logging.getLogger("vllm.shadowkv")

THREADS = 4
"""That read, and as many that write."""
MOST_WAITING_BYTES = 2**30
"""Of pages that were copied to be written. A block beyond is not saved: a slow disk must not fill the memory."""
SECONDS_BETWEEN_LOOKS = 0.003
"""At loads, where no request computes."""


class Transfers:
    """Saves and loads of one worker.

    Attributes:
        rank: which part of a block is here, and where the files are.
    """

    def __init__(
        self,
        planner: Planner,
        memory: Memory,
        layout: PageLayout,
        store: BlockStore,
        rank: Rank,
        readers: Executor,
        writers: Executor,
        labels: dict[str, str],
    ) -> None:
        """Begins nothing.

        Args:
            planner: of the worker's steps.
            memory: of the layers.
            layout: of their pages.
            store: the rank's files.
            rank: said to the scheduler.
            readers: threads that read files, and wait for writers.
            writers: threads that write them, and wait for nobody.
            labels: of the metrics.
        """
        self.rank = rank
        self._planner, self._memory, self._layout = planner, memory, layout
        self._store, self._readers, self._writers = store, readers, writers
        self._device = memory.bind().exact_start.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._loads: dict[str, tuple[list[tuple[bytes, int]], list[Future[None]]]] = {}
        self._saves: list[Future[None]] = []
        self._said: set[str] = set()
        self._idle = False
        self._labels = labels
        for kind in ("saved", "loaded", "refused", "unsaved"):
            self._count(kind, 0)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Transfers:
        """Those of the model that this worker has built.

        Raises:
            ValueError: the folder of the files cannot be used.
        """
        runtime = Runtime.latest()
        layout = runtime.geometry.layout
        store, rank = open_store(vllm_config, layout.ints, list(runtime.layers.by_name))
        cores = _cores()
        readers, writers = (ThreadPoolExecutor(THREADS, "shadowkv", _use_all_cores, (cores,)) for _ in range(2))
        return cls(runtime.planner, runtime.memory, layout, store, rank, readers, writers, labels_of(vllm_config))

    def begin(self, step: StepTransfers) -> None:
        """Begins what a step's metadata says; the step's forward pass, if it has one, was launched."""
        self._idle = not step.computes
        if self._idle:  # so nothing was planned, and what the last step has completed is still to be sealed
            self._planner.seal_due()
        for save in step.saves:
            self._save(*save)
        for request_id, blocks in step.loads.items():
            self._load(request_id, blocks)
        for context in step.used:
            self._writers.submit(self._store.touch, context)

    def finish_loads(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks are there, and those some of whose blocks could not be read; each once."""
        if self._idle and self._loads:  # vLLM asks again at once, and would keep the threads from Python's lock
            wait([future for _, futures in self._loads.values() for future in futures], SECONDS_BETWEEN_LOOKS)
        loaded, failed = set(), set()
        for request_id, (blocks, futures) in list(self._loads.items()):
            if not all(future.done() for future in futures):
                continue
            del self._loads[request_id]
            if errors := [error for future in futures if (error := future.exception())]:
                failed.add(request_id)
                for error in errors:
                    if not isinstance(error, BadBlockError):  # of which the log knows
                        logger.error("shadowkv: blocks could not be filled and are computed.", exc_info=error)
                continue
            loaded.add(request_id)
            self._memory.bind().state.seal(torch.tensor([block for _, block in blocks]), None)
            self._count("loaded", len(blocks))
        return loaded, failed

    def close(self) -> None:
        """Waits until everything is written, and reads nothing more."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown()

    def _save(self, block_hash: bytes, block: int) -> None:
        """Copies a block's pages, which may be given away in the next step, and has them written with its values.

        Whoever overwrites the row of the host pool gives the save up, or waits until the values are copied:
        `Bound.reading`.
        """
        bound = self._memory.bind()
        memories = list(bound.memories.values())
        self._saves = [save for save in self._saves if not save.done()]
        if (len(self._saves) + 1) * len(memories) * self._layout.page_bytes > MOST_WAITING_BYTES:
            self._count("unsaved")
            if self._is_first("slow"):
                logger.warning(
                    "shadowkv: files are written to %s more slowly than blocks are sealed; contexts end early there.",
                    self.rank.folder,
                )
            return
        pages = torch.empty(len(memories), self._layout.page_bytes, dtype=torch.uint8, pin_memory=bool(self._stream))
        for copy, memory in zip(pages, memories, strict=True):
            copy.copy_(memory.pages[block], non_blocking=True)
        bound.reading[block] = copied = Future[None]()
        write = self._writers.submit(self._write, block_hash, block, pages, memories, self._event(), copied)
        self._saves.append(write)

    def _write(
        self,
        block_hash: bytes,
        block: int,
        pages: Tensor,
        memories: list[LayerMemory],
        ready: torch.cuda.Event | None,
        copied: Future[None],
    ) -> None:
        if not copied.set_running_or_notify_cancel():
            self._count("unsaved")
            return
        try:
            if ready:
                ready.synchronize()
            values = torch.from_numpy(np.stack([memory.host_pool[block].numpy() for memory in memories]))
        finally:
            copied.set_result(None)
        try:
            self._count("saved", int(self._store.write(block_hash, pages, values) > 0))
        except (OSError, MemoryError) as error:
            self._count("unsaved")
            if self._is_first("failed"):
                logger.warning("shadowkv: blocks cannot be written to %s: %s.", self.rank.folder, error)

    def _is_first(self, kind: str) -> bool:
        """Whether the log does not have it yet: once is enough."""
        is_first = kind not in self._said
        self._said.add(kind)
        return is_first

    def _load(self, request_id: str, blocks: list[tuple[bytes, int]]) -> None:
        """Has blocks filled. Exact pages that they were are no longer resident."""
        bound = self._memory.bind()
        bound.state.write_exact(torch.tensor([block for _, block in blocks]))
        memories, ready = list(bound.memories.values()), self._event()
        futures = []
        for block_hash, block in blocks:
            before = bound.reading.pop(block, None)
            futures.append(self._readers.submit(self._fill, block_hash, block, memories, ready, before))
        self._loads[request_id] = blocks, futures

    def _fill(
        self,
        block_hash: bytes,
        block: int,
        memories: list[LayerMemory],
        ready: torch.cuda.Event | None,
        before: Future[None] | None,
    ) -> None:
        try:
            pages, values = self._store.read(block_hash)
        except BadBlockError as error:
            self._count("refused")
            logger.warning("shadowkv: block %s in %s %s; it is computed.", block_hash.hex(), self.rank.folder, error)
            self._store.remove(block_hash)
            raise
        if before:
            wait([before])
        if ready:
            ready.synchronize()
        for memory, row in zip(memories, values, strict=True):
            memory.host_pool[block].numpy()[:] = row.numpy()
        if not self._stream:
            for memory, page in zip(memories, pages, strict=True):
                memory.pages[block].numpy()[:] = page.numpy()
            return
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for memory, page in zip(memories, pages, strict=True):
                memory.pages[block].copy_(page)
        self._stream.synchronize()

    def _count(self, kind: str, files: int = 1) -> None:
        count_files(self._labels, kind, files)

    def _event(self) -> torch.cuda.Event | None:
        """What was launched so far."""
        return torch.cuda.current_stream(self._device).record_event() if self._stream else None


def _cores() -> set[int]:
    """Those of all threads of this process: vLLM gives its own threads on a CPU one each, which new ones inherit."""
    cores: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            cores |= os.sched_getaffinity(int(thread.name))
    return cores


def _use_all_cores(cores: Iterable[int]) -> None:
    with contextlib.suppress(OSError):  # it is not allowed, so they share the core of the thread that made them
        os.sched_setaffinity(0, cores)
