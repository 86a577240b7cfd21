"""The memory of a worker's layers, once vLLM has allocated its KV cache: its pages, and the host pool beside them."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_shadowkv.integration.worker.layers import Layer
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.state import host_pool
from vllm_shadowkv.state.block_state import BlockState
from vllm_shadowkv.state.boundary import ExactBoundary
from vllm_shadowkv.state.decode import DecodeWorkspace
from vllm_shadowkv.state.due import DueBlocks
from vllm_shadowkv.state.host_memory import GIB
from vllm_shadowkv.state.huge_pages import use_huge_pages
from vllm_shadowkv.state.layer import LayerMemory
from vllm_shadowkv.state.slot_counts import SlotCounts

logger = logging.getLogger("vllm.shadowkv")


@dataclass
class Bound:
    """What exists once vLLM has allocated its KV cache.

    Attributes:
        memories: per layer name.
        state: of the blocks.
        boundary: with its prefill window resolved.
        workspace: of the decode kernels.
        exact_start: int32 `[max_num_seqs]`, persistent, for CUDA graphs: the boundary of each row of the step.
        slots: counts of the slots' hits and misses.
        due: complete blocks that are not sealed yet.
        reading: blocks whose rows of the host pool are being copied to be written to files, or were.
    """

    memories: dict[str, LayerMemory]
    state: BlockState
    boundary: ExactBoundary
    workspace: DecodeWorkspace
    exact_start: Tensor
    slots: SlotCounts
    due: DueBlocks = field(default_factory=DueBlocks)
    reading: dict[int, Future[None]] = field(default_factory=dict)


def make_bound(
    layers: dict[str, Layer],
    layout: PageLayout,
    boundary: ExactBoundary,
    workspace: DecodeWorkspace,
    slots: SlotCounts,
    max_rows: int,
    throw_away: bool,
) -> Bound:
    """Allocates the host pool and all else that a KV cache needs.

    Args:
        layers: with their caches.
        layout: of their pages.
        boundary: resolved.
        workspace: of the decode kernels.
        slots: their counts.
        max_rows: most rows of a step.
        throw_away: the cache is one that vLLM measures graphs with.

    Raises:
        MemoryError: the host pool does not fit.
    """
    first = next(iter(layers.values())).attention.kv_cache
    num_blocks, device = first.shape[0], first.device
    if device.type == "cpu":  # vLLM has just allocated it, and filled it with zeros
        for layer in layers.values():
            use_huge_pages(layer.attention.kv_cache, zeros=True)
    gpu = device.index if device.type == "cuda" else None
    if throw_away:  # one row, and one registration of it, stands for all: nothing will be sealed
        pools = host_pool.allocate(1, 1, layout.value_row_bytes, gpu) * len(layers)
    else:
        pools = host_pool.allocate(len(layers), num_blocks, layout.value_row_bytes, gpu)
    memories = {
        name: LayerMemory(
            layout=layout,
            rotary=layer.rotary,
            cos_sin=layer.cos_sin,
            pages=_pages(layer.attention.kv_cache, layout),
            exact_pages=_pages(layer.exact.kv_cache, layout),
            slot_pages=_pages(layer.slots.kv_cache, layout),
            host_pool=pool.expand(num_blocks, -1),
            query_scales=layer.query_scales,
            sinks=layer.attention.impl.sinks,
        )
        for (name, layer), pool in zip(layers.items(), pools, strict=True)
    }
    if not throw_away:
        gib = len(pools) * num_blocks / GIB
        logger.info(
            "shadowkv: %d blocks of %d tokens (%d tokens sealed, %d exact); pages %.2f GiB, host pool %.2f GiB; "
            "%s; prompts are exact over their newest %d tokens.",
            num_blocks,
            layout.block_size,
            num_blocks * layout.block_size,
            num_blocks * layout.exact_tokens,
            gib * layout.page_bytes,
            gib * layout.value_row_bytes,
            f"keys of rank {layout.rank} of {layout.width}" if layout.rank else "exact keys",
            boundary.prefill_exact_tokens,
        )
    return Bound(
        memories=memories,
        state=BlockState(num_blocks, layout.block_size // layout.exact_tokens, device),
        boundary=boundary,
        workspace=workspace,
        exact_start=torch.zeros(max_rows, dtype=torch.int32, device=device),
        slots=slots,
    )


def _pages(kv_cache: Tensor, layout: PageLayout) -> Tensor:
    """VLLM's view of a layer's cache as uint8 `[num_blocks, page_bytes]`."""
    return kv_cache.view(torch.uint8).view(kv_cache.shape[0], layout.page_bytes)
