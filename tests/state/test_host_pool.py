from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_shadowkv.state import host_pool
from vllm_shadowkv.state.host_pool import FREE_SHARE, GIB, allocate, max_blocks

ROW, PAGES = 3 << 20, 1 << 20


@pytest.fixture
def sixteen_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 16 * GIB)


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(host_pool, "free_bytes", lambda: num_bytes)


def blocks(gib: float | None = None, pages_on_host: bool = False, ranks: int = 1) -> int:
    return max_blocks(gib, ROW, PAGES, pages_on_host, ranks, free=host_pool.free_bytes())


@pytest.mark.usefixtures("sixteen_free")
def test_by_default_most_of_the_free_memory_is_taken() -> None:
    assert blocks() == int(FREE_SHARE * 16 * GIB) // ROW
    assert blocks() * ROW < 16 * GIB


@pytest.mark.usefixtures("sixteen_free")
def test_a_size_that_is_set_is_taken() -> None:
    assert blocks(6.0) == 6 * GIB // ROW
    assert blocks(0.5) == GIB // 2 // ROW
    assert blocks(16) == 16 * GIB // ROW


@pytest.mark.usefixtures("sixteen_free")
def test_ranks_share_a_machine() -> None:
    assert blocks(8.0, ranks=4) == 2 * GIB // ROW
    assert blocks(ranks=4) == int(FREE_SHARE * 16 * GIB) // 4 // ROW


@pytest.mark.usefixtures("sixteen_free")
def test_on_the_cpu_platform_pages_come_from_the_same_memory() -> None:
    assert blocks(pages_on_host=True) == int(FREE_SHARE * 16 * GIB) // (ROW + PAGES)


@pytest.mark.usefixtures("sixteen_free")
def test_more_than_is_free_is_refused() -> None:
    sentence = r"host_memory_gib asks for 17 GiB, but 16\.0 GiB of host memory are free; lower"
    with pytest.raises(ValueError, match=sentence):
        blocks(17)


@settings(deadline=None)
@given(
    free_bytes=st.integers(0, 1 << 42),
    gib=st.none() | st.floats(0.001, 4096),
    on_host=st.booleans(),
    ranks=st.integers(1, 16),
)
def test_never_more_than_the_budget(free_bytes: int, gib: float | None, on_host: bool, ranks: int) -> None:
    assume(gib is None or gib * GIB <= free_bytes)
    with pytest.MonkeyPatch.context() as patch:
        free(patch, free_bytes)
        count = blocks(gib, on_host, ranks)
    budget = free_bytes if gib is None else gib * GIB
    assert 0 <= count * ROW * ranks <= budget


def test_a_row_for_every_block_of_every_layer() -> None:
    pools = allocate(num_layers=3, num_blocks=5, row_bytes=64)
    assert [(pool.shape, pool.dtype) for pool in pools] == [((5, 64), torch.uint8)] * 3
    assert len({pool.data_ptr() for pool in pools}) == 3
    assert all(pool.is_contiguous() for pool in pools)


def test_a_pool_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, GIB)
    sentence = (
        r"the values of 1024 KV cache blocks need 2\.0 GiB of host memory, 1\.0 GiB are free; lower "
        r"--num-gpu-blocks-override, --kv-cache-memory-bytes or shadowkv\.host_memory_gib\."
    )
    with pytest.raises(MemoryError, match=sentence):
        allocate(num_layers=2, num_blocks=1024, row_bytes=1 << 20)
    assert len(allocate(num_layers=1, num_blocks=1024, row_bytes=1 << 20)) == 1


class FakeCudart:
    """Counts what is pinned; refuses more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 0
        if sum(self.pinned.values()) + size > self.limit:
            return 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_pinned_until_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart(limit=1 << 20)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    pools = allocate(num_layers=2, num_blocks=8, row_bytes=4096, pinned=True)
    view = pools[1][3:]
    assert cudart.pinned == {pool.data_ptr(): 8 * 4096 for pool in pools}
    left = pools[1].data_ptr()
    del pools
    assert list(cudart.pinned) == [left], "a view keeps its pool"
    del view
    assert not cudart.pinned


def test_what_cannot_be_pinned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart(limit=3 << 20)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with pytest.raises(
        MemoryError, match=r"could not pin 0\.0 GiB of host memory \(error 2\); raise the limit on locked"
    ):
        allocate(num_layers=4, num_blocks=1024, row_bytes=1024, pinned=True)
    assert not cudart.pinned
