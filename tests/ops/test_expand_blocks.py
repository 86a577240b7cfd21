from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from generators import default_dtype_name, make_generator, make_sealed, rope_table
from numeric import assert_bytes_equal, assert_close
from rebuilt import (
    BF16,
    F16,
    F32,
    LAYOUTS,
    WIDE,
    every_layout,
    every_rotary,
    keys64,
    layout_id,
    small_layout,
    values64,
)
from torch import Tensor

from vllm_shadowkv import ops, reference
from vllm_shadowkv.page import PageLayout

Arguments = dict[str, Any]


def make_arguments(layout: PageLayout, rotary_dim: int = 64, is_neox: bool = True, num_blocks: int = 2) -> Arguments:
    """Arguments of the op in its order: all sealed blocks of a row, at any positions."""
    sealed = make_sealed(
        make_generator(layout_id(layout), rotary_dim, is_neox), layout, [num_blocks], spare_ids=2, structured=False
    )
    shape = (num_blocks, layout.block_size, layout.num_kv_heads, layout.head_size)
    first = torch.arange(num_blocks, dtype=torch.int32).flip(0) * layout.block_size
    return {
        "block_ids": sealed.block_table[0, :num_blocks].contiguous(),
        "first_positions": first,
        "pages": sealed.pages,
        "host_pool": sealed.host_pool,
        "cos_sin": rope_table((num_blocks + 1) * layout.block_size, rotary_dim),
        "is_neox": is_neox,
        "layout": layout,
        "keys": torch.full(shape, torch.nan, dtype=layout.dtype),
        "values": torch.full(shape, torch.nan, dtype=layout.dtype),
    }


def run(arguments: Arguments, function: Callable[..., None] = ops.expand_blocks) -> tuple[Tensor, Tensor]:
    """The keys and values that a call writes to memory full of NaN."""
    out = arguments | {name: torch.full_like(arguments[name], torch.nan) for name in ("keys", "values")}
    function(**out)
    return out["keys"], out["values"]


@every_layout
@every_rotary
def test_expand_blocks(layout: PageLayout, rotary_share: float, is_neox: bool) -> None:
    arguments = make_arguments(layout, int(rotary_share * layout.head_size), is_neox)
    pages, host_pool = arguments["pages"].clone(), arguments["host_pool"].clone()
    keys, values = run(arguments)
    same_keys, same_values = run(arguments, reference.expand_blocks)
    assert_bytes_equal(arguments["pages"], pages, "pages")
    assert_bytes_equal(arguments["host_pool"], host_pool, "host_pool")

    blocks = list(zip(arguments["block_ids"].tolist(), arguments["first_positions"].tolist(), strict=True))
    if layout.rank:
        cos_sin = arguments["cos_sin"]
        expected = torch.stack([keys64(pages, block, first, cos_sin, is_neox, layout) for block, first in blocks])
        assert_close(keys, expected, same_keys, "keys")
        for i, (block, _) in enumerate(blocks):
            by_chunk = keys[i].unflatten(0, (layout.chunks, layout.chunk_size))
            ids = layout.view(pages, "outlier_ids")[block].long()
            outlier_keys = layout.view(pages, "outlier_keys")[block]
            for head in range(layout.num_kv_heads):
                assert_bytes_equal(by_chunk[ids[head], :, head], outlier_keys[head], "outliers")
    else:
        assert_bytes_equal(keys, same_keys, "keys")
    if layout.value_int8:
        expected = torch.stack([values64(host_pool, block, layout) for block, _ in blocks])
        assert_close(values, expected, same_values, "values")
    else:
        assert_bytes_equal(values, same_values, "values")


def test_basis_in_panels() -> None:
    test_expand_blocks(WIDE, 1.0, True)


def test_layouts_cover_the_range() -> None:
    """What the parametrised tests promise: every head size, dtype, chunk size, codec and some odd ranks."""
    factors = {(layout.head_size, layout.dtype) for layout in LAYOUTS if layout.rank}
    assert factors == set(product((64, 80, 96, 128, 256), (F32, F16, BF16)))
    assert {layout.chunk_size for layout in LAYOUTS} == {8, 16}
    assert {layout.rank for layout in LAYOUTS} >= {0, 16, 48, 112, 176}
    assert {layout.num_outliers for layout in LAYOUTS} == {0, 1, 3}
    assert {layout.value_int8 for layout in LAYOUTS} == {0, 1}
    assert {layout.num_kv_heads for layout in LAYOUTS} == {1, 2, 3, 8}


