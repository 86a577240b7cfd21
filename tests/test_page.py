from __future__ import annotations

import re
from dataclasses import fields
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import garbage_pages, make_generator
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_shadowkv.codes import NIBBLE_CODE, NIBBLE_OFFSET, TAIL_GROUP, TAIL_STEP
from vllm_shadowkv.config import LOCAL_CHUNKS, SINK_CHUNKS, ShadowKVConfig
from vllm_shadowkv.page import ALIGNMENT, DTYPES, HEAD_SIZES, ROW_ALIGNMENT, PageLayout, plan_page

HEADER = (Path(__file__).parent.parent / "csrc/layout.h").read_text()

FACTORS = {"coefficients", "tail_coefficients", "tail_steps", "coefficient_scales", "basis", "mean", "outlier_keys"}
ALWAYS = {"landmarks", "landmark_scales", "landmark_mean", "outlier_ids", "outlier_cosines", "mean_values"}
SLOTS = {"slot_keys", "slot_values", "slot_tags", "slot_used", "slot_epoch"}

KV_HEADS = (1, 2, 3, 4, 8, 16, 32)


def plan(
    num_kv_heads: int = 8, head_size: int = 128, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> PageLayout:
    return plan_page(ShadowKVConfig(**changes), num_kv_heads, head_size, dtype)


FAST = settings(deadline=None, max_examples=60)


@st.composite
def layouts(draw: st.DrawFn, small: bool = False) -> PageLayout:
    """Any layout that fits; `small` ones where bytes are moved."""
    key_codec = draw(st.sampled_from(["int8", "none"]))
    block_size = draw(st.sampled_from([64, 128, 256] if small else [64, 128, 512, 1024, 2048]))
    # Exact keys take half of a page of compression 1; landmarks have to go somewhere, too.
    compression = draw(st.sampled_from([1] if key_codec == "none" else [1, 2, 4, 8, 16]))
    chunk_size = draw(st.sampled_from([8, 16]))
    assume(block_size % (16 * compression) == 0)
    try:
        return plan(
            draw(st.sampled_from(KV_HEADS[:4] if small else KV_HEADS)),
            draw(st.sampled_from(HEAD_SIZES)),
            draw(st.sampled_from(DTYPES)),
            block_size=block_size,
            compression=compression,
            chunk_size=chunk_size,
            sparse_budget=chunk_size,
            num_outlier_chunks=draw(st.integers(0, 2)),
            rank=draw(st.none() | st.integers(1, 20).map(lambda n: n * 16)),
            key_codec=key_codec,
            value_dtype=draw(st.sampled_from(["auto", "int8"])),
        )
    except ValueError as error:
        assume("do not fit a page" not in str(error))
        raise


def expected_sections(layout: PageLayout) -> set[str]:
    return (FACTORS if layout.rank else {"exact_keys"}) | ALWAYS | SLOTS


def byte_ranges(layout: PageLayout, names: set[str]) -> list[tuple[int, int, str]]:
    """Where the sections' bytes lie in a page, as the views say."""
    page = torch.empty(1, layout.page_bytes, dtype=torch.uint8)
    ranges = []
    for name in names:
        view = layout.view(page, name)
        assert view.is_contiguous()
        start = view.data_ptr() - page.data_ptr()
        ranges.append((start, start + view.numel() * view.element_size(), name))
    return sorted(ranges)


@FAST
@given(layouts())
def test_sections_are_aligned_and_apart_and_inside_the_page(layout: PageLayout) -> None:
    for encoding in (expected_sections(layout) - SLOTS, SLOTS):
        ranges = byte_ranges(layout, encoding)
        assert all(start % ALIGNMENT == 0 for start, _, _ in ranges)
        for (_, end, name), (start, _, following) in pairwise(ranges):
            assert end <= start, f"{name} runs into {following}"
        assert ranges[-1][1] <= layout.page_bytes, f"{ranges[-1][2]} leaves the page"


@FAST
@given(layouts())
def test_a_page_of_any_encoding_has_the_bytes_of_an_exact_one(layout: PageLayout) -> None:
    item = layout.dtype.itemsize
    assert layout.page_bytes == layout.exact_tokens * 2 * layout.width * item
    assert layout.value_row_bytes == layout.block_size * layout.num_kv_heads * (
        layout.head_size + 4 if layout.value_int8 else layout.head_size * item
    )
    assert 1 <= layout.slots_per_page <= layout.exact_tokens // layout.chunk_size


@FAST
@given(layouts())
def test_sections_are_those_of_the_key_codec(layout: PageLayout) -> None:
    present = {name for name in FACTORS | {"exact_keys"} | ALWAYS | SLOTS if layout.has(name)}
    assert present == expected_sections(layout)
    assert not layout.has("page_bytes")
    with pytest.raises(KeyError):
        layout.view(torch.empty(1, layout.page_bytes, dtype=torch.uint8), "mean" if not layout.rank else "exact_keys")


def shapes(layout: PageLayout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What csrc/layout.h says of every section."""
    names = "num_kv_heads block_size chunks chunk_size head_size rank leading_rank num_outliers slots_per_page"
    sizes: dict[str, int] = {name: getattr(layout, name) for name in names.split()}
    sizes["tail_bytes"] = (layout.rank - layout.leading_rank) // 2
    sizes["landmark_bytes"] = layout.head_size // 2
    dtypes = {"uint8": torch.uint8, "int8": torch.int8, "int32": torch.int32, "int64": torch.int64}
    dtypes |= {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = {}
    comments = re.findall(r"int64_t (\w+);\s+// (u?int8|int32|int64|fp32|bf16|dtype)(?: \[([\w, ]+)\])?", HEADER)
    for name, dtype, shape in comments:
        found[name] = (
            tuple(sizes[size] for size in shape.split(", ")) if shape else (),
            layout.dtype if dtype == "dtype" else dtypes[dtype],
        )
    return found


@FAST
@given(layouts())
def test_views_have_the_shapes_of_the_header(layout: PageLayout) -> None:
    pages = torch.empty(2, layout.page_bytes, dtype=torch.uint8)
    expected = shapes(layout)
    assert set(expected) == FACTORS | {"exact_keys"} | ALWAYS | SLOTS
    for name in expected_sections(layout):
        shape, dtype = expected[name]
        view = layout.view(pages, name)
        assert view.shape == (2, *shape), name
        assert view.dtype == dtype, name


def numbers(shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    generator = make_generator("page", seed, str(dtype))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


@settings(deadline=None, max_examples=25)
@given(layouts(small=True))
def test_views_share_the_pages_memory_and_keep_what_is_written(layout: PageLayout) -> None:
    pages = garbage_pages(make_generator("views"), 2, layout.page_bytes)
    for encoding in (expected_sections(layout) - SLOTS, SLOTS):
        written = {}
        for seed, name in enumerate(sorted(encoding)):
            view = layout.view(pages, name)
            written[name] = numbers(view.shape, view.dtype, seed)
            view.copy_(written[name])
        for name, content in written.items():
            assert torch.equal(layout.view(pages, name), content), name
            assert layout.view(pages, name).untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()


@settings(deadline=None, max_examples=25)
@given(layouts(small=True))
def test_exact_pages_hold_k_and_v_as_vllms_cpu_kernel_stores_them(layout: PageLayout) -> None:
    heads, tokens, size = layout.num_kv_heads, layout.exact_tokens, layout.head_size
    pages = garbage_pages(make_generator("exact"), 2, layout.page_bytes)
    keys, values = layout.exact_views(pages)
    assert keys.shape == values.shape == (2, heads, tokens, size)
    k, v = numbers(keys.shape, layout.dtype, 1), numbers(values.shape, layout.dtype, 2)
    keys.copy_(k)
    values.copy_(v)
    # Per head: keys [head_size, tokens], then values [tokens, head_size]; they fill the page.
    flat = pages.view(layout.dtype).view(2, heads, 2, tokens * size)
    assert torch.equal(flat[:, :, 0].reshape(2, heads, size, tokens).transpose(2, 3), k)
    assert torch.equal(flat[:, :, 1].reshape(2, heads, tokens, size), v)


@settings(deadline=None, max_examples=25)
@given(layouts(small=True))
def test_host_rows_hold_values_and_scales(layout: PageLayout) -> None:
    pool = garbage_pages(make_generator("pool"), 2, layout.value_row_bytes)
    values, scales = layout.value_views(pool)
    shape = (2, layout.num_kv_heads, layout.chunks, layout.chunk_size)
    assert values.shape == (*shape, layout.head_size)
    assert values.dtype == (torch.int8 if layout.value_int8 else layout.dtype)
    # A GPU reads lines of 128 bytes: none holds parts of two rows, nor a scale beside a value.
    assert layout.value_row_bytes % ROW_ALIGNMENT == 0
    assert values[0].is_contiguous()
    assert values.element_size() * values[0].numel() % ROW_ALIGNMENT == 0
    content = numbers(values.shape, values.dtype, 1)
    values.copy_(content)
    num_bytes = values.numel() * values.element_size()
    if layout.value_int8:
        assert scales is not None
        assert scales.shape == shape
        assert scales.dtype == torch.float32
        scale = numbers(scales.shape, torch.float32, 2)
        scales.copy_(scale)
        assert torch.equal(scales, scale)
        num_bytes += scales.numel() * 4
    else:
        assert scales is None
    assert torch.equal(values, content)
    assert num_bytes == pool.numel()


def test_kernels_read_the_fields_in_this_order() -> None:
    struct = re.search(r"struct PageLayout \{(.*?)\n\n  constexpr int64_t chunks\(\)", HEADER, re.DOTALL)
    assert struct
    members = re.findall(r"^  int64_t (\w+);", struct[1], re.MULTILINE)
    assert members == [field.name for field in fields(PageLayout)]
    layout = plan()
    assert layout.ints == [getattr(layout, name) for name in members]
    assert all(type(number) is int for number in layout.ints)


def test_constants_of_the_header() -> None:
    constants = dict(re.findall(r"constexpr int64_t k(\w+)Chunks = (\d+);", HEADER))
    assert constants == {"Sink": str(SINK_CHUNKS), "Local": str(LOCAL_CHUNKS)}
    codes = dict(re.findall(r"constexpr int k(\w+) = (\d+);", HEADER))
    expected = {
        "NibbleCode": NIBBLE_CODE,
        "NibbleOffset": NIBBLE_OFFSET,
        "TailGroup": TAIL_GROUP,
        "TailStep": TAIL_STEP,
    }
    assert {name: int(value) for name, value in codes.items()} == expected
    dtypes = dict(re.findall(r"k(Float|Half|BFloat16) = (\d)", HEADER))
    assert dtypes == {"Float": "0", "Half": "1", "BFloat16": "2"}
    assert list(DTYPES) == [torch.float32, torch.float16, torch.bfloat16]


def test_llama_3_1_8b() -> None:
    layout = plan(num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    assert layout.page_bytes == 512 * 1024
    assert layout.exact_tokens == 128
    assert (layout.rank, layout.leading_rank) == (256, 48)
    bytes_per_sealed_token = layout.page_bytes / layout.block_size
    assert bytes_per_sealed_token * 8 == 2 * 8 * 128 * torch.bfloat16.itemsize
    assert 14 <= layout.slots_per_page <= 16
    # A mean value per head takes 1/256 of the page, which the rank does not need.
    assert layout.view(torch.empty(1, layout.page_bytes, dtype=torch.uint8), "mean_values").nbytes * 256 == 512 * 1024


@pytest.mark.parametrize(
    ("num_kv_heads", "block_size", "ranks"),
    [
        (8, 1024, range(256, 257)),
        (4, 1024, range(192, 193)),
        (4, 2048, range(256, 305)),
        (2, 1024, range(112, 113)),
        (1, 1024, range(64, 65)),
    ],
)
def test_rank_of_usual_shapes(num_kv_heads: int, block_size: int, ranks: range) -> None:
    assert plan(num_kv_heads, block_size=block_size).rank in ranks


def sealed_bytes(layout: PageLayout) -> int:
    """What the sections of a shadow page take of it."""
    return sum(
        -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        for name, (shape, dtype) in shapes(layout).items()
        if name in FACTORS | ALWAYS
    )


@FAST
@given(layouts())
def test_the_rank_is_the_largest_that_fits(layout: PageLayout) -> None:
    assume(layout.rank)
    assert layout.rank % 16 == 0
    assert layout.rank <= min(layout.block_size, layout.width)
    used = sealed_bytes(layout)
    per_rank = layout.block_size // 2 + layout.width  # a column of coefficients, a row of the basis
    whole = plan(
        layout.num_kv_heads,
        layout.head_size,
        layout.dtype,
        block_size=layout.block_size,
        compression=layout.block_size // layout.exact_tokens,
        chunk_size=layout.chunk_size,
        sparse_budget=layout.chunk_size,
        num_outlier_chunks=layout.num_outliers,
    )
    assert layout.rank <= whole.rank, "a cap raised the rank"
    if layout.rank == whole.rank < min(layout.block_size, layout.width) // 16 * 16:
        used -= (layout.leading_rank - 16) * layout.block_size // 2
        assert used + 16 * per_rank > layout.page_bytes - 3 * ALIGNMENT, "16 more would fit"


@FAST
@given(layouts())
def test_what_is_left_over_makes_coefficients_finer(layout: PageLayout) -> None:
    assume(layout.rank)
    assert layout.leading_rank % 16 == 0
    assert 16 <= layout.leading_rank <= layout.rank
    used = sealed_bytes(layout)
    if layout.leading_rank < layout.rank:
        assert used + 8 * layout.block_size > layout.page_bytes - 2 * ALIGNMENT, "16 more would fit"


def test_the_rank_can_be_capped() -> None:
    assert plan(rank=160).rank == 160
    assert plan(rank=1024).rank == plan().rank


def test_a_page_that_holds_everything_keeps_full_rank() -> None:
    assert plan(num_kv_heads=1, head_size=64, block_size=64, compression=1).rank == 64


def test_exact_keys() -> None:
    layout = plan(key_codec="none", compression=1)
    assert layout.rank == 0
    assert layout.exact_tokens == layout.block_size
    assert not layout.has("outlier_keys")


@pytest.mark.parametrize(
    ("arguments", "changes", "sentence"),
    [
        ((8, 72, torch.bfloat16), {}, "head sizes 64, 80, 96, 128, 256, got 72; use another --attention-backend"),
        ((8, 128, torch.float64), {}, "float32, float16 and bfloat16, got torch.float64; use another --dtype"),
        ((8, 128, torch.float8_e4m3fn), {}, "got torch.float8_e4m3fn"),
        ((0, 128, torch.bfloat16), {}, "at least one KV head, got 0"),
        ((8, 128, torch.bfloat16), {"key_codec": "none"}, r"exact keys \(key_codec none\), landmarks"),
        (
            (1, 64, torch.bfloat16),
            {"compression": 16, "num_outlier_chunks": 8},
            r"1 KV heads of 64\); lower compression \(16\) or num_outlier_chunks \(8\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Any, ...], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan(*arguments, **changes)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("num_kv_heads", KV_HEADS)
def test_the_defaults_fit_every_shape(num_kv_heads: int, head_size: int) -> None:
    for dtype in DTYPES:
        for chunk_size in (8, 16):
            layout = plan(num_kv_heads, head_size, dtype, chunk_size=chunk_size)
            assert layout.rank >= 16
            factors = (layout.rank + 15) * (layout.block_size // 2 + layout.width)  # ranks come in steps of 16
            assert layout.rank == layout.width or factors > 0.4 * layout.page_bytes
