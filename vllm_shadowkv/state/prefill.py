"""Prefill over sealed context: whole blocks are expanded tile by tile and merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vllm_shadowkv import ops
from vllm_shadowkv.state.layer import LayerMemory

TILE_BLOCKS = 4
"""Sealed blocks expanded at once; bounds the workspace."""


def attend_prefill(
    memory: LayerMemory,
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
        query: float `[T, Hq, D]`, post-RoPE, the newest T of `seq_len` tokens.
        block_row: int32 `[max_blocks]`, the request's shadow blocks.
        exact_row: int32 `[max_pages]`, its exact pages.
        exact_start: tokens below are read from sealed blocks; a multiple of the block size.
        seq_len: tokens of the request, the new ones included and written to exact pages.
        scale: of the logits.
        output: float `[T, Hq, D]`, written.
    """
    computed = seq_len - len(query)
    keys, values = _exact_tokens(memory, exact_row, exact_start, seq_len)
    context = computed - exact_start
    merged = _flash(query, keys[context:], values[context:], scale, causal=True)
    if context:
        merged = _merge(merged, _flash(query, keys[:context], values[:context], scale, causal=False))
    for tile_keys, tile_values in _sealed_tiles(memory, block_row, exact_start):
        merged = _merge(merged, _flash(query, tile_keys, tile_values, scale, causal=False))
    output.copy_(merged[0])


def _exact_tokens(memory: LayerMemory, exact_row: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """K and V of tokens `[start, end)`, each `[end - start, Hkv, D]`; `start` is a multiple of a page's tokens."""
    size = memory.layout.exact_tokens
    pages = exact_row[start // size : -(-end // size)].long()
    # Gathering keeps the views' strides, and the flash kernel below takes the last dimension to be contiguous.
    keys, values = (
        view[pages].transpose(1, 2).flatten(0, 1)[: end - start].contiguous()
        for view in memory.layout.exact_views(memory.exact_pages)
    )
    return keys, values


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


def _flash(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention for the CPU, which also gives the log-sum-exp.

    Args:
        query: `[T, Hq, D]`.
        keys, values: `[S, Hkv, D]`; S = T if causal.
        scale: of the logits.
        causal: token i sees keys up to i.

    Returns:
        Output fp32 `[T, Hq, D]` and log-sum-exp fp32 `[T, Hq]`.
    """
    tokens, num_heads, size = query.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    if causal:  # is_causal numbers the queries, so heads of a group cannot be laid one after the other
        q = query.transpose(0, 1)[None]
        k, v = (x.transpose(0, 1).repeat_interleave(group, 0)[None] for x in (keys, values))
    else:
        q = query.view(tokens, num_kv_heads, group, size).permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, size)
        k, v = (x.transpose(0, 1)[None] for x in (keys, values))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attention(q, k, v, 0.0, causal, scale=scale)
    out = out[0].reshape(num_heads, tokens, size).transpose(0, 1).float()
    return out, lse[0].reshape(num_heads, tokens).transpose(0, 1).float()


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys."""
    lse = torch.logaddexp(one[1], other[1])
    out = one[0] * (one[1] - lse).exp().unsqueeze(-1) + other[0] * (other[1] - lse).exp().unsqueeze(-1)
    return out, lse
