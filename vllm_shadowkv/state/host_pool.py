"""The host pool: values of sealed blocks in host memory, sized before anything is allocated."""

from __future__ import annotations

import contextlib
import logging
import resource
import time
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_shadowkv.state import numa
from vllm_shadowkv.state.host_memory import GIB, free_bytes
from vllm_shadowkv.state.huge_pages import HUGE_PAGE, use_huge_pages

logger = logging.getLogger("vllm.shadowkv")

FREE_SHARE = 0.85
"""Share of the free host memory that the pool takes where the user sets no size."""
SECONDS_BETWEEN_REPORTS = 10.0


@dataclass(frozen=True)
class Backing:
    """How many blocks of a rank the host can back, why no more, and what to do to have more."""

    blocks: int
    reason: str
    way_out: str


def max_blocks(
    host_memory_gib: float | None, row_bytes: int, page_bytes: int, pages_on_host: bool, ranks: int, free: int
) -> Backing:
    """How many blocks the host can back.

    Args:
        host_memory_gib: the setting; None: `FREE_SHARE` of what is free now.
        row_bytes: bytes of one block's values, all layers of this rank.
        page_bytes: bytes of one block's pages, all layers of this rank.
        pages_on_host: True on the CPU platform, where pages come from the same memory as the pool.
        ranks: ranks on this machine, which share the memory.
        free: bytes of host memory that are free, see `host_memory.free_bytes`.

    Returns:
        Of this rank.

    Raises:
        ValueError: the setting exceeds the free memory; the sentence names both.
    """
    by_free = Backing(
        int(FREE_SHARE * free) // ranks // (row_bytes + (page_bytes if pages_on_host else 0)),
        f"{FREE_SHARE:.0%} of the {free / GIB:.1f} GiB of host memory that are free",
        "free host memory" if pages_on_host else "free host memory, or set shadowkv.host_memory_gib",
    )
    if host_memory_gib is None:
        return by_free
    wanted = int(host_memory_gib * GIB)
    if wanted > free:
        raise ValueError(
            f"shadowkv: host_memory_gib asks for {host_memory_gib:g} GiB, but {free / GIB:.1f} GiB of host memory are "
            "free; lower host_memory_gib, or leave it out to take most of what is free."
        )
    by_setting = Backing(
        wanted // ranks // row_bytes, f"shadowkv.host_memory_gib {host_memory_gib:g}", "raise shadowkv.host_memory_gib"
    )
    # Pages beside a pool of that size must fit, too.
    return min(by_setting, by_free, key=lambda backing: backing.blocks) if pages_on_host else by_setting


def check_room(num_blocks: int, row_bytes: int, page_bytes: int, pages_on_host: bool, ranks: int, free: int) -> None:
    """Refuses a number of blocks that the host cannot back, before any of their memory is taken.

    Args:
        num_blocks: of this rank.
        row_bytes, page_bytes, pages_on_host, ranks, free: as for `max_blocks`.

    Raises:
        MemoryError: the sentence names the bytes and the flags.
    """
    needed = ranks * num_blocks * (row_bytes + (page_bytes if pages_on_host else 0))
    _check_free(needed, free, num_blocks, "values and pages" if pages_on_host else "values")


def allocate(num_layers: int, num_blocks: int, row_bytes: int, gpu: int | None = None) -> list[Tensor]:
    """The pool of every layer.

    Args:
        num_layers: layers of this rank.
        num_blocks: blocks of the pool; a block's row has its id.
        row_bytes: bytes of one block's values in one layer.
        gpu: whose kernels read and write it: page-locked, mapped, and from the GPU's NUMA node while that has memory.

    Returns:
        Per layer uint8 `[num_blocks, row_bytes]`, which begins on a huge page, so that every row begins on as much as
        its bytes are a multiple of. Memory that is not for a GPU is taken as rows are first written.

    Raises:
        MemoryError: it does not fit what is free, or cannot be pinned; the sentence names the bytes and the flags.
    """
    needed = num_layers * num_blocks * row_bytes
    _check_free(needed, free_bytes(), num_blocks, "values")
    try:
        pools = [_aligned(num_blocks, row_bytes) for _ in range(num_layers)]
    except RuntimeError as error:  # the kernel gives no more: ulimit -v, vm.overcommit_memory
        raise _no_room(needed, free_bytes(), num_blocks, "values") from error
    for pool in pools:
        use_huge_pages(pool)
    if gpu is not None:
        _pin_all(pools, gpu)
    return pools


def _aligned(num_blocks: int, row_bytes: int) -> Tensor:
    """Memory that begins on a huge page; PyTorch's own begins on 64 bytes, within a line that a GPU reads."""
    num_bytes = num_blocks * row_bytes
    memory = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % HUGE_PAGE
    return memory[begin : begin + num_bytes].view(num_blocks, row_bytes)


def _pin_all(pools: list[Tensor], gpu: int) -> None:
    """Pins a pool after the other; Linux finds and clears their pages now, at some GiB a second."""
    node = numa.node_of_gpu(gpu) if len(numa.nodes()) > 1 else None
    agreed = [node is None or numa.prefer_node(pool, node) for pool in pools]
    if not all(agreed):
        logger.info("shadowkv: Linux does not let the host pool prefer NUMA node %d, where GPU %d is.", node, gpu)
    total, said = sum(pool.nbytes for pool in pools), time.monotonic()
    for number, pool in enumerate(pools, 1):
        _pin(pool)
        if time.monotonic() - said > SECONDS_BETWEEN_REPORTS:
            said = time.monotonic()
            done = number * pool.nbytes / GIB
            logger.info("shadowkv: %.1f of %.1f GiB of the host pool are pinned.", done, total / GIB)


def _check_free(needed: int, free: int, num_blocks: int, what: str) -> None:
    if needed > free:
        raise _no_room(needed, free, num_blocks, what)


def _no_room(needed: int, free: int, num_blocks: int, what: str) -> MemoryError:
    return MemoryError(
        f"shadowkv: the {what} of {num_blocks} KV cache blocks need {needed / GIB:.1f} GiB of host memory "
        f"({needed} bytes), {free / GIB:.1f} GiB ({free} bytes) are free; lower --num-gpu-blocks-override, "
        "--kv-cache-memory-bytes or shadowkv.host_memory_gib."
    )


def _pin(pool: Tensor) -> None:
    """Pins the memory of a tensor until it is freed. PyTorch's own pinned tensors take the next power of two."""
    address, cudart = pool.data_ptr(), torch.cuda.cudart()
    status = int(cudart.cudaHostRegister(address, pool.nbytes, 0))
    if status:
        raise MemoryError(
            f"shadowkv: CUDA could not pin {pool.nbytes / GIB:.1f} GiB ({pool.nbytes} bytes) of host memory (error "
            f"{status}), {free_bytes() / GIB:.1f} GiB are free; raise the limit on locked memory (ulimit -l unlimited, "
            f"now {_locked_limit()}), or lower shadowkv.host_memory_gib."
        )
    weakref.finalize(pool.untyped_storage(), _unpin, address)


def _unpin(address: int) -> None:
    """Gives pinned memory back; also at the process's exit, while the memory is still there."""
    with contextlib.suppress(RuntimeError):  # a device that has failed cannot be waited for, and reads no more
        torch.cuda.synchronize()  # a kernel may still read it
    torch.cuda.cudart().cudaHostUnregister(address)


def _locked_limit() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / GIB:.3g} GiB"
