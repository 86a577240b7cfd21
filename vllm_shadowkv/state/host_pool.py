"""The host pool: values of sealed blocks in host memory, sized before anything is allocated."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from vllm_shadowkv.state.host_memory import GIB, free_bytes
from vllm_shadowkv.state.huge_pages import use_huge_pages

FREE_SHARE = 0.85
"""Share of the free host memory that the pool takes where the user sets no size."""


def max_blocks(
    host_memory_gib: float | None, row_bytes: int, page_bytes: int, pages_on_host: bool, ranks: int, free: int
) -> int:
    """How many blocks the host can back.

    Args:
        host_memory_gib: the setting; None: `FREE_SHARE` of what is free now.
        row_bytes: bytes of one block's values, all layers of this rank.
        page_bytes: bytes of one block's pages, all layers of this rank.
        pages_on_host: True on the CPU platform, where pages come from the same memory as the pool.
        ranks: ranks on this machine, which share the memory.
        free: bytes of host memory that are free, see `host_memory.free_bytes`.

    Returns:
        Blocks of this rank.

    Raises:
        ValueError: the setting exceeds the free memory; the sentence names both.
    """
    if host_memory_gib is None:
        return int(FREE_SHARE * free) // ranks // (row_bytes + (page_bytes if pages_on_host else 0))
    wanted = int(host_memory_gib * GIB)
    if wanted > free:
        raise ValueError(
            f"shadowkv: host_memory_gib asks for {host_memory_gib:g} GiB, but {free / GIB:.1f} GiB of host memory are "
            "free; lower host_memory_gib, or leave it out to take most of what is free."
        )
    return wanted // ranks // row_bytes


def allocate(num_layers: int, num_blocks: int, row_bytes: int, pinned: bool = False) -> list[Tensor]:
    """The pool of every layer.

    Args:
        num_layers: layers of this rank.
        num_blocks: blocks of the pool; a block's row has its id.
        row_bytes: bytes of one block's values in one layer.
        pinned: page-locked and mapped, so that CUDA kernels read and write it.

    Returns:
        Per layer uint8 `[num_blocks, row_bytes]`. Memory that is not pinned is taken as rows are first written.

    Raises:
        MemoryError: it does not fit what is free, or cannot be pinned; the sentence names the bytes and the flags.
    """
    needed = num_layers * num_blocks * row_bytes
    free = free_bytes()
    if needed > free:
        raise MemoryError(
            f"shadowkv: the values of {num_blocks} KV cache blocks need {needed / GIB:.1f} GiB of host memory, "
            f"{free / GIB:.1f} GiB are free; lower --num-gpu-blocks-override, --kv-cache-memory-bytes or "
            "shadowkv.host_memory_gib."
        )
    pools = [torch.empty(num_blocks, row_bytes, dtype=torch.uint8) for _ in range(num_layers)]
    for pool in pools:
        use_huge_pages(pool)
    for pool in pools if pinned else ():
        _pin(pool)
    return pools


def _pin(pool: Tensor) -> None:
    """Pins the memory of a tensor until it is freed. PyTorch's own pinned tensors take the next power of two."""
    address, cudart = pool.data_ptr(), torch.cuda.cudart()
    status = int(cudart.cudaHostRegister(address, pool.nbytes, 0))
    if status:
        raise MemoryError(
            f"shadowkv: CUDA could not pin {pool.nbytes / GIB:.1f} GiB of host memory (error {status}); raise the "
            "limit on locked memory (ulimit -l unlimited), or lower shadowkv.host_memory_gib."
        )
    weakref.finalize(pool.untyped_storage(), cudart.cudaHostUnregister, address)
