from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from generators import default_dtype_name, garbage_pages, make_generator, make_layout, randn
from numeric import assert_bytes_equal, assert_close
from torch import Tensor

from vllm_shadowkv import ops, reference
from vllm_shadowkv.page import PageLayout

Arguments = dict[str, Any]
OUTSIDE = 2**31 - 1

LAYOUTS = [
    make_layout(heads, size, dtype, block_size=192, compression=compression, chunk_size=chunk, value_int8=int8)
    for heads, size, compression, chunk, dtype in [
        (1, 64, 4, 8, torch.float32),
        (2, 80, 4, 16, torch.float16),
        (8, 96, 2, 8, torch.bfloat16),
        (1, 128, 2, 8, torch.float16),
        (2, 256, 4, 16, torch.bfloat16),
        (8, 128, 1, 8, torch.float32),
        (2, 80, 1, 16, torch.bfloat16),
        (1, 64, 4, 8, torch.float16),
        (8, 128, 1, 8, torch.bfloat16),
    ]
    for int8 in (False, True)
]


def layout_id(layout: PageLayout) -> str:
    return (
        f"h{layout.num_kv_heads}-d{layout.head_size}-{str(layout.dtype).removeprefix('torch.')}-t{layout.exact_tokens}-"
        f"c{layout.chunk_size}{'-int8' if layout.value_int8 else ''}"
    )


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)


def make_arguments(layout: PageLayout, block_ids: tuple[int, ...] = (3, 1)) -> Arguments:
    """Arguments of the op in its order; values lie as vLLM's CPU attention stores them."""
    generator = make_generator("store", layout_id(layout), block_ids)
    n, pages_per_block = len(block_ids), layout.block_size // layout.exact_tokens
    pages = garbage_pages(generator, n * pages_per_block + 2, layout.page_bytes)
    values = layout.exact_views(pages)[1]
    values.copy_(randn(generator, *values.shape, dtype=layout.dtype))
    exact_ids = torch.randperm(len(pages) - 1, generator=generator)[: n * pages_per_block] + 1
    return {
        "block_ids": torch.tensor(block_ids, dtype=torch.int32),
        "exact_ids": exact_ids.int().view(n, pages_per_block),
        "exact_values": values,
        "pages": garbage_pages(generator, 5, layout.page_bytes),
        "host_pool": garbage_pages(generator, 5, layout.value_row_bytes),
        "layout": layout,
    }


def run(arguments: Arguments, function: Callable[..., None] = ops.store_values) -> Tensor:
    """The host pool after a call; `arguments["pages"]` are written."""
    guarded = torch.full((6, arguments["host_pool"].shape[1]), 0xA5, dtype=torch.uint8)
    host_pool = guarded[:5]
    host_pool.copy_(arguments["host_pool"])
    function(**(arguments | {"host_pool": host_pool}))
    assert (guarded[5] == 0xA5).all(), "a write behind the pool"
    return host_pool


@every_layout
@pytest.mark.parametrize("storage", ["cpu", "cuda", "contiguous", "tokens first"])
def test_store_values(layout: PageLayout, storage: str) -> None:
    """To the byte, int8 too; from values that lie as vLLM's CPU and CUDA attention store them, and otherwise."""
    arguments = make_arguments(layout)
    values = arguments["exact_values"]
    assert not values.is_contiguous()
    if storage == "cuda":
        both = torch.cat((torch.full_like(values, torch.nan), values), -1)
        values = both[..., layout.head_size :]
    elif storage == "contiguous":
        values = values.contiguous()
    elif storage == "tokens first":
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    arguments["exact_values"] = values
    actual = run(arguments)
    assert_bytes_equal(actual, run(arguments, reference.store_values))
    assert (actual != arguments["host_pool"]).any(1).tolist() == [False, True, False, True, False]


