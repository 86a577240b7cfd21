"""Keys and values of a sealed block in fp64, by another road than `reference.py`: the measure of rebuilding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generators import make_layout
from torch import Tensor

from vllm_shadowkv.page import PageLayout

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

_SHAPES: list[tuple[int, int, torch.dtype, dict[str, Any]]] = [
    (1, 64, F32, {"rank": 16, "num_outliers": 0, "block_size": 64}),
    (8, 64, BF16, {"rank": 48, "leading_rank": 16, "num_outliers": 3, "block_size": 128, "chunk_size": 16}),
    (2, 80, F16, {"rank": 48, "num_outliers": 1, "block_size": 128, "chunk_size": 16, "value_int8": True}),
    (1, 80, F32, {"rank": 48, "leading_rank": 32, "num_outliers": 3, "block_size": 64}),
    (3, 64, F32, {"rank": 80, "num_outliers": 1, "block_size": 128}),
    (2, 96, BF16, {"rank": 112, "leading_rank": 16, "num_outliers": 3, "block_size": 128}),
    (1, 96, F32, {"rank": 80, "num_outliers": 0, "block_size": 128, "chunk_size": 16, "value_int8": True}),
    (2, 128, BF16, {"rank": 176, "leading_rank": 16, "num_outliers": 1, "block_size": 192}),
    (2, 128, F32, {"rank": 176, "leading_rank": 144, "num_outliers": 3, "block_size": 192, "value_int8": True}),
    (1, 128, F16, {"rank": 112, "num_outliers": 1, "block_size": 128}),
    (1, 256, F32, {"rank": 176, "leading_rank": 32, "num_outliers": 3, "block_size": 192, "chunk_size": 16}),
    (2, 256, F16, {"rank": 16, "num_outliers": 1, "block_size": 64, "value_int8": True}),
    (2, 64, F32, {"rank": 0, "num_outliers": 1, "block_size": 128}),
    (8, 80, BF16, {"rank": 0, "num_outliers": 0, "block_size": 64, "chunk_size": 16}),
    (1, 128, F16, {"rank": 0, "num_outliers": 3, "block_size": 64, "value_int8": True}),
    (1, 64, F16, {"rank": 64, "leading_rank": 32, "num_outliers": 1, "block_size": 192, "value_int8": True}),
    (1, 80, BF16, {"rank": 80, "leading_rank": 64, "num_outliers": 3, "block_size": 128}),
    (1, 96, F16, {"rank": 16, "num_outliers": 0, "block_size": 64}),
    (
        1,
        256,
        BF16,
        {"rank": 176, "leading_rank": 16, "num_outliers": 1, "block_size": 192, "chunk_size": 16, "value_int8": True},
    ),
]


def _layout(num_kv_heads: int, head_size: int, dtype: torch.dtype, options: dict[str, Any]) -> PageLayout:
    rank = options["rank"]
    options = options | {"rank": rank or None, "exact_keys": rank == 0, "compression": 1}
    layout = make_layout(num_kv_heads, head_size, dtype, **options)
    assert layout.rank == rank, f"rank {rank} does not fit, {layout.rank} does"
    return layout


LAYOUTS = [_layout(*shape) for shape in _SHAPES]
WIDE = _layout(2, 256, BF16, {"rank": 304, "leading_rank": 32, "num_outliers": 1, "block_size": 320})
"""A head's basis does not fit the shared memory of a CTA."""


def small_layout() -> PageLayout:
    """The dtype is the default of the kernel under test."""
    return make_layout(1, 64, rank=16, num_outliers=0, block_size=64, compression=1)


def layout_id(layout: PageLayout) -> str:
    return (
        f"h{layout.num_kv_heads}-d{layout.head_size}-{str(layout.dtype).removeprefix('torch.')}-b{layout.block_size}-"
        f"c{layout.chunk_size}-r{layout.rank}-l{layout.leading_rank}-o{layout.num_outliers}"
        f"{'-int8' if layout.value_int8 else ''}"
    )


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)

every_rotary = pytest.mark.parametrize(
    ("rotary_share", "is_neox"),
    [(1.0, True), (1.0, False), (0.5, True), (0.375, False), (0.0, True)],
    ids=["neox", "pairs", "half-neox", "partial-pairs", "none"],
)


def keys64(
    pages: Tensor, block: int, first_position: int, cos_sin: Tensor, is_neox: bool, layout: PageLayout
) -> Tensor:
    """fp64 `[block_size, Hkv, D]`, post-RoPE; pairs turn as complex numbers do."""
    if not layout.rank:
        return layout.view(pages, "exact_keys")[block].transpose(0, 1).double()
    names = ("coefficients", "tail_coefficients", "tail_steps", "coefficient_scales", "basis", "mean", "outlier_keys")
    part = {name: layout.view(pages, name)[block].double() for name in names}
    tail = part["tail_coefficients"].unflatten(1, (-1, 8))  # a byte: one coefficient, and the one eight later
    tail = torch.cat((tail % 16, (tail / 16).floor()), 2).flatten(1) - 8
    weights = torch.cat((part["coefficients"], tail * part["tail_steps"][:, None]), 1)
    weights = weights * part["coefficient_scales"][:, None]
    keys = torch.stack([weights @ basis for basis in part["basis"]], 1) + part["mean"]
    half = cos_sin.shape[-1] // 2
    if half:
        rows = cos_sin[first_position : first_position + layout.block_size].double()
        factors = torch.complex(rows[:, :half], rows[:, half:])[:, None]
        turning = keys[..., : 2 * half]
        if is_neox:
            turned = torch.complex(turning[..., :half], turning[..., half:]) * factors
            keys[..., : 2 * half] = torch.cat((turned.real, turned.imag), -1)
        else:
            turned = torch.view_as_complex(turning.unflatten(-1, (half, 2)).contiguous()) * factors
            keys[..., : 2 * half] = torch.view_as_real(turned).flatten(-2)
    ids = layout.view(pages, "outlier_ids")[block]
    for head in range(layout.num_kv_heads):
        for outlier, chunk in enumerate(ids[head].tolist()):
            span = slice(chunk * layout.chunk_size, (chunk + 1) * layout.chunk_size)
            keys[span, head] = part["outlier_keys"][head, outlier]
    return keys


def values64(host_pool: Tensor, block: int, layout: PageLayout) -> Tensor:
    """fp64 `[block_size, Hkv, D]`."""
    pool, scales = layout.value_views(host_pool)
    values = pool[block].double()
    if scales is not None:
        values = values * scales[block].double().unsqueeze(-1)
    return values.flatten(1, 2).transpose(0, 1)
