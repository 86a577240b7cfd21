from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generators import default_dtype_name, garbage_pages, make_generator, make_layout, randn, structured_keys
from numeric import assert_bytes_equal, assert_close
from rebuilt import LAYOUTS, layout_id
from torch import Tensor

from vllm_shadowkv import ops, reference
from vllm_shadowkv.codes import coefficients_of, unpack_nibbles
from vllm_shadowkv.page import DTYPES, HEAD_SIZES, PageLayout
from vllm_shadowkv.reference import COEFFICIENTS

Arguments = dict[str, Any]
COPIES = ("exact_keys", "outlier_ids", "outlier_keys", "mean")
CODES = ("coefficients", "tail_coefficients", "tail_steps", "coefficient_scales", "basis")

# Every head size in every dtype, and with every kind of page.
SMALL_LAYOUTS = [
    make_layout(
        1 + i % 3, size, dtype, block_size=(64, 192)[i % 2], chunk_size=(8, 16)[i // 2 % 2], compression=1,
        rank=None if exact_keys else 16 * (1 + i % 3), leading_rank=0 if exact_keys else 16 + i % 2 * 16 * (i % 3 > 0),
        num_outliers=(2, 0, 1)[i % 3], exact_keys=exact_keys,
    )
    for exact_keys in (False, True)
    for i, (size, dtype) in enumerate((size, dtype) for size in HEAD_SIZES for dtype in DTYPES)
]  # fmt: skip


def simple_layout() -> PageLayout:
    """Of the kernel's default dtype."""
    layout = make_layout(1, 64, block_size=64, rank=16, num_outliers=0, compression=1)
    assert layout.rank == 16
    return layout


def make_arguments(layout: PageLayout, block_ids: tuple[int, ...] = (3, 1)) -> Arguments:
    """Arguments of the op in its order; the factors need not be those of the keys."""
    generator = make_generator("pack", layout_id(layout), block_ids)
    n, rank, width = len(block_ids), layout.rank, layout.width
    keys = structured_keys(generator, n * layout.block_size, width)
    return {
        "block_ids": torch.tensor(block_ids, dtype=torch.int32),
        "keys": keys.to(layout.dtype).view(n, layout.block_size, layout.num_kv_heads, layout.head_size),
        "query_scales": 0.1 + 3 * torch.rand(width, generator=generator),
        "mean": randn(generator, n, width),
        "coefficients": randn(generator, n, layout.block_size, rank) if rank else torch.empty(0),
        "basis": 50 * randn(generator, n, rank, width) if rank else torch.empty(0),
        "pages": garbage_pages(generator, 5, layout.page_bytes),
        "layout": layout,
    }


def run(arguments: Arguments, function: Callable[..., None] = ops.pack_block) -> Tensor:
    """The pages after a call."""
    guarded = torch.full((6, arguments["pages"].shape[1]), 0xA5, dtype=torch.uint8)
    pages = guarded[:5]
    pages.copy_(arguments["pages"])
    function(**(arguments | {"pages": pages}))
    assert (guarded[5] == 0xA5).all(), "a write behind the pool"
    return pages


def exact_landmarks(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The mean keys of blocks, and what landmarks differ by from them; one chunk after the other, not as the reference.

    Returns:
        fp64 `[n, Hkv, D]` and `[n, Hkv, chunks, D]`.
    """
    layout = arguments["layout"]
    keys = arguments["keys"].double().unflatten(1, (layout.chunks, layout.chunk_size)).permute(0, 3, 1, 2, 4)
    landmarks = keys.new_empty(*keys.shape[:3], layout.head_size)
    for place in itertools.product(*map(range, keys.shape[:3])):
        mean = keys[place].mean(0)
        scales = arguments["query_scales"].double().unflatten(0, (layout.num_kv_heads, -1))[place[1]]
        weights = torch.stack([((key - mean) * scales).norm() ** 4 for key in keys[place]])
        landmarks[place] = 0.5 * mean + 0.5 * torch.einsum("t,td->d", weights / weights.sum(), keys[place])
    means = keys.mean((2, 3))
    return means, landmarks - means.unsqueeze(2)


@pytest.mark.parametrize("layout", LAYOUTS + SMALL_LAYOUTS, ids=layout_id)
def test_pack_block(layout: PageLayout) -> None:
    arguments = make_arguments(layout)
    actual, expected = run(arguments), run(arguments, reference.pack_block)
    blocks = arguments["block_ids"].long()

    for name in COPIES + CODES:  # factors are rounded as the reference rounds them, to the byte
        if layout.has(name) and (layout.rank or name not in CODES):
            assert_bytes_equal(layout.view(actual, name)[blocks], layout.view(expected, name)[blocks], name)

    # Landmarks are sums, in an order of their own: a code may differ where the exact one lies between two.
    means, landmarks = exact_landmarks(arguments)
    mean, wanted = (layout.view(pages, "landmark_mean")[blocks] for pages in (actual, expected))
    assert_close(mean, means, wanted, "landmark_mean")
    scales, wanted = (layout.view(pages, "landmark_scales")[blocks] for pages in (actual, expected))
    assert_close(scales, landmarks.abs().amax(-1) / 7, wanted, "landmark_scales")
    exact = landmarks * 7 / landmarks.abs().amax(-1, keepdim=True)
    codes, wanted = (unpack_nibbles(layout.view(pages, "landmarks")[blocks]).int() for pages in (actual, expected))
    on_boundary = (exact - exact.floor() - 0.5).abs() < 1e-4
    assert torch.equal(codes.where(~on_boundary, 0), wanted.where(~on_boundary, 0))
    assert ((codes - exact).abs() < 0.5 + 1e-4).all()
    cosines, wanted = (layout.view(pages, "outlier_cosines")[blocks] for pages in (actual, expected))
    assert_close(cosines, wanted.double(), None, "outlier_cosines")

    for name in ("landmarks", "landmark_scales", "landmark_mean", "outlier_cosines"):
        layout.view(expected, name)[blocks] = layout.view(actual, name)[blocks]
    assert_bytes_equal(actual, expected, "all other bytes of the pages")


@pytest.mark.parametrize("layout", [LAYOUTS[i] for i in (0, 5, 11, 12, 14)], ids=layout_id)
def test_invalid_ids_are_skipped(layout: PageLayout) -> None:
    arguments = make_arguments(layout, (-1, 0, 2, 5, 2**31 - 1, -(2**31)))
    actual = run(arguments)
    changed = (actual != arguments["pages"]).any(1)
    assert changed.tolist() == [False, False, True, False, False]
    alone = {name: arguments[name][2:3] for name in ("block_ids", "keys", "mean", "coefficients", "basis")}
    assert_bytes_equal(actual, run(arguments | alone))


def test_empty() -> None:
    arguments = make_arguments(simple_layout())
    for name in ("block_ids", "keys", "mean", "coefficients", "basis"):
        arguments[name] = arguments[name][:0]
    assert_bytes_equal(run(arguments), arguments["pages"])


def test_halves_go_to_the_even_code() -> None:
    layout = simple_layout()
    arguments = make_arguments(layout, (1,))
    row = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 0, -0.0, 0.49, 0.51, -127, 1, -1])
    arguments["coefficients"][0, 7] = row
    arguments["basis"][0, 3] = row.repeat(4)
    pages = run(arguments)
    codes = [127, 0, 2, 2, 0, -2, -2, 126, -126, 0, 0, 0, 1, -127, 1, -1]
    assert layout.view(pages, "coefficients")[1, 7].tolist() == codes
    assert layout.view(pages, "basis")[1, 0, 3].tolist() == codes * 4
    assert layout.view(pages, "coefficient_scales")[1, 7] == 1


def test_tiny_rows() -> None:
    """The inverse of their scale is infinite; zeros in them stay zeros all the same."""
    layout = simple_layout()
    arguments = make_arguments(layout, (1,))
    arguments["coefficients"][0, 7] = torch.tensor([1.27e-37, 0, -1.27e-37, 0] * 4)
    pages = run(arguments)
    assert layout.view(pages, "coefficients")[1, 7].tolist() == [127, 0, -127, 0] * 4
    assert layout.view(pages, "coefficient_scales")[1, 7] > 0


def tail_layout() -> PageLayout:
    """Of the kernel's default dtype, with a tail of 16 directions."""
    layout = make_layout(1, 64, block_size=64, rank=32, leading_rank=16, num_outliers=0, compression=1)
    assert (layout.rank, layout.leading_rank) == (32, 16)
    return layout


@pytest.mark.parametrize(
    ("leading", "tail", "scale", "step"),
    [
        (127, 7, 1, 1),  # a code is worth a step
        (127, 21, 1, 3),
        (127, 0.7, 1, 1),  # and not less
        (127, 7 * 17, 1, 17),
        (1, 7 * 17, 1, 17),  # the tail is the larger one
        (0, 7 * 17, 1, 17),
        (127, 0, 1, 1),
        (0, 0, 0, 1),
    ],
)
def test_the_tails_step(leading: float, tail: float, scale: float, step: int) -> None:
    """Codes of a tail count steps of the scale, whichever of the two kinds is the larger."""
    layout = tail_layout()
    arguments = make_arguments(layout, (1,))
    shape = torch.tensor([1, -1, 0.5, 0] * 4)
    arguments["coefficients"][0, 7] = torch.cat((leading * shape, tail * shape))
    pages = run(arguments)
    parts = [layout.view(pages, name)[1, 7:8] for name in COEFFICIENTS]
    assert parts[3].item() == scale
    assert parts[2].item() == step
    stored = coefficients_of(*parts)[0]
    unit = torch.tensor([scale] * 16 + [scale * step] * 16)
    assert ((stored - arguments["coefficients"][0, 7]).abs() <= 0.5 * unit).all()
    assert (stored[16:] / step).abs().max() <= 7 * scale
    expected = run(arguments, reference.pack_block)
    for name in COEFFICIENTS:
        assert_bytes_equal(layout.view(pages, name), layout.view(expected, name), name)


def test_where_the_tails_codes_lie() -> None:
    layout = tail_layout()
    arguments = make_arguments(layout, (1,))
    codes = torch.tensor([-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 7])
    arguments["coefficients"][0, 0] = torch.cat((torch.full((16,), 127.0), 5 * codes))
    row = layout.view(run(arguments), "tail_coefficients")[1, 0]
    assert [(byte % 16 - 8, byte // 16 - 8) for byte in row.tolist()] == list(
        zip(*codes.view(2, 8).tolist(), strict=True)
    )


def test_zeros() -> None:
    """Zero rows have scale 0; chunks without a direction are the worst outliers, the lower first."""
    layout = LAYOUTS[5]
    arguments = make_arguments(layout, (2,))
    for name in ("keys", "mean", "coefficients", "basis"):
        arguments[name] = torch.zeros_like(arguments[name])
    pages = run(arguments)
    for name in ("coefficients", "basis", "coefficient_scales", "landmark_scales", "landmark_mean"):
        assert not layout.view(pages, name)[2].any(), name
    for name in ("tail_coefficients", "landmarks"):
        assert (layout.view(pages, name)[2] == 0x88).all(), name
    assert layout.view(pages, "outlier_ids")[2].tolist() == [[0, 1, 2]] * layout.num_kv_heads
    assert not layout.view(pages, "outlier_cosines")[2].any()


@pytest.mark.parametrize("layout", [LAYOUTS[i] for i in (1, 3, 5, 10, 14)], ids=layout_id)
def test_ties_go_to_the_lower_chunk(layout: PageLayout) -> None:
    """Equal chunks have equal cosines, bit for bit; two that are worse come before them."""
    arguments = make_arguments(layout, (2,))
    chunks = arguments["keys"].view(layout.chunks, layout.chunk_size, layout.num_kv_heads, layout.head_size)
    chunks[:] = chunks[0].abs() + 1
    chunks[-1, 3] *= -1
    chunks[2, 0] *= -1
    ids = layout.view(run(arguments), "outlier_ids")[2]
    for head in range(layout.num_kv_heads):
        assert sorted(ids[head, :2].tolist()) == [2, layout.chunks - 1]
        assert ids[head, 2] == 0


def test_where_a_landmarks_codes_lie() -> None:
    """Two halves of a head, side by side; codes count sevenths of the largest offset from the block's mean key."""
    layout = make_layout(1, 64, block_size=64, rank=16, num_outliers=0, compression=1)
    arguments = make_arguments(layout, (1,))
    codes = torch.cat((torch.arange(-7, 8), torch.zeros(17), torch.arange(7, -8, -1), torch.ones(17)))
    keys = arguments["keys"][0, :, 0].view(layout.chunks, layout.chunk_size, 64)
    keys[:] = 3
    keys[2] += 0.5 * codes
    keys[5] -= 0.5 * codes
    page = run(arguments)
    assert (layout.view(page, "landmark_mean")[1] == 3).all()
    assert layout.view(page, "landmark_scales")[1, 0].tolist() == [0, 0, 0.5, 0, 0, 0.5, 0, 0]
    low, high = codes.int().tolist()[:32], codes.int().tolist()[32:]
    for chunk, sign in ((2, 1), (5, -1)):
        stored = layout.view(page, "landmarks")[1, 0, chunk].tolist()
        assert stored == [8 + sign * a + 16 * (8 + sign * b) for a, b in zip(low, high, strict=True)]


def test_planted_outlier() -> None:
    """The chunk that its mean describes badly is found, per head, and its keys are kept to the byte."""
    layout = LAYOUTS[7]
    arguments = make_arguments(layout, (4,))
    planted = [(5 * head + 2) % layout.chunks for head in range(layout.num_kv_heads)]
    chunks = arguments["keys"].view(layout.chunks, layout.chunk_size, layout.num_kv_heads, layout.head_size)
    chunks[:] = 1 + 0.1 * chunks
    for head, chunk in enumerate(planted):
        chunks[chunk, 4, head] = -3
    pages = run(arguments)
    assert layout.view(pages, "outlier_ids")[4].flatten().tolist() == planted
    for head, chunk in enumerate(planted):
        assert_bytes_equal(layout.view(pages, "outlier_keys")[4, head, 0], chunks[chunk, :, head])


@pytest.mark.parametrize("layout", [LAYOUTS[i] for i in (1, 3, 5, 12, 14)], ids=layout_id)
def test_nan_and_infinity(layout: PageLayout) -> None:
    """They spoil the rows they are in, and their chunk is no outlier, as a NaN orders last."""
    clean = make_arguments(layout, (2,))
    arguments = {name: part.clone() if isinstance(part, Tensor) else part for name, part in clean.items()}
    keys = arguments["keys"].view(layout.chunks, layout.chunk_size, layout.num_kv_heads, layout.head_size)
    keys[1, 3, 0, 17] = torch.nan
    keys[4, 2, 0, 4] = -torch.inf
    if layout.rank:
        arguments["coefficients"][0, 9, 3] = torch.nan
        arguments["basis"][0, 5, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 127.4])
    pages, expected = run(arguments), run(arguments, reference.pack_block)
    scales, wanted = (layout.view(each, "landmark_scales")[2] for each in (pages, expected))
    assert scales[0, 1].isnan()
    assert scales[0, 4].isinf()
    assert_close(scales, wanted.double(), wanted)
    assert_bytes_equal(layout.view(pages, "outlier_ids")[2], layout.view(expected, "outlier_ids")[2])
    if layout.rank:
        assert layout.view(pages, "coefficient_scales")[2, 9].isnan()
        got, wanted = (layout.view(each, "coefficient_scales")[2].nan_to_num() for each in (pages, expected))
        assert_bytes_equal(got, wanted)
        assert layout.view(pages, "basis")[2, 0, 5, :4].tolist() == [0, 127, -127, 127]
    untouched = [chunk for chunk in range(layout.chunks) if chunk not in (1, 4)]
    assert scales[0, untouched].isfinite().all()
    mean, wanted = (layout.view(each, "landmark_mean")[2] for each in (pages, expected))
    assert_close(mean, wanted.double(), None, "landmark_mean")
    codes, wanted = (unpack_nibbles(layout.view(each, "landmarks")[2, 0, untouched]) for each in (pages, expected))
    assert (codes - wanted).abs().max() <= 1  # where the exact one lies between two
    assert (codes != wanted).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outliers_in_order(dtype: torch.dtype) -> None:
    """With room for all chunks the list is the reference's whole order, NaN at its end."""
    layout = make_layout(2, 64, dtype, block_size=128, compression=1, rank=16, num_outliers=16)
    arguments = make_arguments(layout, (2,))
    arguments["keys"][0, [3, 90], 1, 4] = torch.nan
    pages, expected = run(arguments), run(arguments, reference.pack_block)
    ids, wanted = (layout.view(each, "outlier_ids")[2] for each in (pages, expected))
    assert_bytes_equal(ids, wanted)
    assert ids[1, -2:].tolist() == [0, 11]
    assert ids.sort(-1).values.tolist() == [list(range(16))] * 2
    cosines = layout.view(pages, "outlier_cosines")[2]
    assert_close(cosines, layout.view(expected, "outlier_cosines")[2].double())


def test_strided_pages_and_threads() -> None:
    """Rows of the pool may lie apart; how many threads share the work does not matter."""
    arguments = make_arguments(LAYOUTS[1])
    expected = run(arguments)
    wide = torch.full((5, expected.shape[1] + 80), 255, dtype=torch.uint8)
    wide[:, :-80] = arguments["pages"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ops.pack_block(**(arguments | {"pages": wide[:, :-80]}))
    finally:
        torch.set_num_threads(before)
    assert_bytes_equal(wide[:, :-80], expected)
    assert (wide[:, -80:] == 255).all()


@pytest.mark.cpu_kernel
def test_opcheck() -> None:
    arguments = make_arguments(simple_layout())
    arguments["layout"] = arguments["layout"].ints
    torch.library.opcheck(torch.ops.shadowkv.pack_block.default, tuple(arguments.values()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("block_ids", lambda t: t.long(), "block_ids: expected dtype Int, got Long"),
        ("block_ids", lambda t: t[None], "block_ids: expected 1 dimensions"),
        ("keys", lambda t: t.half(), "keys: expected dtype DTYPE, got Half"),
        ("keys", lambda t: t[:, :-8].contiguous(), r"keys: expected shape \[2, 64, 1, 64\], got \[2, 56, 1, 64\]"),
        ("keys", lambda t: t.repeat(1, 1, 2, 1)[:, :, ::2], "keys: expected contiguous memory"),
        ("query_scales", lambda t: t[:-1], r"query_scales: expected shape \[64\], got \[63\]"),
        ("query_scales", lambda t: t.half(), "query_scales: expected dtype Float, got Half"),
        ("mean", lambda t: t.double(), "mean: expected dtype Float, got Double"),
        ("coefficients", lambda t: t[..., :-1], "coefficients: expected contiguous memory"),
        ("coefficients", lambda t: t[:1], r"coefficients: expected shape \[2, 64, 16\], got \[1, 64, 16\]"),
        ("basis", lambda t: t.transpose(1, 2).contiguous(), r"basis: expected shape \[2, 16, 64\], got \[2, 64, 16\]"),
        ("pages", lambda t: t[0], "pages: expected 2 dimensions"),
        ("pages", lambda t: t.repeat(1, 2), r"pages: expected shape \[any, \d+\], got"),
    ],
)
def test_errors(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = make_arguments(simple_layout())
    ops.pack_block(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message.replace("DTYPE", default_dtype_name())):
        ops.pack_block(**arguments)


def test_the_cuda_kernel_wants_aligned_pages(kernel: str) -> None:
    """It writes 16 bytes at a time."""
    arguments = make_arguments(simple_layout())
    expected = run(arguments)
    wide = torch.zeros(5, expected.shape[1] + 8, dtype=torch.uint8)
    wide[:, :-8] = arguments["pages"]
    unaligned = arguments | {"pages": wide[:, :-8]}
    if kernel == "cpu":
        ops.pack_block(**unaligned)
        assert_bytes_equal(wide[:, :-8], expected)
    else:
        with pytest.raises(RuntimeError, match="pages: expected rows aligned to 16 bytes"):
            ops.pack_block(**unaligned)
