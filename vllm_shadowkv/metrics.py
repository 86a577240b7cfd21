"""What a worker counts, as Prometheus metrics. docs/metrics.md says what each of them means and when it looks bad."""

from __future__ import annotations

import logging
import os
import time
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge

from vllm_shadowkv import exposition
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.state.slot_counts import SlotCounts

logger = logging.getLogger("vllm.shadowkv")

REGISTRY = CollectorRegistry()
"""Our own, because vLLM clears what it finds of its own in the default one (`vllm/v1/metrics/prometheus.py`)."""

LABELS = ("model_name", "engine")
"""vLLM's."""


def _counter(name: str, what: str, *labels: str) -> Counter:
    return Counter(f"vllm:shadowkv_{name}", what, (*LABELS, *labels), registry=REGISTRY)


def _gauge(name: str, what: str) -> Gauge:
    return Gauge(f"vllm:shadowkv_{name}", what, LABELS, registry=REGISTRY, multiprocess_mode="livesum")


SEALED_BLOCKS = _counter("sealed_blocks", "Blocks sealed.")
SELECTED_CHUNKS = _counter("selected_chunks", "Chunks selected by decode steps, all layers and KV heads.")
SLOT_HITS = _counter("slot_hits", "Selected chunks found in a slot.")
SLOT_MISSES = _counter("slot_misses", "Selected chunks that were brought into a slot.")
RESIDENT_CHUNKS = _counter("resident_chunks", "Of them, copied from resident exact pages; others rebuilt and fetched.")
FETCHED_BYTES = _counter("fetched_bytes", "Bytes of values read from the host pool, by decode or by prefill.", "phase")
EXPANDED_TOKENS = _counter("expanded_tokens", "Sealed tokens expanded for prefills to attend to.")
RESIDENT_TOKENS = _counter("resident_tokens", "Sealed tokens that prefills read from resident exact pages instead.")
HIT_TOKENS = _counter("hit_tokens", "Tokens of prefix hits: with their exact pages, or sealed only.", "kind")
OWNERLESS_SEALS = _counter("ownerless_seals", "Blocks whose request ended before they could be sealed.")
SEALED_PREFILLS = _counter("sealed_prefills", "Prefill steps of a request that attended to sealed context.")
TABLE_READS = _counter("table_reads", "Steps whose plan read the block tables, which on CUDA waits for the device.")
REFUSED_REQUESTS = _counter("refused_requests", "Requests answered with an error: prompts in pieces (streaming input).")
FILES = _counter("files", "Files of sealed blocks, one per block and rank: saved, loaded, refused, unsaved.", "kind")
HOST_POOL_BYTES = _gauge("host_pool_bytes", "Bytes of the host pool.")
HOST_POOL_USED_BYTES = _gauge("host_pool_used_bytes", "Bytes of the host pool that hold values of running requests.")


IDLE_SECONDS = 10.0
"""Without a step for so long no request is running."""


@dataclass
class StepCounts:
    """What the planner counts, once a step, since the start. Plain integers: an addition is all a step pays.

    Attributes:
        steps: planned.
        sealed_blocks, expanded_tokens, resident_tokens, sealed_prefills, table_reads: as the metrics.
        used_blocks: sealed blocks of the requests of the last step whose tables were read; one that requests share
            counts once.
        wants_used_blocks: whether to count them anew in the next such step.
    """

    steps: int = 0
    sealed_blocks: int = 0
    expanded_tokens: int = 0
    resident_tokens: int = 0
    sealed_prefills: int = 0
    table_reads: int = 0
    used_blocks: int = 0
    wants_used_blocks: bool = True


def labels_of(vllm_config: Any) -> dict[str, str]:
    """The values of `LABELS` for an engine's configuration, as vLLM has them."""
    return {
        "model_name": str(vllm_config.model_config.served_model_name),
        "engine": str(vllm_config.parallel_config.data_parallel_index),
    }


def count_refusal(labels: dict[str, str]) -> None:
    """Counts a request that was refused, in the process of the scheduler."""
    REFUSED_REQUESTS.labels(**labels).inc()
    _serve()


def count_hit(labels: dict[str, str], exact_tokens: int, sealed_tokens: int) -> None:
    """Counts what a request found in the prefix cache, in the process of the scheduler."""
    HIT_TOKENS.labels(**labels, kind="exact").inc(exact_tokens)
    HIT_TOKENS.labels(**labels, kind="sealed").inc(sealed_tokens)
    _serve()


def count_files(labels: dict[str, str], kind: str, files: int = 1) -> None:
    """Counts files of the KV connector, in a worker's process; threads may call it."""
    FILES.labels(**labels, kind=kind).inc(files)
    _serve()


def count_ownerless_seals(labels: dict[str, str], blocks: int) -> None:
    """Counts blocks that are sealed after the end of their request, in the process of the scheduler."""
    OWNERLESS_SEALS.labels(**labels).inc(blocks)
    _serve()


