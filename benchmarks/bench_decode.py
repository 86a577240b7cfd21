"""One decode step of one attention layer, shadowkv against vLLM's own backend: `python -m benchmarks.bench_decode`.

Both write the new token's key and value and attend to the whole context; what is planned once per step for all layers
is not timed. Pages hold synthetic content, so no prefill is needed; slot hits are forced to the given rates. The two
sides alternate, and before every call the caches are swept, as the rest of a model would. On a CPU the baseline is
CPU_ATTN in the faster of its two split-KV settings; on a GPU FlashAttention, bf16 and fp8, every side in a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.baselines import cpu_baselines, cuda_baselines
from benchmarks.machine import machine
from benchmarks.progress import track
from benchmarks.timing import captured, once, sweeper
from benchmarks.workload import SHAPES, Workload, hit_rate
from vllm_shadowkv.integration.attention.library import DenseBatch
from vllm_shadowkv.state.host_memory import free_bytes

DTYPE = torch.bfloat16
MEMORY_SHARE = 0.6
"""Of the free memory: sizes that would take more are left out."""


@dataclass(frozen=True)
class Record:
    """One comparison; times are medians of one call, spreads the quartiles' distance relative to them.

    `hit_rate` is None where the context is below the dense threshold, and attention exact. `resident_ms`: ours where
    what is missed is copied from resident pages; `shadowkv_ms`: where it is rebuilt and fetched from the host.
    """

    shape: str
    context: int
    batch: int
    hit_rate: float | None
    baseline: str
    baseline_ms: float
    baseline_spread: float
    shadowkv_ms: float
    shadowkv_spread: float
    ratio: float
    resident_ms: float | None = None


class Timer:
    """Times calls that alternate, each after a sweep of the caches."""

    def __init__(self, device: str, seconds: float) -> None:
        self._device, self._seconds = device, seconds
        self._sweep = sweeper(device)

    def __call__(self, sides: dict[str, tuple[Callable[[], None], Callable[[], None]]]) -> dict[str, list[float]]:
        """Milliseconds of each side's calls; a side is what to do before the clock starts, and what to time."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        end = time.monotonic() + self._seconds
        while time.monotonic() < end or len(next(iter(times.values()))) < 7:
            for name, (before, call) in sides.items():
                before()
                self._sweep()
                times[name].append(once(call, self._device))
        return {name: values[2:] for name, values in times.items()}


class ShadowKV:
    """Our side at one size."""

    def __init__(self, shape: str, context: int, batch: int, device: str) -> None:
        block, threshold = 1024, 4096  # the defaults, checked below
        sealed = 0 if context <= threshold else context // block * block - block
        self.work = work = Workload(shape, sealed, context - sealed, batch, device, DTYPE, with_sources=True)
        assert (work.layout.block_size, work.config.dense_threshold) == (block, threshold)
        layout = work.layout
        if device == "cpu":
            from vllm_shadowkv.integration.attention.cpu import CpuAttention

            self.attention = CpuAttention(layout, work.heads)
        else:
            from vllm_shadowkv.integration.attention.flash import FlashAttention

            self.attention = FlashAttention(layout, torch.device(device))
        self.key, self.value = (
            torch.randn(batch, layout.num_kv_heads, layout.head_size, device=device, dtype=DTYPE) for _ in range(2)
        )
        last = work.rows.exact_table[:, -1].long() * layout.exact_tokens
        self.slot_mapping = last + (context - sealed - 1) % layout.exact_tokens
        self.dense: DenseBatch | None = None
        if not sealed:
            starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
            rows = work.rows
            self.dense = DenseBatch(None, starts, rows.seq_lens, rows.exact_table, 1, context)
            self.dense.plan = self.attention.plan(self.dense)

    def prepare(self, rate: float | None, resident: bool) -> None:
        """What comes before a step of this hit rate."""
        self.work.set_resident(resident)
        if rate is not None:
            self.work.force_hits(rate)

    def step(self) -> None:
        """One step."""
        work = self.work
        self.attention.write(work.memory, self.key, self.value, self.slot_mapping)
        if self.dense is not None:
            self.attention.attend_dense(work.memory, self.dense, work.query, work.scale, work.output)
        else:
            work.attend()


def compare(shape: str, context: int, batch: int, hit_rates: list[float], device: str, seconds: float) -> list[Record]:
    """All hit rates at one size."""
    ours = ShadowKV(shape, context, batch, device)
    make = cpu_baselines if device == "cpu" else cuda_baselines
    baselines = make(*SHAPES[shape], context, batch, DTYPE)
    timer = Timer(device, seconds)
    step: Callable[[], None] = ours.step
    step()
    if device == "cuda":
        step = captured(ours.step)
        for baseline in baselines:
            baseline.step = captured(baseline.step)  # type: ignore[method-assign]
    rates: list[float | None] = [None] if ours.dense is not None else list(hit_rates)
    records = []
    for rate in rates:
        sides = {baseline.name: (_nothing, baseline.step) for baseline in baselines}
        sides |= {"shadowkv": (partial(ours.prepare, rate, False), step)}
        if rate is not None:
            sides |= {"resident": (partial(ours.prepare, rate, True), step)}
        times = timer(sides)
        low, ours_ms, high = statistics.quantiles(times.pop("shadowkv"), n=4)
        resident_ms = statistics.median(times.pop("resident")) if rate is not None else None
        kinds = {baseline.kind for baseline in baselines}
        for kind in sorted(kinds):
            names = [baseline.name for baseline in baselines if baseline.kind == kind]
            name = min(names, key=lambda name: statistics.median(times[name]))
            stock_low, stock_ms, stock_high = statistics.quantiles(times[name], n=4)
            records.append(
                Record(
                    shape=shape,
                    context=context,
                    batch=batch,
                    hit_rate=rate,
                    baseline=name,
                    baseline_ms=stock_ms,
                    baseline_spread=(stock_high - stock_low) / stock_ms,
                    shadowkv_ms=ours_ms,
                    shadowkv_spread=(high - low) / ours_ms,
                    ratio=stock_ms / ours_ms,
                    resident_ms=resident_ms,
                )
            )
    return records


