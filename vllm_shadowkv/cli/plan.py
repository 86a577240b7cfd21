"""`plan`: prints what a pool of some bytes holds, and draws it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from vllm_shadowkv.cli.plot import draw
from vllm_shadowkv.cli.pool_plan import BACKENDS, Plan, make
from vllm_shadowkv.cli.step_bytes import Rates, of_request
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.state.host_memory import GIB

DEFAULT = ShadowKVConfig.from_vllm({})
BAR = 40
"""Columns of the longest bar."""
LITTLE = 4
"""Times less device memory for a long request, below which it is said of a model with layers beside ours that there is
little to gain; where all layers see the whole context it is six at 122,880 tokens (test_capacity.py)."""
SLOT_BUDGETS = (1, 2, 3, 4)
"""Multiples of the budget whose effect on the number of requests is shown."""


def run(given: argparse.Namespace) -> int:
    """Prints the plan, and draws it if asked; returns the exit code."""
    plan = make(given)
    show(plan, Console(), Rates.of(given))
    if given.plot:
        draw(plan, given.plot)
        print(f"The picture is in {given.plot}.")
    return 0


def show(plan: Plan, console: Console, rates: Rates | None) -> None:
    """Prints the plan, and with rates a bound on tokens a second."""
    console.print(_page(plan))
    console.print(_pool(plan))
    for sentence in _others(plan):
        console.print(sentence)
    console.print(_requests(plan))
    if plan.pool.others and plan.gain < LITTLE:
        console.print(_little(plan))
    for backend in ("bf16", "fp8"):
        even = plan.break_even(backend)
        where = f"from {even:,} tokens on" if even else "at no context length"
        console.print(f"At least as many requests as {_stock_name(plan, backend)}: {where}.")
    console.print()
    console.print(_slots(plan))
    if rates:
        console.print()
        console.print(_bound(plan, rates))
        console.print(_assumed(plan, rates))
    _bars(plan, console.print)


def _facts(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def _page(plan: Plan) -> Table:
    layout, shape = plan.pool.layout, plan.shape
    keys = f"rank {layout.rank} of {min(layout.width, layout.block_size)}" if layout.rank else "exact"
    return _facts(
        "One page",
        [
            ("layers, KV heads, head size", f"{shape.num_layers}, {shape.num_kv_heads}, {shape.head_size} (a rank's)"),
            ("bytes", f"{layout.page_bytes:,} in {str(layout.dtype).removeprefix('torch.')}"),
            ("holds", f"{layout.block_size} tokens sealed, or {layout.exact_tokens} exact"),
            ("keys of a sealed block", keys),
            ("slots", f"{layout.slots_per_page} chunks a page, {plan.pool.slot_pages} pages a request"),
        ],
    )


def _pool(plan: Plan) -> Table:
    pool, blocks = plan.pool, plan.num_blocks
    bound = "host memory" if plan.host_bound else "device memory"
    return _facts(
        "\nThe pool of a rank",
        [
            ("blocks", f"{blocks:,}, bounded by {bound}"),
            ("tokens", f"{blocks * pool.layout.block_size:,} sealed, or {blocks * pool.layout.exact_tokens:,} exact"),
            ("device", f"{blocks * pool.block_bytes / GIB:.1f} GiB"),
            ("host, all ranks", f"{plan.host_pool_bytes / GIB:.1f} GiB"),
            ("prompts are exact over", f"their newest {pool.boundary.prefill_exact_tokens:,} tokens"),
            ("least that starts", f"{plan.min_blocks:,} blocks, for one of {pool.boundary.max_model_len:,} tokens\n"),
        ],
    )


def _others(plan: Plan) -> list[str]:
    """What stands beside the layers that are ours, and what it holds of the longest request while that decodes."""
    pool, said = plan.pool, []
    for other in pool.others:
        what = {"window": "a window of {:,} tokens", "chunk": "chunks of {:,} tokens", "state": "a state of {:,} bytes"}
        pages = other.held(
            pool.num_layers, pool.layout.exact_tokens, plan.contexts[-1], pool.boundary.steps_in_flight + 1
        )
        said.append(
            f"Beside them are {other.count} layers with {what[other.kind].format(other.size)}, which hold "
            f"{pages:,} blocks of a request, however long.\n"
        )
    return said


def _little(plan: Plan) -> str:
    """That there is little to gain, and why."""
    tokens, pool = plan.contexts[-1], plan.pool
    beside = sum(other.count for other in pool.others if other.kind != "state")
    changed = plan.config.block_size > DEFAULT.block_size or plan.config.compression < DEFAULT.compression
    if changed and any(other.kind == "state" for other in pool.others):
        why = f"pages of {plan.config.block_size:,} tokens, which must hold a state, are coarse"
    elif beside > pool.num_layers:
        why = f"only {pool.num_layers} of {pool.num_layers + beside} layers grow with the context"
    else:
        why = "contexts are short"
    ours = pool.peak_decoding_pages(tokens) * pool.block_bytes
    return (
        f"There is little to gain, because {why}: a request of {tokens:,} tokens takes {ours / GIB:.2f} GiB of device "
        f"memory, {plan.stock_bytes(tokens) / GIB:.2f} GiB with vLLM's own backend."
    )


def _requests(plan: Plan) -> Table:
    table = Table(title="Requests that decode side by side", title_justify="left")
    for column in ("context", _stock_name(plan, "bf16"), "fp8", "shadowkv", "ratio", "device each", "host each"):
        table.add_column(column, justify="right")
    for tokens in plan.contexts:
        counts = [plan.requests(backend, tokens) for backend in BACKENDS]
        device = plan.pool.peak_decoding_pages(tokens) * plan.pool.block_bytes / GIB
        values = tokens // plan.pool.layout.block_size * plan.pool.host_bytes / GIB
        ratio = f"{counts[2] / counts[0]:.1f}" if counts[0] else "-"
        cells = [f"{tokens:,}", *map(str, counts), ratio, f"{device:.2f} GiB", f"{values:.2f} GiB"]
        table.add_row(*cells)
    return table


def _slots(plan: Plan) -> Table:
    """More slots keep more chunks from step to step, and leave room for fewer requests."""
    config, pool = plan.config, plan.pool
    least = config.forced_chunks + config.budget_chunks
    choices = {least, config.slot_chunks, *(factor * config.budget_chunks for factor in SLOT_BUDGETS)}
    table = Table(title="Requests by slot_chunks; hits are those of SmolLM2", title_justify="left")
    for column in ("slots", "hits", "MiB/token"):
        table.add_column(column, justify="right", no_wrap=True)
    for tokens in plan.contexts:
        table.add_column(f"{tokens / 1024:g}K", justify="right")
    for choice in sorted(choice for choice in choices if choice >= least):
        other = plan.with_slots(choice)
        mark = "now " if choice == config.slot_chunks else ""
        row = of_request(other, plan.contexts[-1])
        counts = (str(other.requests("shadowkv", tokens)) for tokens in plan.contexts)
        table.add_row(f"{mark}{choice}", f"{row.hits:.0%}", f"{pool.num_layers * row.link / 2**20:.1f}", *counts)
    return table


def _bound(plan: Plan, rates: Rates) -> Table:
    """No more tokens a second than bytes allow, by context and backend."""
    table = Table(title="At most tokens/s, of all requests that fit", title_justify="left")
    for column in ("context", *(_stock_name(plan, name) for name in BACKENDS), "bound by", "hits", "MiB/token"):
        table.add_column(column, justify="right", no_wrap=True)
    for tokens in plan.contexts:
        row = of_request(plan, tokens)
        most = [rates.most_tokens(plan, backend, tokens) for backend in BACKENDS]
        cells = [f"{tokens:,}", *(f"{rate:,.0f}" for rate, _ in most), most[-1][1]]
        table.add_row(
            *cells, f"{row.hits:.0%}" if row.selected else "-", f"{plan.pool.num_layers * row.link / 2**20:.1f}"
        )
    return table


def _assumed(plan: Plan, rates: Rates) -> str:
    """What the bound takes for granted."""
    link = f"{rates.link / 1e9:g} GB/s of link beside them" if rates.link else "values of the host pool from it, too"
    weights = f"{rates.weight_bytes / GIB:g} GiB of weights" if rates.weight_bytes else "no weights (--weights-gib)"
    beside = "; layers beside ours are not counted" if plan.pool.others else ""
    return (
        f"Assumed: a step takes as long as its bytes alone, {rates.memory / 1e9:g} GB/s of memory and {link}; it reads "
        f"{weights}; a rank's requests decode together; hits are those of SmolLM2, and nothing is resident{beside}."
    )


def _bars(plan: Plan, write: Callable[[str], None]) -> None:
    write("\nRequests; the longest bar of a context is its most")
    for tokens in plan.contexts:
        counts = [plan.requests(backend, tokens) for backend in BACKENDS]
        for backend, colour, count in zip(BACKENDS, ("blue", "cyan", "green"), counts, strict=True):
            bar = "█" * round(BAR * count / max(*counts, 1))
            label = f"{tokens:,}" if backend == BACKENDS[0] else ""
            write(f"{label:>10} {_stock_name(plan, backend):>9} [{colour}]{bar}[/] {count}")


def _stock_name(plan: Plan, backend: str) -> str:
    """`bf16` by the name of the dtype that is meant."""
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return names[str(plan.shape.dtype).removeprefix("torch.")] if backend == "bf16" else backend
