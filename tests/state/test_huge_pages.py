"""Huge pages change where memory lies, and nothing in it."""

import sys
from pathlib import Path

import pytest
import torch

from vllm_shadowkv.state.huge_pages import HUGE_PAGE, copy_in_huge_pages, use_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_huge_pages = pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="Linux gives no huge pages here"
)


@needs_huge_pages
@pytest.mark.parametrize("zeros", [False, True])
def test_memory_comes_in_huge_pages(zeros: bool) -> None:
    memory = torch.zeros(8 * HUGE_PAGE, dtype=torch.uint8) if zeros else torch.empty(8 * HUGE_PAGE, dtype=torch.uint8)
    assert use_huge_pages(memory, zeros)
    if zeros:
        assert not memory.any()
    memory.fill_(3)
    assert (memory == 3).all()
    assert _advised(memory) >= 6 * HUGE_PAGE  # of eight, the ends are not whole


@needs_huge_pages
def test_a_copy_is_equal_and_in_huge_pages() -> None:
    table = torch.arange(2 * HUGE_PAGE, dtype=torch.int32).view(-1, 64).mT
    copy = copy_in_huge_pages(table, torch.float32)
    assert copy.is_contiguous()
    assert torch.equal(copy, table.float())
    assert _advised(copy) >= 2 * HUGE_PAGE  # of four, the ends are not whole


def test_too_small_or_elsewhere() -> None:
    """What holds no whole huge page, or a system without them, is left alone."""
    memory = torch.arange(100)
    assert not use_huge_pages(memory, zeros=True)
    assert torch.equal(memory, torch.arange(100))


def _advised(memory: torch.Tensor) -> int:
    """Bytes of the memory that Linux was asked to back with huge pages. Whether it had any free is another matter."""
    assert sys.platform == "linux"
    begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    inside = found = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            low, high = (int(part, 16) for part in words[0].split("-"))
            inside = max(0, min(high, end) - max(low, begin))
        elif words[0] == "VmFlags:" and "hg" in words:
            found += inside
    return found
