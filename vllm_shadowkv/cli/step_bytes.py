"""Bytes that a decode step moves. `plan` bounds a rate by them, `benchmarks/step_model` predicts times from them."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

from vllm_shadowkv.cli.pool_plan import Plan
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.state.host_memory import GIB

HITS = {1.0: 0.78, 1.5: 0.89, 2.0: 0.93, 3.0: 0.96, 4.0: 0.97}
"""Share of a step's chunks that slots still hold, by how many steps' chunks they have room for: of SmolLM2 along texts,
at a budget of 3.6 % (`benchmarks/smollm2/slots.py`). Other models and budgets will differ."""


@dataclass(frozen=True)
class RowBytes:
    """What one token of one request moves in one layer.

    Attributes:
        selected: chunks per KV head.
        hits: the share of them that slots hold.
        landmarks: read to select: landmarks, their scales, mean keys and values.
        attended: keys and values of the selected chunks and of the open tokens, read to attend.
        filled: on the device, of chunks that slots do not hold: their coefficients or exact keys read, their keys and
            values written. Bases are not counted, because missed chunks share them.
        link: values of those chunks, out of the host pool.
    """

    selected: int
    hits: float
    landmarks: int
    attended: int
    filled: float
    link: float

    @property
    def device(self) -> float:
        """Bytes of device memory."""
        return self.landmarks + self.attended + self.filled


def of_row(
    config: ShadowKVConfig, layout: PageLayout, sealed: int, open_tokens: int, hits: float | None = None
) -> RowBytes:
    """Bytes of a row over so many sealed blocks and open tokens; hits None: those of `HITS`."""
    heads, tokens = layout.num_kv_heads, layout.chunk_size
    vector = layout.head_size * layout.dtype.itemsize
    wanted = config.budget_chunks + config.forced_chunks + config.num_outlier_chunks * sealed
    selected = min(wanted, config.slot_chunks, sealed * layout.chunks)
    if hits is None:
        hits = 1.0 if sealed * layout.chunks <= config.slot_chunks else expected_hits(config.slot_chunks / selected)
    missed = heads * (1 - hits) * selected
    return RowBytes(
        selected=selected,
        hits=hits,
        landmarks=heads * sealed * (layout.chunks * (layout.landmark_bytes + 4) + 4 * layout.head_size + vector),
        attended=heads * (selected * tokens + open_tokens) * 2 * vector,
        filled=missed
        * tokens
        * ((layout.leading_rank + layout.tail_bytes + 3 if layout.rank else vector) + 2 * vector),
        link=missed * layout.value_chunk_bytes,
    )


def expected_hits(times: float) -> float:
    """`HITS` at slots for the chunks of so many steps, from 1 on; between two that were measured on a line."""
    for (low, less), (high, more) in itertools.pairwise(HITS.items()):
        if times <= high:
            return less + (more - less) * (times - low) / (high - low)
    return max(HITS.values())


def of_request(plan: Plan, tokens: int) -> RowBytes:
    """Bytes of a layer for the token that a context of so many ends with, none of whose sources is resident."""
    start = plan.pool.boundary.exact_start(tokens - 1, prefilling=False)
    return of_row(plan.config, plan.pool.layout, start // plan.pool.layout.block_size, tokens - start)


@dataclass(frozen=True)
class Rates:
    """What a rank has.

    Attributes:
        memory: bytes of device memory a second.
        link: bytes from the host a second; None: the host pool is the same memory.
        weight_bytes: read once in every step.
    """

    memory: float
    link: float | None
    weight_bytes: float

    @classmethod
    def of(cls, given: argparse.Namespace) -> Rates | None:
        """The rates that were given to `plan`; None where no bandwidth was."""
        if given.bandwidth_gbs is None:
            return None
        link = given.link_gbs * 1e9 if given.device == "cuda" else None
        return cls(given.bandwidth_gbs * 1e9, link, given.weights_gib * GIB)

    def most_tokens(self, plan: Plan, backend: str, tokens: int) -> tuple[float, str]:
        """Tokens a second of all requests that fit, and what bounds them: bytes alone, memory and link side by side."""
        requests = plan.requests(backend, tokens)
        device, link = plan.stock_token_bytes(backend) * float(tokens), 0.0
        if backend == "shadowkv":
            row = of_request(plan, tokens)
            device, link = plan.pool.num_layers * row.device, plan.pool.num_layers * row.link
        if self.link is None:
            device, link = device + link, 0.0
        by_memory = (self.weight_bytes + requests * device) / self.memory
        by_link = requests * link / (self.link or 1)
        rate = requests / max(by_memory, by_link) if requests else 0.0
        return rate, "link" if by_link > by_memory else "memory"
