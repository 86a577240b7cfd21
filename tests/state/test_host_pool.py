from __future__ import annotations

import resource

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_shadowkv.state import host_pool
from vllm_shadowkv.state.host_pool import FREE_SHARE, GIB, Backing, allocate, check_room, max_blocks
from vllm_shadowkv.state.huge_pages import HUGE_PAGE

ROW, PAGES = 3 << 20, 1 << 20


@pytest.fixture
def sixteen_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 16 * GIB)


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(host_pool, "free_bytes", lambda: num_bytes)


def backing(gib: float | None = None, pages_on_host: bool = False, ranks: int = 1) -> Backing:
    return max_blocks(gib, ROW, PAGES, pages_on_host, ranks, free=host_pool.free_bytes())


def blocks(gib: float | None = None, pages_on_host: bool = False, ranks: int = 1) -> int:
    return backing(gib, pages_on_host, ranks).blocks


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
def test_a_size_that_is_set_leaves_room_for_pages_on_the_host() -> None:
    # 12 GiB of values would bring 4 GiB of pages.
    assert blocks(12, pages_on_host=True) == blocks(pages_on_host=True)
    assert blocks(12) == 12 * GIB // ROW
    assert blocks(1, pages_on_host=True) == GIB // ROW


@pytest.mark.usefixtures("sixteen_free")
def test_what_bounds_the_blocks_is_said() -> None:
    setting = Backing(GIB // ROW, "shadowkv.host_memory_gib 1", "raise shadowkv.host_memory_gib")
    assert backing(1) == backing(1, pages_on_host=True) == setting
    reason = "85% of the 16.0 GiB of host memory that are free"
    assert backing() == Backing(blocks(), reason, "free host memory, or set shadowkv.host_memory_gib")
    on_host = Backing(blocks(pages_on_host=True), reason, "free host memory")
    assert backing(pages_on_host=True) == backing(15, pages_on_host=True) == on_host


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
    assert count * (ROW + (PAGES if on_host else 0)) * ranks <= free_bytes


def test_a_row_for_every_block_of_every_layer() -> None:
    pools = allocate(num_layers=3, num_blocks=5, row_bytes=64)
    assert [(pool.shape, pool.dtype) for pool in pools] == [((5, 64), torch.uint8)] * 3
    assert len({pool.data_ptr() for pool in pools}) == 3
    assert all(pool.is_contiguous() for pool in pools)
    assert all(pool.data_ptr() % HUGE_PAGE == 0 for pool in pools), "rows begin on what they are a multiple of"


def test_a_pool_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, GIB)
    sentence = (
        r"the values of 1024 KV cache blocks need 2\.0 GiB of host memory \(2147483648 bytes\), 1\.0 GiB "
        r"\(1073741824 bytes\) are free; lower --num-gpu-blocks-override, --kv-cache-memory-bytes or "
        r"shadowkv\.host_memory_gib\."
    )
    with pytest.raises(MemoryError, match=sentence):
        allocate(num_layers=2, num_blocks=1024, row_bytes=1 << 20)
    assert len(allocate(num_layers=1, num_blocks=1024, row_bytes=1 << 20)) == 1


def test_what_the_kernel_does_not_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1 << 62)  # it is not really
    with pytest.raises(MemoryError, match=r"need 1073741824\.0 GiB of host memory \(\d+ bytes\), .* are free"):
        allocate(num_layers=1, num_blocks=1 << 40, row_bytes=1 << 20)


def test_room_is_checked_for_all_ranks_and_for_pages_on_the_host() -> None:
    room = {"row_bytes": ROW, "page_bytes": PAGES, "free": 16 * GIB}
    fit = 16 * GIB // ROW
    check_room(fit, **room, pages_on_host=False, ranks=1)
    check_room(16 * GIB // (ROW + PAGES), **room, pages_on_host=True, ranks=1)
    with pytest.raises(MemoryError, match="the values of 5462 KV cache blocks need 16"):
        check_room(fit + 1, **room, pages_on_host=False, ranks=1)
    with pytest.raises(MemoryError, match=r"values and pages of 5461 .* need 21\.3 GiB .* 16\.0 GiB"):
        check_room(fit, **room, pages_on_host=True, ranks=1)
    with pytest.raises(MemoryError, match=r"need 32\.0 GiB"):
        check_room(fit, **room, pages_on_host=False, ranks=2)


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
    pinned_when_waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pinned_when_waited.append(len(cudart.pinned)))
    pools = allocate(num_layers=2, num_blocks=8, row_bytes=4096, gpu=0)
    view = pools[1][3:]
    assert cudart.pinned == {pool.data_ptr(): 8 * 4096 for pool in pools}
    left = pools[1].data_ptr()
    del pools
    assert list(cudart.pinned) == [left], "a view keeps its pool"
    del view
    assert not cudart.pinned
    assert pinned_when_waited == [2, 1], "each time before"


def test_unpinned_though_the_device_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart(limit=1 << 20)

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    pools = allocate(num_layers=1, num_blocks=8, row_bytes=4096, gpu=0)
    assert cudart.pinned
    del pools
    assert not cudart.pinned


def test_what_cannot_be_pinned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart(limit=3 << 20)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (GIB // 2, GIB))
    free(monkeypatch, 16 * GIB)
    with pytest.raises(
        MemoryError,
        match=r"could not pin 0\.0 GiB \(1048576 bytes\) of host memory \(error 2\), 16\.0 GiB are free; raise the "
        r"limit on locked memory \(ulimit -l unlimited, now 0\.5 GiB\), or lower shadowkv\.host_memory_gib",
    ):
        allocate(num_layers=4, num_blocks=1024, row_bytes=1024, gpu=0)
    assert not cudart.pinned


@pytest.mark.parametrize("agrees", [True, False])
@pytest.mark.parametrize(("nodes", "preferred"), [([0, 1], [1, 1, 1]), ([0], [])])
def test_memory_comes_from_the_gpus_node_and_progress_is_said(
    monkeypatch: pytest.MonkeyPatch, nodes: list[int], preferred: list[int], agrees: bool
) -> None:
    cudart, asked, said = FakeCudart(limit=1 << 30), [], []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(host_pool.numa, "nodes", lambda: nodes)
    monkeypatch.setattr(host_pool.numa, "node_of_gpu", lambda gpu: {2: 1}[gpu])

    def prefer(pool: torch.Tensor, node: int) -> bool:
        assert pool.data_ptr() not in cudart.pinned, "pinning has taken the memory already"
        asked.append(node)
        return agrees

    monkeypatch.setattr(host_pool.numa, "prefer_node", prefer)
    clock = iter(range(0, 60, 6))
    monkeypatch.setattr(host_pool.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(host_pool.logger, "info", lambda text, *values: said.append(text % values))
    allocate(num_layers=3, num_blocks=64, row_bytes=1 << 20, gpu=2)
    assert asked == preferred
    refused = "shadowkv: Linux does not let the host pool prefer NUMA node 1, where GPU 2 is."
    expected = [refused] if preferred and not agrees else []
    assert said == [*expected, "shadowkv: 0.1 of 0.2 GiB of the host pool are pinned."]
