"""Huge pages for host memory that is read in places: finding a small page can take longer than reading a chunk."""

from __future__ import annotations

import ctypes
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

HUGE_PAGE = 2**21
_DONTNEED, _HUGEPAGE = 4, 14  # madvise(2)


def use_huge_pages(memory: Tensor, zeros: bool = False) -> bool:
    """Asks Linux to back a tensor's memory with huge pages.

    Two threads of an AMD EPYC, in a virtual machine, gathered chunks of 2 KiB from 1 GiB at 21 GB/s so, and at 12 GB/s
    without.

    Args:
        memory: on the CPU, contiguous.
        zeros: False: it was not touched yet, and stays so. True: it holds nothing but zeros; they are given back, and
            come anew, in huge pages, when they are touched. (To move content would take seconds per GiB.)

    Returns:
        Whether Linux agreed, for all of it but its ends; where not, it works as before.
    """
    begin, size = whole_pages(memory, HUGE_PAGE)
    madvise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
    if size == 0 or madvise is None:
        return False
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if madvise(begin, size, _HUGEPAGE):
        logger.debug("shadowkv: no huge pages for %d bytes of host memory: errno %d.", size, ctypes.get_errno())
        return False
    return not zeros or madvise(begin, size, _DONTNEED) == 0


def whole_pages(memory: Tensor, page: int) -> tuple[int, int]:
    """Address and bytes of the pages of `page` bytes that lie wholly in a contiguous tensor; 0 bytes if none does."""
    begin = -(-memory.data_ptr() // page) * page
    return begin, max(0, (memory.data_ptr() + memory.nbytes) // page * page - begin)


def copy_in_huge_pages(memory: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy as `dtype` on the same device, in huge pages where that is the CPU and has them."""
    copy = torch.empty(memory.shape, dtype=dtype, device=memory.device)
    if memory.device.type == "cpu":
        use_huge_pages(copy)
    return copy.copy_(memory)