class Meter:
    """Publishes the counts of one model in one worker, until it is dropped.

    What every rank of an engine does alike is published by its first rank; the rest is each rank's own share.

    Attributes:
        num_blocks: of the host pool; set it when the pool is made.
    """

    def __init__(
        self,
        steps: StepCounts,
        slots: SlotCounts,
        layout: PageLayout,
        num_layers: int,
        labels: dict[str, str],
        first_rank: bool,
        log_seconds: float,
    ) -> None:
        """Begins to publish.

        Args:
            steps: the planner's counts.
            slots: the kernels' counts.
            layout: of the pages.
            num_layers: of this rank.
            labels: values of `LABELS`.
            first_rank: whether this is the first rank of its engine; it also writes to the log.
            log_seconds: between two lines in the log.
        """
        self.num_blocks = 0
        self._steps, self._slots = steps, slots
        self._block_size = layout.block_size
        self._chunk_bytes = layout.value_chunk_bytes
        self._row_bytes = num_layers * layout.value_row_bytes
        self._labels, self._first_rank, self._log_seconds = labels, first_rank, log_seconds
        self._totals: dict[Counter, int] = {}
        self._last_step = 0, time.monotonic()
        self._last_line = _Line(0, 0, 0, 0, 0, 0, 0), time.monotonic()
        weakref.finalize(self, _clear, labels)
        _meters.add(self)
        _serve()

    def publish(self) -> None:
        """Brings the metrics up to date, and writes to the log from time to time; called by one thread."""
        now, steps = time.monotonic(), self._steps
        if steps.steps != self._last_step[0]:
            self._last_step = steps.steps, now
        elif now - self._last_step[1] > IDLE_SECONDS:
            steps.used_blocks = 0
        steps.wants_used_blocks = True
        selected, hits, resident, others = self._slots.latest()
        fetched = others * self._chunk_bytes
        expanded_tokens = steps.expanded_tokens
        expanded = expanded_tokens // self._block_size * self._row_bytes
        self._follow(SELECTED_CHUNKS, selected)
        self._follow(SLOT_HITS, hits)
        self._follow(SLOT_MISSES, resident + others)
        self._follow(RESIDENT_CHUNKS, resident)
        self._follow(FETCHED_BYTES, fetched, phase="decode")
        self._follow(FETCHED_BYTES, expanded, phase="prefill")
        HOST_POOL_BYTES.labels(**self._labels).set(self.num_blocks * self._row_bytes)
        HOST_POOL_USED_BYTES.labels(**self._labels).set(steps.used_blocks * self._row_bytes)
        if self._first_rank:
            sealed = steps.sealed_blocks
            self._follow(SEALED_BLOCKS, sealed)
            self._follow(EXPANDED_TOKENS, expanded_tokens)
            self._follow(RESIDENT_TOKENS, steps.resident_tokens)
            self._follow(SEALED_PREFILLS, steps.sealed_prefills)
            self._follow(TABLE_READS, steps.table_reads)
            for counter in (REFUSED_REQUESTS, OWNERLESS_SEALS):
                self._follow(counter, 0)  # another process counts them
            for kind in ("exact", "sealed"):
                self._follow(HIT_TOKENS, 0, kind=kind)
            self._log(now, _Line(steps.steps, sealed, selected, hits, resident, fetched + expanded, expanded_tokens))

    def _follow(self, counter: Counter, total: int, **labels: str) -> None:
        """Raises a counter to a total; never lowers it."""
        child = counter.labels(**self._labels, **labels)
        before = self._totals.get(child, 0)
        if total > before:
            child.inc(total - before)
            self._totals[child] = total
        else:
            child.inc(0)  # so that it is there

    def _log(self, now: float, line: _Line) -> None:
        last, at = self._last_line
        if now - at < self._log_seconds:
            return
        self._last_line = line, now
        if line.steps == last.steps:
            return
        new = _Line(*(one - other for one, other in zip(line, last, strict=True)))
        logger.info(
            "Engine %03d: shadowkv: sealed %d blocks, slots held %.1f%% of %d selected chunks, resident pages %.1f%%, "
            "fetched %.1f MiB (%.1f MiB/s), expanded %d tokens for prefills, host pool %.2f of %.2f GiB used",
            int(self._labels["engine"]),
            new.sealed_blocks,
            100 * new.hits / max(new.selected, 1),
            new.selected,
            100 * new.resident / max(new.selected, 1),
            new.fetched_bytes / 2**20,
            new.fetched_bytes / 2**20 / (now - at),
            new.expanded_tokens,
            self._steps.used_blocks * self._row_bytes / 2**30,
            self.num_blocks * self._row_bytes / 2**30,
        )


class _Line(NamedTuple):
    """What a line in the log is about: this rank's counts since the start, or between two lines."""

    steps: int
    sealed_blocks: int
    selected: int
    hits: int
    resident: int
    fetched_bytes: int
    expanded_tokens: int


_meters: weakref.WeakSet[Meter] = weakref.WeakSet()
_serving_process = 0


def _serve() -> None:
    global _serving_process
    if _serving_process != os.getpid():  # a fork takes no threads along
        _serving_process = os.getpid()
        exposition.serve(REGISTRY, _refresh)


def _refresh() -> None:
    for meter in list(_meters):
        meter.publish()


def _clear(labels: dict[str, str]) -> None:
    """Counters stay, as the counts of a process; what is no more has no size."""
    for gauge in (HOST_POOL_BYTES, HOST_POOL_USED_BYTES):
        gauge.labels(**labels).set(0)
