"""Time, bytes and share of the measured limit of every op: `python -m benchmarks.bench_ops --device cpu`.

Pages hold synthetic keys, so no model runs and no prefill is needed. A share is the bytes that an op must move, over
its time, over the bandwidth of a plain copy in the same run: of the device's memory, or of pinned host memory where the
host pool is what an op waits for, in the op's direction. On a GPU replays of a CUDA graph are timed, each after a sweep
of the caches. On a CPU, whose caches hold much of what a small size moves, a share may exceed 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.progress import track
from benchmarks.timing import captured, once, sweeper
from benchmarks.workload import SHAPES, Workload, hit_rate
from vllm_shadowkv import ops
from vllm_shadowkv.cli.step_bytes import of_row

OPEN_TOKENS = 512
SLOWER = 0.15


@dataclass(frozen=True)
class Record:
    """One measurement. `limit` names the copy that `share` is relative to; `gigabytes` are those of one call."""

    op: str
    shape: str
    context: int
    batch: int
    hit_rate: float
    milliseconds: float
    spread: float
    gigabytes: float
    limit: str
    share: float


def measure(
    call: Callable[[], object], device: str, before: Callable[[], object] | None = None, seconds: float = 1.0
) -> tuple[float, float]:
    """Median milliseconds of a call, and the spread of its quartiles relative to it. `before` is not timed."""
    call()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 5 or (time.monotonic() < end and len(times) < 200):
        if before:
            before()
        times.append(once(call, device))
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def bandwidths(device: str) -> dict[str, float]:
    """GB/s of plain copies: of the device's memory (read and written bytes), from pinned host memory and back to it."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    before = sweeper(device) if device == "cuda" else None

    def rate(copied_bytes: int, call: Callable[[], object]) -> float:
        return copied_bytes / measure(call, device, before)[0] / 1e6

    rates = {"copy": rate(2 * source.numel(), lambda: target.copy_(source))}
    if device == "cuda":
        host = torch.empty(source.numel(), dtype=torch.uint8).fill_(1).pin_memory()
        rates["link"] = rate(host.numel(), lambda: target.copy_(host, non_blocking=True))
        rates["link back"] = rate(host.numel(), lambda: host.copy_(target, non_blocking=True))
    return rates


