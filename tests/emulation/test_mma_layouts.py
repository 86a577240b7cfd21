"""Which element of a matrix a lane holds in which register, by two tables that do not come from the emulation.

PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... with integer type" (9.7.14.5.8 and .9 in
PTX ISA 9.2), and the layouts that CUTLASS has for SM80_16x8x16_F32F16F16F32_TN, SM80_16x8x16_F32BF16BF16F32_TN and
SM80_16x8x16_S32S8S8S32_TN in `include/cute/atom/mma_traits_sm80.hpp`. A fragment is a list over lanes of lists over the
lane's elements, in the order of its registers and from their low bits to their high ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

M, N, K = 16, 8, 16
LANES = 32
Place = tuple[int, int]  # row and column


@dataclass(frozen=True)
class Fragment:
    """Of one matrix: PTX's formula for element i of a lane with g = lane / 4 and t = lane % 4, and CuTe's strides."""

    elements: int
    ptx: Callable[[int, int, int], Place]
    shape: tuple[int, ...]  # of a lane's elements; that of lanes is (4, 8)
    lane_strides: Place
    strides: tuple[int, ...]
    rows: int  # of a column, in CuTe's coordinates
    transposed: bool = False  # CuTe's B is N x K

    def by_ptx(self) -> list[list[Place]]:
        return [[self.ptx(lane // 4, lane % 4, i) for i in range(self.elements)] for lane in range(LANES)]

    def by_cute(self) -> list[list[Place]]:
        def place(lane: int, i: int) -> Place:
            index = lane % 4 * self.lane_strides[0] + lane // 4 * self.lane_strides[1]
            for size, stride in zip(self.shape, self.strides, strict=True):
                index += i % size * stride
                i //= size
            row, column = index % self.rows, index // self.rows
            return (column, row) if self.transposed else (row, column)

        return [[place(lane, i) for i in range(self.elements)] for lane in range(LANES)]


SUMS = Fragment(4, lambda g, t, i: (g + 8 * (i >= 2), 2 * t + i % 2), (2, 2), (32, 1), (16, 8), M)
FLOAT = {
    "a": Fragment(
        8,
        lambda g, t, i: (g if i < 2 or 4 <= i < 6 else g + 8, 2 * t + i % 2 + 8 * (i >= 4)),
        (2, 2, 2),
        (32, 1),
        (16, 8, 128),
        M,
    ),
    "b": Fragment(4, lambda g, t, i: (2 * t + i % 2 + 8 * (i >= 2), g), (2, 2), (16, 1), (8, 64), N, transposed=True),
    "c": SUMS,
}
INTEGER = {
    "a": Fragment(8, lambda g, t, i: (g + 8 * (i >= 4), 4 * t + i % 4), (4, 2), (64, 1), (16, 8), M),
    "b": Fragment(4, lambda g, t, i: (4 * t + i, g), (4,), (32, 1), (8,), N, transposed=True),
    "c": SUMS,
}
MMAS = {torch.float16: FLOAT, torch.bfloat16: FLOAT, torch.int8: INTEGER}
TABLES = [(dtype, matrix) for dtype in MMAS for matrix in "abc"]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture(params=MMAS, ids=ids)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def gather(matrix: Tensor, places: list[list[Place]]) -> Tensor:
    """What lanes hold of a matrix, `[lanes, elements]`."""
    return torch.stack([torch.stack([matrix[place] for place in lane]) for lane in places])


def mma(library: Path, dtype: torch.dtype, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The emulated instruction on fragments; `c` with the product added."""
    c = c.clone()
    ctypes.CDLL(str(library))[f"mma_{ids(dtype)}"](*(ctypes.c_void_p(x.data_ptr()) for x in (a, b, c)))
    return c


@pytest.mark.parametrize(("dtype", "matrix"), TABLES, ids=ids)
def test_ptx_and_cute_say_the_same(dtype: torch.dtype, matrix: str) -> None:
    fragment = MMAS[dtype][matrix]
    places = fragment.by_ptx()
    assert places == fragment.by_cute()
    rows, columns = {"a": (M, K), "b": (K, N), "c": (M, N)}[matrix]
    assert sorted(place for lane in places for place in lane) == [(i, j) for i in range(rows) for j in range(columns)]


def test_the_emulation_has_that_layout(library: Path, dtype: torch.dtype) -> None:
    """One element of A and one of B that are not 0: the product has to be in one lane's one sum, whatever the pair."""
    table = {matrix: fragment.by_ptx() for matrix, fragment in MMAS[dtype].items()}
    sums = torch.int32 if dtype is torch.int8 else torch.float32
    generator = torch.Generator().manual_seed(0)
    for k in range(K):
        # Every row of A and column of B at this k has a number of its own: each product is told from all others.
        a, b = torch.zeros(M, K, dtype=dtype), torch.zeros(K, N, dtype=dtype)
        a[:, k] = (torch.arange(M) + 1).to(dtype)
        b[k] = torch.tensor([1, 17, -19, 23, 29, -31, 37, 41]).to(dtype)
        before = torch.randint(-99, 99, (M, N), generator=generator).to(sums)
        expected = before + a[:, k, None].to(sums) * b[k].to(sums)
        after = mma(library, dtype, *(gather(x, table[name]) for name, x in (("a", a), ("b", b), ("c", before))))
        assert torch.equal(after, gather(expected, table["c"]))


@pytest.mark.parametrize("matrix", ["a", "b", "c"])
@pytest.mark.parametrize("swap", ["lanes", "elements"])
def test_another_layout_is_told_from_it(library: Path, dtype: torch.dtype, matrix: str, swap: str) -> None:
    table = {name: fragment.by_ptx() for name, fragment in MMAS[dtype].items()}
    places = table[matrix]
    if swap == "lanes":
        places[1], places[4] = places[4], places[1]
    else:
        for lane in places:
            lane[0], lane[1] = lane[1], lane[0]
    sums = torch.int32 if dtype is torch.int8 else torch.float32
    generator = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.randint(-8, 8, shape, generator=generator).to(kind)
        for shape, kind in (((M, K), dtype), ((K, N), dtype), ((M, N), sums))
    )
    expected = c + (a.float() @ b.float()).to(sums)
    after = mma(library, dtype, *(gather(x, table[name]) for name, x in (("a", a), ("b", b), ("c", c))))
    assert not torch.equal(after, gather(expected, table["c"]))
