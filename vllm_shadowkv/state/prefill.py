"""Prefill over sealed context: whole blocks are expanded tile by tile and merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from vllm_shadowkv import ops
from vllm_shadowkv.state.layer import LayerMemory
from vllm_shadowkv.state.side_stream import side_stream

TILE_BLOCKS = 4
"""Sealed blocks expanded at once; bounds the workspace."""
TILES = 2
"""Tiles that exist at a time on CUDA: one is attended to while the next one's values come over the link."""


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

    def finish(self, merged: Partial, sinks: Tensor | None) -> Tensor:
        """The output over all keys, and over sinks (`LayerMemory.sinks`)."""


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
    tiles = _SealedTiles(memory, block_row, exact_start)
    merged = attention.attend_exact(memory, query, exact_row, exact_start, seq_len, scale)
    for keys, values in tiles:
        merged = attention.merge(merged, attention.attend_all(query, keys, values, scale))
    output.copy_(attention.finish(merged, memory.sinks))


class _SealedTiles:
    """K and V of tokens `[0, end)` in tiles of whole blocks, each `[tokens, Hkv, D]`, valid until the next one.

    On CUDA a side stream expands, one tile ahead of the current stream, beginning when this is made.
    """

    def __init__(self, memory: LayerMemory, block_row: Tensor, end: int) -> None:
        layout, device = memory.layout, memory.pages.device
        self._memory, self._device = memory, device
        num_blocks = end // layout.block_size
        self._blocks = block_row[:num_blocks].split(TILE_BLOCKS) if num_blocks else ()
        self._side = side_stream(device)
        shape = (
            TILES if self._side else 1,
            min(num_blocks, TILE_BLOCKS),
            layout.block_size,
            layout.num_kv_heads,
            layout.head_size,
        )
        self._keys = torch.empty(shape, dtype=layout.dtype, device=device)
        self._values = torch.empty_like(self._keys)
        if self._side:
            self._expand_ahead(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, blocks in enumerate(self._blocks):
            if self._side:
                torch.cuda.current_stream(self._device).wait_stream(self._side)
                self._expand_ahead(number + 1)
            else:
                self._expand(number)
            keys, values = (tiles[number % len(tiles)][: len(blocks)] for tiles in (self._keys, self._values))
            yield keys.flatten(0, 1), values.flatten(0, 1)

    def _expand_ahead(self, number: int) -> None:
        """Expands a tile, if there is one, behind all that the current stream has been given up to now.

        That is what sealed the blocks, and the attention over the tile whose place it takes. In the end the current
        stream has waited for every tile, so what it is given later may overwrite pages and reuse this memory.
        """
        if number < len(self._blocks):
            assert self._side is not None
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                self._expand(number)

    def _expand(self, number: int) -> None:
        memory, blocks = self._memory, self._blocks[number]
        first = number * TILE_BLOCKS
        positions = torch.arange(first, first + len(blocks), dtype=torch.int32, device=self._device)
        ops.expand_blocks(
            blocks,
            positions * memory.layout.block_size,
            memory.pages,
            memory.host_pool,
            memory.cos_sin,
            memory.rotary.is_neox,
            memory.layout,
            self._keys[number % len(self._keys)][: len(blocks)],
            self._values[number % len(self._values)][: len(blocks)],
        )