def run(
    shape: str, context: int, batch: int, hit_rates: list[float], device: str, limits: dict[str, float]
) -> Iterator[Record]:
    """All ops at one size."""
    work = Workload(shape, context, OPEN_TOKENS, batch, device, torch.bfloat16)
    layout, memory, rows, workspace = work.layout, work.memory, work.rows, work.workspace
    row, heads = of_row(work.config, layout, rows.block_table.shape[1], OPEN_TOKENS), batch * layout.num_kv_heads
    token_bytes = 2 * layout.head_size * 2
    factors = layout.rank * layout.head_size + layout.chunk_size * (layout.leading_rank + layout.tail_bytes)
    sweep = sweeper(device) if device == "cuda" else None

    def record(op: str, call: Callable[[], None], moved: float, limit: str = "copy", rate: float = 0.0) -> Record:
        limit = limit if limit in limits else "copy"
        if device == "cuda":  # called one by one, short kernels would show the time of their launches
            call = captured(call)
        milliseconds, spread = measure(call, device, sweep)
        share = moved / milliseconds / 1e6 / limits[limit]
        return Record(op, shape, context, batch, rate, milliseconds, spread, moved / 1e9, limit, share)

    def plan() -> None:
        work.state.start_step()
        workspace.plan(memory, work.state, rows, work.slot_counts)

    yield record(
        "select_chunks",
        partial(workspace.select, memory, rows, work.query, work.scale),
        batch * row.landmarks,
    )
    yield record("plan_slots", plan, heads * (work.config.slot_chunks * 16 + 8 * workspace.columns))
    for rate in hit_rates:
        work.force_hits(rate)
        plan()
        misses = workspace.misses(batch)
        values = misses * layout.value_chunk_bytes
        rebuilt = misses * (factors + layout.chunk_size * token_bytes)
        fill = partial(workspace.fill, memory, work.state, rows, work.slot_counts)
        yield record("fill_slots", fill, values if device == "cuda" else values + rebuilt, "link", rate)
    plan()
    attend = partial(workspace.attend_tokens, memory, rows, work.query, work.scale, work.output)
    yield record("sparse_attention", attend, batch * row.attended)

    blocks = rows.block_table[0, :4].contiguous()
    positions = torch.arange(len(blocks), dtype=torch.int32, device=device) * layout.block_size
    wide = (len(blocks), layout.block_size, layout.num_kv_heads, layout.head_size)
    keys, values = (torch.empty(wide, dtype=layout.dtype, device=device) for _ in range(2))
    bytes_of_blocks = len(blocks) * layout.block_size * layout.num_kv_heads * token_bytes
    yield record(
        "expand_blocks",
        lambda: ops.expand_blocks(
            blocks, positions, memory.pages, memory.host_pool, memory.cos_sin, True, layout, keys, values
        ),
        bytes_of_blocks / 2 if device == "cuda" else 1.5 * bytes_of_blocks,
        "link",
    )
    spare = rows.slot_table[:1, :1].flatten().contiguous()
    parts = [torch.ones(layout.width, device=keys.device)] + [
        torch.randn(1, *size, device=device)
        for size in ((layout.width,), (layout.block_size, layout.rank), (layout.rank, layout.width))
    ]
    keys.normal_()
    yield record(
        "pack_block",
        lambda: ops.pack_block(spare, keys[:1], *parts, memory.pages, layout),
        bytes_of_blocks / len(blocks) / 2 + 4 * sum(part.numel() for part in parts) + layout.page_bytes,
    )
    exact_ids = rows.block_table[:1, : layout.block_size // layout.exact_tokens].contiguous()
    _, exact_values = layout.exact_views(memory.pages)
    yield record(
        "store_values",
        lambda: ops.store_values(spare, exact_ids, exact_values, memory.pages, memory.host_pool, layout),
        bytes_of_blocks / len(blocks) * (0.5 if device == "cuda" else 1),
        "link back",
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--hit-rates", type=hit_rate, nargs="+", default=[0.0, 0.6, 0.85])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on the CPU")
    parser.add_argument("--json", type=Path, help="where the records go")
    parser.add_argument(
        "--against",
        type=Path,
        help=f"records of an earlier run on this machine; more than {SLOWER:.0%} slower is an error",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    records: list[Record] = []
    sizes = [(context, batch) for context in arguments.contexts for batch in arguments.batches]
    limits = bandwidths(arguments.device)
    about = machine("bench_ops", arguments.device) | {"gigabytes_per_second": limits}
    for context, batch in track(sizes, "sizes", console):
        for record in run(arguments.shape, context, batch, arguments.hit_rates, arguments.device, limits):
            records.append(record)
            if arguments.json:  # after every op, for the next one may be cut off
                content = {"machine": about, "records": [asdict(r) for r in records]}
                arguments.json.write_text(json.dumps(content, indent=1))
    table = Table(title=f"{arguments.shape}, one layer, bf16, {about['device']}", title_justify="left")
    for name in ("op", "context", "batch", "hits", "ms", "spread", "MB", "share of"):
        table.add_column(name, justify="left" if name == "op" else "right")
    for r in records:
        table.add_row(
            r.op, f"{r.context:,}", str(r.batch), f"{r.hit_rate:.0%}" if r.op == "fill_slots" else "",
            f"{r.milliseconds:.3f}", f"{r.spread:.0%}", f"{1000 * r.gigabytes:.1f}", f"{r.share:.0%} {r.limit}",
        )  # fmt: skip
    console.print(table)
    console.print("Copies: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in limits.items()))
    if arguments.against:
        slower = regressions(records, json.loads(arguments.against.read_text())["records"])
        for sentence in slower:
            console.print(sentence, style="red")
        sys.exit(1 if slower else 0)


def regressions(records: list[Record], earlier: list[dict[str, Any]]) -> list[str]:
    """Sentences about ops that take more than `SLOWER` longer than in an earlier run of the same sizes."""
    found = []
    for r in records:
        same = (r.op, r.shape, r.context, r.batch, r.hit_rate)
        for before in earlier:
            if tuple(before[name] for name in ("op", "shape", "context", "batch", "hit_rate")) != same:
                continue
            ratio = r.milliseconds / before["milliseconds"]
            if ratio > 1 + SLOWER:
                found.append(f"{r.op} at {r.context:,} tokens, batch {r.batch}: {ratio:.2f} times the earlier time.")
    return found


if __name__ == "__main__":
    main()