@pytest.mark.parametrize("layout", [LAYOUTS[i] for i in (3, 7, 14)], ids=layout_id)
def test_invalid_ids_give_zeros(layout: PageLayout) -> None:
    arguments = make_arguments(layout)
    good = int(arguments["block_ids"][0])
    ids = [-1, 0, good, len(arguments["pages"]), 2**31 - 1, -(2**31)]
    arguments["block_ids"] = torch.tensor(ids, dtype=torch.int32)
    # A position is looked at only where there is a block.
    first = [-5, 2**31 - 1, layout.block_size, 0, 0, 0]
    arguments["first_positions"] = torch.tensor(first, dtype=torch.int32)
    for name in ("keys", "values"):
        arguments[name] = torch.empty(len(ids), *arguments[name].shape[1:], dtype=layout.dtype)
    exact = (
        keys64(arguments["pages"], good, layout.block_size, arguments["cos_sin"], True, layout),
        values64(arguments["host_pool"], good, layout),
    )
    for got, same, expected in zip(run(arguments), run(arguments, reference.expand_blocks), exact, strict=True):
        invalid = torch.tensor([i != 2 for i in range(len(ids))])
        assert_bytes_equal(got[invalid], torch.zeros_like(got[invalid]))
        assert_close(got[2], expected, same[2])


def test_empty() -> None:
    arguments = make_arguments(small_layout())
    for name in ("block_ids", "first_positions", "keys", "values"):
        arguments[name] = arguments[name][:0]
    keys, values = run(arguments)
    assert keys.shape[0] == values.shape[0] == 0


@pytest.mark.parametrize("shape", [(0,), (0, 0), (512, 0)])
def test_no_rotary_table(shape: tuple[int, ...]) -> None:
    """No RoPE: any table without a last dimension will do, and positions have no bound."""
    arguments = make_arguments(LAYOUTS[1], rotary_dim=0)
    expected, _ = run(arguments)
    arguments["cos_sin"] = torch.empty(shape)
    arguments["first_positions"] += 2**30
    keys, _ = run(arguments)
    assert_bytes_equal(keys, expected)


@pytest.mark.parametrize("gap", [72, 80])
def test_strided_pages(gap: int, kernel: str) -> None:
    """Rows of the pool may lie apart; on CUDA by multiples of 16 bytes."""
    arguments = make_arguments(LAYOUTS[5])
    expected = run(arguments)
    for name in ("pages", "host_pool"):
        pages = arguments[name]
        wide = torch.full((len(pages), pages.shape[1] + gap), 255, dtype=torch.uint8)
        wide[:, :-gap] = pages
        arguments[name] = wide[:, :-gap]
    if kernel != "cpu" and gap % 16:
        with pytest.raises(RuntimeError, match="pages: expected rows aligned to 16 bytes"):
            run(arguments)
        return
    for got, want in zip(run(arguments), expected, strict=True):
        assert_bytes_equal(got, want)


@pytest.mark.cpu_kernel
def test_threads_do_not_matter() -> None:
    arguments = make_arguments(LAYOUTS[7], num_blocks=3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(arguments))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert_bytes_equal(got, expected)


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[8]], ids=layout_id)
def test_nan_stays_in_its_token(layout: PageLayout) -> None:
    """A broken scale spoils the keys and values it belongs to, and no other."""
    arguments = make_arguments(layout)
    block = int(arguments["block_ids"][1])
    layout.view(arguments["pages"], "outlier_ids")[block] = -1
    layout.view(arguments["pages"], "coefficient_scales")[block, 21] = torch.nan
    layout.value_views(arguments["host_pool"])[1][block, 1, 3, 5] = torch.nan
    keys, values = run(arguments)
    spoiled_keys, spoiled_values = torch.zeros_like(keys, dtype=torch.bool), torch.zeros_like(keys, dtype=torch.bool)
    spoiled_keys[1, 21] = True
    spoiled_values[1, 3 * layout.chunk_size + 5, 1] = True
    assert torch.equal(keys.isnan(), spoiled_keys)
    assert torch.equal(values.isnan(), spoiled_values)


