"""`explain`: every setting, its value, and where it came from: the default, the user, or the model and the pool."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from vllm_shadowkv.cli import arguments
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.state.capacity import Capacity
from vllm_shadowkv.state.host_memory import GIB

DERIVED = {
    "rank": "what fits a page",
    "prefill_exact_tokens": "at most half of the pool",
    "host_memory_gib": "what the pool's blocks need",
}
"""Settings whose default is derived from the model and the pool, and how."""


@dataclass(frozen=True)
class Explained:
    """One setting: its value as text, and where it came from."""

    key: str
    value: str
    source: str


def run(given: argparse.Namespace) -> int:
    """Prints the settings; returns the exit code."""
    config = arguments.settings(given)
    pool, num_blocks = None, None
    if given.model:
        pool = arguments.capacity(given, config, arguments.model(given))
        if given.kv_cache_gib:
            num_blocks, _ = arguments.num_blocks(given, config, pool)
            pool = pool.resolve(num_blocks)
    table = Table(title="shadowkv settings", title_justify="left")
    for column in ("key", "value", "from"):
        table.add_column(column)
    ranks = given.tensor_parallel_size * given.pipeline_parallel_size
    for line in explain(config, pool, num_blocks, ranks):
        table.add_row(line.key, line.value, line.source)
    console = Console()
    console.print(table)
    if not given.model:
        console.print("Name a model's config.json to see what is derived from it, and --kv-cache-gib for the pool.")
    elif num_blocks is None:
        console.print("Give --kv-cache-gib to see what is derived from the pool.")
    return 0


def explain(config: ShadowKVConfig, pool: Capacity | None, num_blocks: int | None, ranks: int) -> list[Explained]:
    """Explains every setting.

    Args:
        config: the settings.
        pool: the model's, resolved if `num_blocks` is known; None: model not known.
        num_blocks: of the pool; None: not known.
        ranks: on the machine.

    Returns:
        A line per field of `ShadowKVConfig`, in their order.
    """
    derived: dict[str, str] = {}
    if pool is not None:
        derived["rank"] = str(pool.layout.rank) if pool.layout.rank else "none: keys are exact"
    if pool is not None and num_blocks is not None:
        derived["prefill_exact_tokens"] = str(pool.boundary.prefill_exact_tokens)
        derived["host_memory_gib"] = f"{ranks * num_blocks * pool.host_bytes / GIB:.2f}"
    lines = []
    for key in ShadowKVConfig.model_fields:
        value, is_given = getattr(config, key), key in config.model_fields_set
        source = "given" if is_given else "default"
        if key == "rank" and value is not None and derived.get(key, str(value)) != str(value):
            value, source = derived[key], f"given {value}; this is what fits a page"
        elif value is None:
            value, source = derived.get(key, "not known yet"), f"derived: {DERIVED[key]}"
        lines.append(Explained(key, str(value), source))
    return lines