@every_layout
def test_mean_values(layout: PageLayout) -> None:
    """Of the exact values, int8 or not; nothing else in the pages is written."""
    arguments = make_arguments(layout)
    before, pages = arguments["pages"].clone(), arguments["pages"]
    run(arguments)
    means = layout.view(pages, "mean_values")
    for i, block in enumerate(arguments["block_ids"].tolist()):
        values = arguments["exact_values"][arguments["exact_ids"][i].long()].transpose(0, 1).flatten(1, 2)
        assert_close(means[block], values.double().mean(1), values.float().mean(1).to(layout.dtype))
        layout.view(before, "mean_values")[block] = means[block]
    assert_bytes_equal(pages, before)
    oracle = arguments | {"pages": before}
    run(oracle, reference.store_values)
    assert_close(means[[1, 3]], layout.view(before, "mean_values")[[1, 3]].float())


def test_a_mean_value_does_not_depend_on_the_other_blocks() -> None:
    arguments = make_arguments(make_layout(2, 64, block_size=192))
    run(arguments)
    alone = arguments | {"pages": torch.zeros_like(arguments["pages"])}
    alone |= {name: arguments[name][1:] for name in ("block_ids", "exact_ids")}
    run(alone)
    first, second = (arguments["layout"].view(x["pages"], "mean_values")[1] for x in (arguments, alone))
    assert_bytes_equal(first, second)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_one_dimension_of_the_mean(value: float) -> None:
    arguments = make_arguments(make_layout(2, 64, block_size=192))
    arguments["exact_values"][int(arguments["exact_ids"][0, 1]), 1, 7, 5] = value
    run(arguments)
    finite = arguments["layout"].view(arguments["pages"], "mean_values")[[3, 1]].isfinite()
    assert (~finite).nonzero().tolist() == [[0, 1, 5]]


@pytest.mark.parametrize("layout", LAYOUTS[:8], ids=layout_id)
@pytest.mark.parametrize("bad", [-1, 0, 64, OUTSIDE, -(2**31)])
@pytest.mark.parametrize("name", ["block_ids", "exact_ids"])
def test_invalid_ids_skip_the_block(layout: PageLayout, bad: int, name: str) -> None:
    arguments = make_arguments(layout)
    arguments[name][(0, -1)[: arguments[name].dim()]] = bad
    pages = arguments["pages"].clone()
    actual = run(arguments)
    assert (arguments["pages"] != pages).any(1).tolist() == [False, True, False, False, False]
    assert_bytes_equal(actual, run(arguments, reference.store_values))
    assert (actual != arguments["host_pool"]).any(1).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("number", ["exact pages", "pages", "rows"])
def test_first_id_outside(number: str) -> None:
    """The bounds are those of the tensor an id points into."""
    arguments = make_arguments(make_layout(1, 64, block_size=192))
    if number == "exact pages":
        arguments["exact_ids"][0, 1] = len(arguments["exact_values"])
    elif number == "pages":
        arguments["pages"] = arguments["pages"][:3]
    else:
        arguments["block_ids"][0] = len(arguments["host_pool"])
    actual = run(arguments)
    assert (actual != arguments["host_pool"]).any(1).tolist() == [False, True, False, False, False]


def test_empty() -> None:
    arguments = make_arguments(make_layout(1, 64, block_size=192))
    for name in ("block_ids", "exact_ids"):
        arguments[name] = arguments[name][:0]
    assert_bytes_equal(run(arguments), arguments["host_pool"])