def _nothing() -> None:
    pass


def missing_room(shape: str, context: int, batch: int, device: str) -> str:
    """The memory that both sides' caches, or our host pool, would not fit; nothing if they do."""
    _, heads, size = SHAPES[shape]
    values = batch * (context + 4096) * heads * size * DTYPE.itemsize
    host = free_bytes()
    if device == "cpu":
        return "the machine's" if 5.8 * values > MEMORY_SHARE * host else ""
    # Theirs in bf16 and fp8, and our pages; what earlier sizes took is PyTorch's to use again.
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if 5.8 * values > MEMORY_SHARE * free:
        return "the GPU's"
    return "the host's" if 1.2 * values > MEMORY_SHARE * host else ""


def growth(records: list[Record]) -> list[str]:
    """Per batch and hit rate: how both sides' times grow with the context, and where they would be equal."""
    sentences = []
    for batch, rate, kind in sorted({(r.batch, r.hit_rate, _kind(r)) for r in records if r.hit_rate is not None}):
        chosen = [r for r in records if (r.batch, r.hit_rate, _kind(r)) == (batch, rate, kind)]
        if len(chosen) < 2:
            continue
        contexts = torch.tensor([[r.context / 1024, 1.0] for r in chosen], dtype=torch.float64)
        both = torch.tensor([[r.shadowkv_ms, r.baseline_ms] for r in chosen], dtype=torch.float64)
        # Relative errors count, or the longest context alone would decide.
        weights = 1 / both
        (slope, base), (stock_slope, stock_base) = (
            torch.linalg.lstsq(contexts * w[:, None], (y * w)[:, None]).solution.flatten().tolist()
            for y, w in zip(both.T, weights.T, strict=True)
        )
        even = (base - stock_base) / (stock_slope - slope) if stock_slope > slope else float("inf")
        sentences.append(
            f"batch {batch}, {rate:.0%} hits: {1000 * slope:.1f} us per 1,024 tokens of context against "
            f"{1000 * stock_slope:.1f} ({kind}), 1/{stock_slope / slope:.0f}; equal at about "
            f"{max(even, 0) * 1024:,.0f} tokens."
        )
    return sentences


def _kind(record: Record) -> str:
    return record.baseline.split(",")[0]


def table(records: list[Record], title: str) -> Table:
    """The records for the terminal."""
    view = Table(title=title, title_justify="left")
    for name in (
        "context",
        "batch",
        "hits",
        "baseline",
        "ms",
        "spread",
        "shadowkv ms",
        "spread",
        "ratio",
        "resident ms",
    ):
        view.add_column(name, justify="left" if name == "baseline" else "right")
    for r in records:
        hits = "dense" if r.hit_rate is None else f"{r.hit_rate:.0%}"
        view.add_row(
            f"{r.context:,}", str(r.batch), hits, r.baseline, f"{r.baseline_ms:.2f}", f"{r.baseline_spread:.0%}",
            f"{r.shadowkv_ms:.2f}", f"{r.shadowkv_spread:.0%}", f"{r.ratio:.2f}",
            "" if r.resident_ms is None else f"{r.resident_ms:.2f}",
        )  # fmt: skip
    return view


def plot(records: list[Record], path: Path, title: str) -> None:
    """Ratio over context, a line per batch and hit rate."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    lines = sorted({(r.batch, r.hit_rate, _kind(r)) for r in records if r.hit_rate is not None})
    several = len({kind for *_, kind in lines}) > 1
    for batch, rate, kind in lines:
        points = [r for r in records if _kind(r) == kind and r.batch == batch and r.hit_rate in (rate, None)]
        points.sort(key=lambda r: r.context)
        label = f"{kind}, " * several + f"batch {batch}, {rate:.0%} hits"
        axes.plot([r.context for r in points], [r.ratio for r in points], marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    contexts = sorted({r.context for r in records})
    axes.set_xticks(contexts, [f"{context // 1024}K" for context in contexts])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("time of the stock backend / time of shadowkv")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if lines:  # the first sizes may all be dense
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--hit-rates", type=hit_rate, nargs="+", default=[0.0, 0.6, 0.85, 1.0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on the CPU")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least, per size and hit rate")
    parser.add_argument("--json", type=Path, help="where the records go")
    parser.add_argument("--plot", type=Path, help="where a PNG goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    records: list[Record] = []
    sizes = [(context, batch) for batch in arguments.batches for context in arguments.contexts]
    about = machine("bench_decode", arguments.device)
    title = f"{arguments.shape}, attention layer of one decode step, bf16, {about['device']}"
    for context, batch in track(sizes, "sizes", console):
        if memory := missing_room(arguments.shape, context, batch, arguments.device):
            console.print(f"{context:,} tokens, batch {batch}: left out, they would not fit {memory} memory.")
            continue
        records += compare(arguments.shape, context, batch, arguments.hit_rates, arguments.device, arguments.seconds)
        # After every size, for the next one may be cut off.
        if arguments.json:
            content = {"machine": about, "growth": growth(records), "records": [asdict(r) for r in records]}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        if arguments.plot:
            plot(records, arguments.plot, title)
    console.print(table(records, title))
    console.print("\n".join(growth(records)))


if __name__ == "__main__":
    main()
    sys.exit(0)