def test_garbage_outlier_ids_are_nobody() -> None:
    """A page that was never packed reads nothing outside of itself."""
    layout = LAYOUTS[5]
    arguments = make_arguments(layout)
    ids = layout.view(arguments["pages"], "outlier_ids")
    ids[arguments["block_ids"].long()] = torch.tensor([-1, layout.chunks, 2**31 - 1], dtype=torch.int32)
    keys, _ = run(arguments)
    block, first = int(arguments["block_ids"][0]), int(arguments["first_positions"][0])
    ids[block] = 0
    expected = keys64(arguments["pages"], block, first, arguments["cos_sin"], True, layout)
    rest = slice(layout.chunk_size, None)  # the first chunk is the one that `expected` takes for an outlier
    assert_close(keys[0, rest], expected[rest], expected[rest].to(layout.dtype))


@pytest.mark.cpu_kernel
def test_opcheck() -> None:
    arguments = make_arguments(small_layout())
    arguments["layout"] = arguments["layout"].ints
    torch.library.opcheck(torch.ops.shadowkv.expand_blocks.default, tuple(arguments.values()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("block_ids", lambda t: t.long(), "block_ids: expected dtype Int, got Long"),
        ("first_positions", lambda t: t[:1], r"first_positions: expected shape \[2\], got \[1\]"),
        ("pages", lambda t: t[:, :-64], r"pages: expected shape \[any, \d+\], got"),
        ("pages", lambda t: t.view(torch.int8), "pages: expected dtype Byte, got Char"),
        ("host_pool", lambda t: t[1:], "host_pool: expected as many rows as pages, 5, got 4"),
        ("cos_sin", lambda t: t.double(), "cos_sin: expected dtype Float, got Double"),
        ("cos_sin", lambda t: t[0], "cos_sin: expected 2 dimensions"),
        ("cos_sin", lambda t: t[:, :63].contiguous(), "cos_sin: expected an even rotary_dim .* 64, got 63"),
        ("cos_sin", lambda t: t.repeat(1, 2), "cos_sin: expected an even rotary_dim .* 64, got 128"),
        ("keys", lambda t: t.half(), "keys: expected dtype DTYPE, got Half"),
        ("keys", lambda t: t.transpose(0, 1), "keys: expected contiguous memory"),
        ("values", lambda t: t[:, :32], "values: expected contiguous memory"),
        ("values", lambda t: t[:1], "values: expected shape"),
    ],
)
def test_errors(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = make_arguments(small_layout())
    ops.expand_blocks(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message.replace("DTYPE", default_dtype_name())):
        ops.expand_blocks(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "message", "good"),
    [
        ("cos_sin", lambda t: t[: 64 + 63], "a block of 64 tokens within the 127 rows of cos_sin, got 64 at 0", 1),
        ("first_positions", lambda t: t - 1, "a block of 64 tokens within .*, got -1 at 1", 0),
    ],
)
def test_positions_beyond_the_table(
    name: str, change: Callable[[Tensor], Tensor], message: str, good: int, kernel: str
) -> None:
    """The CPU kernel raises; on CUDA the block gets zeros for keys."""
    arguments = make_arguments(small_layout())
    before = arguments[name]
    arguments[name] = change(before)
    if kernel == "cpu":
        with pytest.raises(RuntimeError, match=f"first_positions: expected {message}"):
            ops.expand_blocks(**arguments)
        return
    keys, values = run(arguments)
    assert not keys[1 - good].any()
    assert keys[good].all(-1).any()
    assert_bytes_equal(values, run(arguments | {name: before})[1])


def test_sealed_keys_come_back() -> None:
    """From keys to page to keys: what is lost is noise beyond the rank."""
    layout = small_layout()
    sealed = make_sealed(make_generator("round trip"), layout, [1], structured=True)
    arguments = make_arguments(layout, rotary_dim=0, num_blocks=1)
    arguments["block_ids"] = sealed.block_table[0, :1].contiguous()
    arguments |= {"pages": sealed.pages, "host_pool": sealed.host_pool}
    keys, values = run(arguments)
    assert_bytes_equal(values[0], sealed.values[0].to(layout.dtype))
    error = (keys[0] - sealed.keys[0]).norm() / sealed.keys[0].norm()
    assert error < 0.2
