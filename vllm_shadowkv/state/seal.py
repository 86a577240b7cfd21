"""Sealing: complete blocks turn from exact pages into one shadow page and host values, in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_shadowkv import ops
from vllm_shadowkv.rotary import undo
from vllm_shadowkv.state.layer import LayerMemory
from vllm_shadowkv.state.low_rank import LowRank, factorise, mix
from vllm_shadowkv.state.side_stream import side_stream

BLOCKS_AT_ONCE = 8
"""Blocks, each of one layer, that are factorised together: eight take as many launches as one, hundreds. It bounds the
fp32 workspace: a block of the Llama-3.1-8B shape takes 4 MiB of keys and 4 MiB of Gram matrix."""


def seal_blocks(memories: Sequence[LayerMemory], block_ids: Tensor, exact_ids: Tensor, first_positions: Tensor) -> None:
    """Seals blocks in all of these layers.

    Args:
        memories: the layers' pages and host pools, of one layout.
        block_ids: int32 `[n]`, the shadow blocks, at least one.
        exact_ids: int32 `[n, block_size / exact_tokens]`, their exact pages in token order.
        first_positions: int32 `[n]`, position of each block's first token; on the host, or the device is waited for.
    """
    for blocks, exact, first in zip(
        block_ids.split(BLOCKS_AT_ONCE),
        exact_ids.split(BLOCKS_AT_ONCE),
        first_positions.split(BLOCKS_AT_ONCE),
        strict=True,
    ):
        layers = BLOCKS_AT_ONCE // len(blocks)
        for at in range(0, len(memories), layers):
            _seal(memories[at : at + layers], blocks, exact, first)


def _seal(memories: Sequence[LayerMemory], block_ids: Tensor, exact_ids: Tensor, first_positions: Tensor) -> None:
    """As `seal_blocks`, at once; `BLOCKS_AT_ONCE` blocks at most, in all layers together."""
    device = block_ids.device
    side = side_stream(device)
    if side:
        side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # while the keys are factorised, which takes longer
        for memory in memories:
            values = memory.exact_views[1]
            ops.store_values(block_ids, exact_ids, values, memory.pages, memory.host_pool, memory.layout)
    keys = [_gather_keys(memory, exact_ids) for memory in memories]
    scales = torch.ones(len(memories), memories[0].layout.width, device=device)
    for row, memory in zip(scales, memories, strict=True):
        if memory.query_scales is not None:
            row.copy_(memory.query_scales)
    factors = _factorise(memories, keys, scales, first_positions)
    for memory, of_layer, row, parts in zip(memories, keys, scales, factors, strict=True):
        ops.pack_block(block_ids, of_layer, row, *parts, memory.pages, memory.layout)
    if side:
        torch.cuda.current_stream(device).wait_stream(side)


def _gather_keys(memory: LayerMemory, exact_ids: Tensor) -> Tensor:
    """Keys of blocks, as the pages have them: `[n, block_size, Hkv, D]`."""
    # [n, pages, heads, tokens, head_size] -> [n, block_size, heads, head_size]
    return memory.exact_views[0][exact_ids.long()].transpose(2, 3).flatten(1, 2).contiguous()


def _factorise(
    memories: Sequence[LayerMemory], keys: list[Tensor], scales: Tensor, first_positions: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each layer's mean, coefficients and basis as `ops.pack_block` takes them; empty where keys stay exact."""
    layout = memories[0].layout
    if not layout.rank:
        return [(keys[0].new_empty(0, dtype=torch.float32),) * 3] * len(keys)
    positions = first_positions[:, None] + torch.arange(
        layout.block_size, dtype=torch.int32, device=first_positions.device
    )
    n, device = len(first_positions), keys[0].device
    weighed = torch.empty(len(keys), n, layout.block_size, layout.width, dtype=torch.float32, device=device)
    for of_layer, memory, rotated, row in zip(weighed, memories, keys, scales, strict=True):
        before_rope = undo(memory.rotary, rotated.flatten(0, 1), positions.flatten())
        torch.mul(before_rope.view_as(of_layer), row, out=of_layer)
    mean, coefficients, basis = factorise(weighed.flatten(0, 1), layout.rank)
    scales = scales.repeat_interleave(n, dim=0)
    factors = mix(LowRank(mean / scales, coefficients, basis / scales.unsqueeze(1)), layout.leading_rank)
    return list(zip(*(part.split(n) for part in factors), strict=True))