@pytest.mark.parametrize("dtype_layout", [LAYOUTS[i] for i in (1, 3, 5, 9, 11)], ids=layout_id)
def test_int8_corners(dtype_layout: PageLayout) -> None:
    """Halves to even; a zero token has scale 0; NaN and infinity reach the scale and no other token."""
    layout = dtype_layout
    arguments = make_arguments(layout, (2,))
    page = int(arguments["exact_ids"][0, 0])
    tokens = arguments["exact_values"][page, 0]
    row = torch.zeros(layout.head_size)
    row[:8] = torch.tensor([127, 0.5, 1.5, -0.5, -2.5, 126.5, -127, 3])
    tokens[0], tokens[1], tokens[2, 5], tokens[3, 7] = row.to(layout.dtype), 0, torch.nan, -torch.inf
    host_pool = run(arguments)
    values, scales = layout.value_views(host_pool)
    assert scales is not None
    rounded = row.to(layout.dtype).float()
    assert_bytes_equal(values[2, 0, 0, 0], reference.quantise(rounded)[0])
    if layout.dtype != torch.bfloat16:  # which has no 126.5
        assert values[2, 0, 0, 0, :8].tolist() == [127, 0, 2, 0, -2, 126, -127, 3]
    assert scales[2, 0, 0, :2].tolist() == [1, 0]
    assert not values[2, 0, 0, 1].any()
    assert scales[2, 0, 0, 2].isnan()
    assert scales[2, 0, 0, 3].isinf()
    assert scales[2].isfinite().sum() == scales[2].numel() - 2


@pytest.mark.parametrize("layout", LAYOUTS[2:6], ids=layout_id)
def test_nan_is_copied(layout: PageLayout) -> None:
    arguments = make_arguments(layout)
    arguments["exact_values"][..., 3] = torch.nan
    values, scales = layout.value_views(run(arguments))
    got = scales if scales is not None else values[..., 3]
    assert got[arguments["block_ids"].long()].isnan().all()


@pytest.mark.parametrize("gap", [72, 80])
def test_strided_pool_and_threads(gap: int, kernel: str) -> None:
    """Rows of the pool may lie apart, on CUDA by multiples of 16 bytes; threads that share the work do not matter."""
    arguments = make_arguments(make_layout(8, 128, block_size=192, compression=1))
    expected = run(arguments)
    wide = torch.full((5, expected.shape[1] + gap), 255, dtype=torch.uint8)
    wide[:, :-gap] = arguments["host_pool"]
    if kernel != "cpu" and gap % 16:
        with pytest.raises(RuntimeError, match="host_pool: expected rows aligned to 16 bytes"):
            ops.store_values(**(arguments | {"host_pool": wide[:, :-gap]}))
        return
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ops.store_values(**(arguments | {"host_pool": wide[:, :-gap]}))
    finally:
        torch.set_num_threads(before)
    assert_bytes_equal(wide[:, :-gap], expected)
    assert (wide[:, -gap:] == 255).all()


@pytest.mark.cpu_kernel
def test_opcheck() -> None:
    arguments = make_arguments(make_layout(1, 64, block_size=192))
    arguments["layout"] = arguments["layout"].ints
    torch.library.opcheck(torch.ops.shadowkv.store_values.default, tuple(arguments.values()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("block_ids", lambda t: t.long(), "block_ids: expected dtype Int, got Long"),
        ("exact_ids", lambda t: t[:, :3].contiguous(), r"exact_ids: expected shape \[2, 4\], got \[2, 3\]"),
        ("exact_ids", lambda t: t.repeat(1, 2)[:, ::2], "exact_ids: expected contiguous memory"),
        ("exact_values", lambda t: t.half(), "exact_values: expected dtype DTYPE, got Half"),
        ("exact_values", lambda t: t[:, :, :-1], r"exact_values: expected shape .* got \[10, 1, 47, 64\]"),
        ("exact_values", lambda t: t.repeat(1, 1, 1, 2)[..., ::2], "exact_values: expected stride 1"),
        ("pages", lambda t: t.view(torch.int8), "pages: expected dtype Byte, got Char"),
        ("pages", lambda t: t[:, 64:], "pages: expected shape"),
        (
            "layout",
            lambda x: replace(x, mean_values=x.page_bytes - 64),
            r"layout: mean_values must be \d+ bytes inside a page",
        ),
        ("host_pool", lambda t: t.view(torch.int8), "host_pool: expected dtype Byte, got Char"),
        ("host_pool", lambda t: t[:, 64:], "host_pool: expected shape"),
    ],
)
def test_errors(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = make_arguments(make_layout(1, 64, block_size=192))
    ops.store_values(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message.replace("DTYPE", default_dtype_name())):
        ops.store_values(**arguments)
