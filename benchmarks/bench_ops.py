"""Time, bytes and share of the measured limit of every op: `python -m benchmarks.bench_ops --device cpu`.

Pages hold synthetic keys, so no model runs and no prefill is needed. A share is the bytes that an op must move, over
its time, over the bandwidth of a plain copy in the same run: of the device's memory, or of pinned host memory where the
host pool is what an op waits for. On a CPU, whose caches hold much of what a small size moves, a share may exceed 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import vllm_shadowkv
from vllm_shadowkv import ops
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import PageLayout, plan_page

SHAPES = {
    "llama-3.1-8b": (32, 8, 128),
    "qwen2.5-7b": (28, 4, 128),
    "glm-4-9b": (32, 2, 128),
    "phi-3-mini": (32, 32, 96),
}
"""Query heads, KV heads, head size."""
OPEN_TOKENS = 512
SCALE = 0.088


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


class Workload:
    """One layer's pages for `batch` requests of `context` tokens, and what a decode step passes from op to op."""

    def __init__(self, shape: str, context: int, batch: int, device: str, dtype: torch.dtype) -> None:
        self.heads, kv_heads, size = SHAPES[shape]
        self.config = ShadowKVConfig()
        self.layout = layout = plan_page(self.config, kv_heads, size, dtype)
        self.device, self.batch = device, batch
        blocks = context // layout.block_size
        slot_pages = -(-self.config.slot_chunks // layout.slots_per_page)
        exact_pages = -(-OPEN_TOKENS // layout.exact_tokens)
        count = 1 + batch * (blocks + slot_pages + exact_pages)
        generator = torch.Generator().manual_seed(0)
        self.pages = _pages(layout, count, generator).to(device)
        pool = torch.randn(count * layout.value_row_bytes // 2, generator=generator, dtype=torch.float32)
        self.host_pool = pool.to(torch.bfloat16).view(torch.uint8).view(count, -1)
        if device == "cuda":
            self.host_pool = self.host_pool.pin_memory()
        ids = (torch.randperm(count - 1, generator=generator) + 1).int()
        sealed, slots, exact = ids.split([batch * blocks, batch * slot_pages, batch * exact_pages])
        self.block_table = sealed.view(batch, blocks).to(device)
        self.slot_table = slots.view(batch, slot_pages).to(device)
        self.exact_table = torch.zeros(batch, blocks * 8 + exact_pages, dtype=torch.int32)
        self.exact_table[:, blocks * 8 :] = exact.view(batch, exact_pages)
        self.exact_table = self.exact_table.to(device)
        for section in ("slot_tags", "slot_used", "slot_epoch"):
            layout.view(self.pages, section)[slots.long().to(device)] = 0
        self.exact_start = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.seq_lens = self.exact_start + OPEN_TOKENS
        self.epochs = torch.ones(count, dtype=torch.int64, device=device)
        self.clock = torch.ones(1, dtype=torch.int64, device=device)
        positions = torch.arange(context + 1024)[:, None] * 500_000.0 ** (-torch.arange(0, size, 2) / size)
        self.cos_sin = torch.cat((positions.cos(), positions.sin()), -1).float().contiguous().to(device)
        self.query = torch.randn(batch, self.heads, size, generator=generator).to(device, dtype)
        self.output = torch.empty_like(self.query)
        self.lse = torch.empty(batch, self.heads, device=device)
        wanted = self.config.budget_chunks + self.config.forced_chunks + self.config.num_outlier_chunks * blocks
        places = batch, kv_heads, min(wanted, self.config.slot_chunks)
        self.chunk_ids, self.slot_ids, self.misses = (
            torch.empty(places, dtype=torch.int32, device=device) for _ in range(3)
        )
        self.num_misses = torch.empty(places[:2], dtype=torch.int32, device=device)
        scratch = max(
            ops.select_chunks_workspace(layout, batch, self.heads, blocks),
            ops.sparse_attention_workspace(layout, batch, self.heads),
        )
        self.scratch = torch.empty(scratch if ops.needs_workspace(torch.device(device)) else 0, device=device)

    def select(self) -> None:
        """Writes `chunk_ids`."""
        ops.select_chunks(
            self.query, self.pages, self.block_table, self.exact_start, self.seq_lens, SCALE,
            self.config.budget_chunks, self.layout, self.chunk_ids, self.scratch,
        )  # fmt: skip

    def plan(self) -> None:
        """Writes `slot_ids` and misses; a second call hits everything."""
        self.clock += 1
        ops.plan_slots(
            self.chunk_ids, self.block_table, self.epochs, self.clock, self.slot_table, self.pages, self.layout,
            self.slot_ids, self.misses, self.num_misses,
        )  # fmt: skip

    def force_hits(self, rate: float) -> int:
        """Makes the misses of a step be this share of its chunks; returns how many."""
        self.plan()
        missed = round((1 - rate) * self.chunk_ids.shape[2])
        places = torch.randperm(self.chunk_ids.shape[2], generator=torch.Generator().manual_seed(1))[:missed].sort()
        self.misses.fill_(-1)
        self.misses[:, :, :missed] = places.values.int().to(self.device)
        self.num_misses.fill_(missed)
        return missed * self.num_misses.numel()

    def fill(self) -> None:
        """Fills the slots of the misses."""
        ops.fill_slots(
            self.chunk_ids, self.slot_ids, self.misses, self.num_misses, self.pages, self.block_table, self.host_pool,
            self.cos_sin, True, self.slot_table, self.pages, self.layout,
        )  # fmt: skip

    def attend(self) -> None:
        """Attends over slots and open tokens."""
        keys, values = self.layout.exact_views(self.pages)
        ops.sparse_attention(
            self.query, self.slot_ids, self.slot_table, self.pages, keys, values, self.exact_table, self.exact_start,
            self.seq_lens, SCALE, self.layout, self.output, self.lse, self.scratch,
        )  # fmt: skip


def _pages(layout: PageLayout, count: int, generator: torch.Generator) -> Tensor:
    """Shadow pages of random factors, read as what they are not where a block is a slot or an exact page."""
    pages = torch.randn(count, layout.page_bytes // 2, generator=generator).to(torch.bfloat16).view(torch.uint8)
    for section in ("coefficients", "basis", "landmarks"):
        view = layout.view(pages, section)
        view.copy_(torch.randint(-127, 128, view.shape, generator=generator, dtype=torch.int8))
    for section in ("coefficient_scales", "basis_scales", "landmark_scales"):
        layout.view(pages, section).fill_(0.01)
    layout.view(pages, "mean").zero_()
    ids = layout.view(pages, "outlier_ids")
    if ids.numel():
        ids.copy_(
            torch.rand(*ids.shape[:2], layout.chunks, generator=generator).argsort(-1)[..., : ids.shape[-1]].int()
        )
        layout.view(pages, "outlier_cosines").uniform_(-1, 1, generator=generator)
    return pages


def measure(call: Callable[[], None], device: str, seconds: float = 1.0) -> tuple[float, float]:
    """Median milliseconds of a call, and the spread of its quartiles relative to it."""
    call()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 5 or (time.monotonic() < end and len(times) < 200):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            started = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - started))
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def bandwidths(device: str) -> dict[str, float]:
    """GB/s of plain copies: of the device's memory (read and written bytes), and from pinned host memory."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    rate = {"copy": 2 * source.numel() / measure(lambda: target.copy_(source), device)[0] / 1e6}
    if device == "cuda":
        host = torch.empty(source.numel(), dtype=torch.uint8).fill_(1).pin_memory()
        rate["link"] = host.numel() / measure(lambda: target.copy_(host, non_blocking=True), device)[0] / 1e6
    return rate


def run(
    shape: str, context: int, batch: int, hit_rates: list[float], device: str
) -> tuple[list[Record], dict[str, float]]:
    """All ops at one size."""
    limits = bandwidths(device)
    work = Workload(shape, context, batch, device, torch.bfloat16)
    layout = work.layout
    heads, chunks = batch * layout.num_kv_heads, work.block_table.shape[1] * layout.chunks
    token_bytes = 2 * layout.head_size * 2
    factors = layout.rank * (layout.head_size + layout.chunk_size)
    records = []

    def add(op: str, call: Callable[[], None], moved: float, limit: str = "copy", rate: float = 0.0) -> None:
        limit = limit if limit in limits else "copy"
        milliseconds, spread = measure(call, device)
        share = moved / milliseconds / 1e6 / limits[limit]
        records.append(Record(op, shape, context, batch, rate, milliseconds, spread, moved / 1e9, limit, share))

    add("select_chunks", work.select, heads * chunks * (layout.head_size + 4))
    add("plan_slots", work.plan, heads * (work.config.slot_chunks * 16 + 8 * work.chunk_ids.shape[2]))
    for rate in hit_rates:
        misses = work.force_hits(rate)
        values = misses * layout.value_record_bytes
        rebuilt = misses * (factors + layout.chunk_size * token_bytes)
        add("fill_slots", work.fill, values if device == "cuda" else values + rebuilt, "link", rate)
    work.plan()
    tokens = work.chunk_ids.shape[2] * layout.chunk_size + OPEN_TOKENS
    add("sparse_attention", work.attend, heads * tokens * token_bytes)

    blocks = work.block_table[0, :4].contiguous()
    positions = torch.arange(len(blocks), dtype=torch.int32, device=device) * layout.block_size
    wide = (len(blocks), layout.block_size, layout.num_kv_heads, layout.head_size)
    keys, values = (torch.empty(wide, dtype=layout.dtype, device=device) for _ in range(2))
    bytes_of_blocks = len(blocks) * layout.block_size * layout.num_kv_heads * token_bytes
    add(
        "expand_blocks",
        lambda: ops.expand_blocks(
            blocks, positions, work.pages, work.host_pool, work.cos_sin, True, layout, keys, values
        ),
        bytes_of_blocks / 2 if device == "cuda" else 1.5 * bytes_of_blocks,
        "link",
    )
    spare = work.slot_table[:1, :1].flatten().contiguous()
    parts = [
        torch.randn(1, *size, device=device)
        for size in ((layout.width,), (layout.block_size, layout.rank), (layout.rank, layout.width))
    ]
    keys.normal_()
    add(
        "pack_block",
        lambda: ops.pack_block(spare, keys[:1], *parts, work.pages, layout),
        bytes_of_blocks / len(blocks) / 2 + 4 * sum(part.numel() for part in parts) + layout.page_bytes,
    )
    exact_ids = work.block_table[:1, : layout.block_size // layout.exact_tokens].contiguous()
    _, exact_values = layout.exact_views(work.pages)
    add(
        "store_values",
        lambda: ops.store_values(spare, exact_ids, exact_values, work.host_pool, layout),
        bytes_of_blocks / len(blocks) * (0.5 if device == "cuda" else 1),
        "link",
    )
    return records, limits


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--hit-rates", type=float, nargs="+", default=[0.0, 0.6, 0.85])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on the CPU")
    parser.add_argument("--json", type=Path, help="where the records go")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    records: list[Record] = []
    sizes = [(context, batch) for context in arguments.contexts for batch in arguments.batches]
    for context, batch in track(sizes, "sizes", console=console):
        found, limits = run(arguments.shape, context, batch, arguments.hit_rates, arguments.device)
        records += found
    cuda = arguments.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()}, {_cpu_isa()}"
    machine = {
        "command": "python -m benchmarks.bench_ops " + " ".join(sys.argv[1:]),
        "device": where,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "vllm_shadowkv": vllm_shadowkv.__version__,
        "gigabytes_per_second": limits,
    }
    table = Table(title=f"{arguments.shape}, one layer, bf16, {machine['device']}", title_justify="left")
    for name in ("op", "context", "batch", "hits", "ms", "spread", "MB", "share of"):
        table.add_column(name, justify="left" if name == "op" else "right")
    for r in records:
        table.add_row(
            r.op, f"{r.context:,}", str(r.batch), f"{r.hit_rate:.0%}" if r.op == "fill_slots" else "",
            f"{r.milliseconds:.3f}", f"{r.spread:.0%}", f"{1000 * r.gigabytes:.1f}", f"{r.share:.0%} {r.limit}",
        )  # fmt: skip
    console.print(table)
    console.print("Copies: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in limits.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "records": [asdict(r) for r in records]}, indent=1))


def _cpu_isa() -> str:
    return str(torch.ops.shadowkv.cpu_isa())


if __name__ == "__main__":
    main()
