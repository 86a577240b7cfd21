"""Which element of a matrix a lane holds in which register, by two tables that do not come from the emulation.

PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... with integer type" (9.7.14.5.8 and .9 in
PTX ISA 9.2) and "Matrix Fragments for mma.m16n8k32", and the layouts that CUTLASS has for
SM80_16x8x16_F32F16F16F32_TN, SM80_16x8x16_F32BF16BF16F32_TN, SM80_16x8x16_S32S8S8S32_TN and SM80_16x8x32_S32S8U8S32_TN
in `include/cute/atom/mma_traits_sm80.hpp`. A fragment is a list over lanes of lists over the lane's elements, in the
order of its registers and from their low bits to their high ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

M, N = 16, 8
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
LONG = {
    "a": Fragment(
        16,
        lambda g, t, i: (g if i < 4 or 8 <= i < 12 else g + 8, 4 * t + i % 4 + 16 * (i >= 8)),
        (4, 2, 2),
        (64, 1),
        (16, 8, 256),
        M,
    ),
    "b": Fragment(8, lambda g, t, i: (4 * t + i % 4 + 16 * (i >= 4), g), (4, 2), (32, 1), (8, 128), N, transposed=True),
    "c": SUMS,
}


@dataclass(frozen=True)
class Mma:
    """An instruction: `function` of mma.cu."""

    function: str
    fragments: dict[str, Fragment]
    k: int
    a: torch.dtype
    b: torch.dtype
    sums: torch.dtype

    def places(self) -> dict[str, list[list[Place]]]:
        return {matrix: fragment.by_ptx() for matrix, fragment in self.fragments.items()}

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, places: dict[str, list[list[Place]]], library: Path) -> Tensor:
        """What the emulated instruction leaves in the lanes' sums if matrices lie as `places` say."""
        fragments = [gather(x, places[name]) for name, x in (("a", a), ("b", b), ("c", c))]
        ctypes.CDLL(str(library))[self.function](*(ctypes.c_void_p(x.data_ptr()) for x in fragments))
        return fragments[2]


MMAS = [
    Mma("mma_float16", FLOAT, 16, torch.float16, torch.float16, torch.float32),
    Mma("mma_bfloat16", FLOAT, 16, torch.bfloat16, torch.bfloat16, torch.float32),
    Mma("mma_int8", INTEGER, 16, torch.int8, torch.int8, torch.int32),
    Mma("mma_int8_uint8", LONG, 32, torch.int8, torch.uint8, torch.int32),
]


@pytest.fixture(params=MMAS, ids=lambda mma: mma.function.removeprefix("mma_"))
def mma(request: pytest.FixtureRequest) -> Mma:
    return request.param


def gather(matrix: Tensor, places: list[list[Place]]) -> Tensor:
    """What lanes hold of a matrix, `[lanes, elements]`."""
    return torch.stack([torch.stack([matrix[place] for place in lane]) for lane in places])


@pytest.mark.parametrize("matrix", ["a", "b", "c"])
def test_ptx_and_cute_say_the_same(mma: Mma, matrix: str) -> None:
    fragment = mma.fragments[matrix]
    places = fragment.by_ptx()
    assert places == fragment.by_cute()
    rows, columns = {"a": (M, mma.k), "b": (mma.k, N), "c": (M, N)}[matrix]
    assert sorted(place for lane in places for place in lane) == [(i, j) for i in range(rows) for j in range(columns)]


def test_the_emulation_has_that_layout(library: Path, mma: Mma) -> None:
    """One element of A and one of B that are not 0: the product has to be in one lane's one sum, whatever the pair."""
    generator = torch.Generator().manual_seed(0)
    for k in range(mma.k):
        # Every row of A and column of B at this k has a number of its own: each product is told from all others.
        a, b = torch.zeros(M, mma.k, dtype=mma.a), torch.zeros(mma.k, N, dtype=mma.b)
        a[:, k] = (torch.arange(M) + 1).to(mma.a)
        b[k] = torch.tensor([1, 17, -19, 23, 29, -31, 37, 41]).to(mma.b)  # as uint8, some above 127
        before = torch.randint(-99, 99, (M, N), generator=generator).to(mma.sums)
        expected = before + a[:, k, None].to(mma.sums) * b[k].to(mma.sums)
        after = mma(a, b, before, mma.places(), library)
        assert torch.equal(after, gather(expected, mma.places()["c"]))


def test_signs(library: Path, mma: Mma) -> None:
    """A and B of all signs that their types have."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = (
        torch.randint(-128, 128, shape, generator=generator).to(kind)
        for shape, kind in (((M, mma.k), mma.a), ((mma.k, N), mma.b), ((M, N), mma.sums))
    )
    expected = c + (a.double() @ b.double()).to(mma.sums)
    after = mma(a, b, c, mma.places(), library)
    assert torch.equal(after, gather(expected, mma.places()["c"]))


@pytest.mark.parametrize("matrix", ["a", "b", "c"])
@pytest.mark.parametrize("swap", ["lanes", "elements"])
def test_another_layout_is_told_from_it(library: Path, mma: Mma, matrix: str, swap: str) -> None:
    table = mma.places()
    places = table[matrix]
    if swap == "lanes":
        places[1], places[4] = places[4], places[1]
    else:
        for lane in places:
            lane[0], lane[1] = lane[1], lane[0]
    generator = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.randint(-8, 8, shape, generator=generator).to(kind)
        for shape, kind in (((M, mma.k), mma.a), ((mma.k, N), mma.b), ((M, N), mma.sums))
    )
    expected = c + (a.float() @ b.float()).to(mma.sums)
    assert not torch.equal(mma(a, b, c, table, library), gather(expected, table["c"]))
