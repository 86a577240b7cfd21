"""Sealing: complete blocks turn from exact pages into one shadow page and host values."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_shadowkv import ops
from vllm_shadowkv.rotary import undo
from vllm_shadowkv.state.layer import LayerMemory
from vllm_shadowkv.state.low_rank import factorise, mix
from vllm_shadowkv.state.side_stream import side_stream

BLOCKS_AT_ONCE = 8
"""Bounds the fp32 workspace: a block of the Llama-3.1-8B shape takes 4 MiB of keys and 4 MiB of Gram matrix."""


def seal_blocks(memory: LayerMemory, block_ids: Tensor, exact_ids: Tensor, first_positions: Tensor) -> None:
    """Seals blocks of one layer.

    Args:
        memory: the layer's pages and host pool.
        block_ids: int32 `[n]`, the shadow blocks.
        exact_ids: int32 `[n, block_size / exact_tokens]`, their exact pages in token order.
        first_positions: int32 `[n]`, position of each block's first token; on the host, or the device is waited for.
    """
    for blocks, exact, first in zip(
        block_ids.split(BLOCKS_AT_ONCE),
        exact_ids.split(BLOCKS_AT_ONCE),
        first_positions.split(BLOCKS_AT_ONCE),
        strict=True,
    ):
        _seal(memory, blocks, exact, first)


def _seal(memory: LayerMemory, block_ids: Tensor, exact_ids: Tensor, first_positions: Tensor) -> None:
    layout, device = memory.layout, memory.pages.device
    exact_keys, exact_values = memory.exact_views
    side = side_stream(device)
    if side:
        side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # while the keys are factorised, which takes longer
        ops.store_values(block_ids, exact_ids, exact_values, memory.pages, memory.host_pool, layout)
    # [n, pages, heads, tokens, head_size] -> [n, block_size, heads, head_size]
    keys = exact_keys[exact_ids.long()].transpose(2, 3).flatten(1, 2).contiguous()
    if layout.rank:
        positions = first_positions[:, None] + torch.arange(
            layout.block_size, dtype=torch.int32, device=first_positions.device
        )
        flat = undo(memory.rotary, keys.flatten(0, 1), positions.flatten())
        factors = mix(factorise(flat.view(len(keys), layout.block_size, layout.width), layout.rank))
        mean, coefficients, basis = factors.mean, factors.coefficients, factors.basis
    else:
        mean = coefficients = basis = torch.empty(0, device=device)
    ops.pack_block(block_ids, keys, mean, coefficients, basis, memory.pages, layout)
    if side:
        torch.cuda.current_stream(device).wait_stream(side)
