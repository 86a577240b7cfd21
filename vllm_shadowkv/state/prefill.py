"""Prefill over sealed context: whole blocks are expanded tile by tile and merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from vllm_shadowkv import ops
from vllm_shadowkv.state.layer import LayerMemory

TILE_BLOCKS = 4
"""Sealed blocks expanded at once; bounds the workspace."""


Partial = tuple[Tensor, Tensor]
"""Attention over a part of the keys: output `[T, Hq, D]` and log-sum-exp, as `ExactAttention` gives them."""


class ExactAttention(Protocol):
    """Attention over keys that are there, which the platform's library computes; outputs are unfinished."""

    def attend_exact(
        self, memory: LayerMemory, query: Tensor, exact_row: Tensor, start: int, end: int, scale: float
    ) -> Partial:
        """Causal attention of the newest T of `end` tokens over tokens `[start, end)` in exact pages.

        Args:
            memory: the layer.
            query: float `[T, Hq, D]`.
            exact_row: int32 `[max_pages]`.
            start: a multiple of the block size, at most `end - T`.
            end: tokens of the request, the new ones included.
            scale: of the logits.
        """

    def attend_all(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
        """Attention of every query over all of `keys` and `values` `[S, Hkv, D]`."""

    def merge(self, one: Partial, other: Partial) -> Partial:
        """Attention over the union of two disjoint sets of keys."""


def attend_prefill(
    memory: LayerMemory,
    attention: ExactAttention,
    query: Tensor,
    block_row: Tensor,
    exact_row: Tensor,
    exact_start: int,
    seq_len: int,
    scale: float,
    output: Tensor,
) -> None:
    """Causal attention of one request's new tokens over its sealed blocks and its exact pages.

    Args:
        memory: the layer.
        attention: the platform's.
        query: float `[T, Hq, D]`, post-RoPE, the newest T of `seq_len` tokens.
        block_row: int32 `[max_blocks]`, the request's shadow blocks.
        exact_row: int32 `[max_pages]`, its exact pages.
        exact_start: tokens below are read from sealed blocks; a multiple of the block size.
        seq_len: tokens of the request, the new ones included and written to exact pages.
        scale: of the logits.
        output: float `[T, Hq, D]`, written.
    """
    merged = attention.attend_exact(memory, query, exact_row, exact_start, seq_len, scale)
    for keys, values in _sealed_tiles(memory, block_row, exact_start):
        merged = attention.merge(merged, attention.attend_all(query, keys, values, scale))
    output.copy_(merged[0])


def _sealed_tiles(memory: LayerMemory, block_row: Tensor, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    """K and V of tokens `[0, end)` in tiles of whole blocks, each `[tokens, Hkv, D]`; a tile overwrites the last."""
    layout = memory.layout
    num_blocks = end // layout.block_size
    shape = (min(num_blocks, TILE_BLOCKS), layout.block_size, layout.num_kv_heads, layout.head_size)
    keys = torch.empty(shape, dtype=layout.dtype, device=memory.pages.device)
    values = torch.empty_like(keys)
    for first in range(0, num_blocks, TILE_BLOCKS):
        blocks = block_row[first : min(first + TILE_BLOCKS, num_blocks)]
        positions = (
            torch.arange(first, first + len(blocks), dtype=torch.int32, device=blocks.device) * layout.block_size
        )
        count = len(blocks)
        ops.expand_blocks(
            blocks,
            positions,
            memory.pages,
            memory.host_pool,
            memory.cos_sin,
            memory.rotary.is_neox,
            layout,
            keys[:count],
            values[:count],
        )
        yield keys[:count].flatten(0, 1), values[:count].flatten(0, 1)
