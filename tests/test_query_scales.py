"""How large queries are in each channel, and that it does not matter where they stand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_shadowkv.query_scales import SMALLEST, query_scales
from vllm_shadowkv.rotary import Rotary, apply

HEADS, SIZE = 2, 16
"""KV heads, and their size; twice as many query heads."""


def rotary(dimensions: int, is_neox: bool) -> Rotary:
    angles = torch.arange(64)[:, None] * 10.0 ** -torch.arange(0, 1, 2 / dimensions)
    return Rotary(torch.cat((angles.cos(), angles.sin()), 1), dimensions, is_neox)


def queries(tokens: int = 8192) -> Tensor:
    """Of normal numbers, whose standard deviation in channel i of query head h is `(h + 1) * (i + 8)`."""
    deviations = torch.arange(1, 2 * HEADS + 1)[:, None] * torch.arange(8, 8 + SIZE)
    return torch.randn(tokens, 2 * HEADS, SIZE, generator=torch.Generator().manual_seed(0)) * deviations


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("dimensions", [0, 8, SIZE])
def test_they_are_root_mean_squares_of_pairs_and_groups(dimensions: int, is_neox: bool) -> None:
    turn = rotary(dimensions, is_neox) if dimensions else Rotary.identity()
    expected = torch.empty(HEADS, SIZE)
    for channel in range(SIZE):
        other = channel
        if channel < dimensions:
            other = (channel + dimensions // 2) % dimensions if is_neox else channel ^ 1
        of_pair = ((8 + channel) ** 2 + (8 + other) ** 2) / 2
        for head, (one, another) in enumerate(((1, 2), (3, 4))):  # the query heads that share it
            expected[head, channel] = (of_pair * (one**2 + another**2) / 2) ** 0.5
    found = query_scales(queries().square().mean(0), HEADS, turn).view(HEADS, SIZE)
    torch.testing.assert_close(found, expected / expected.mean(), rtol=0.03, atol=0)


@pytest.mark.parametrize("is_neox", [True, False])
def test_turned_queries_have_the_same(is_neox: bool) -> None:
    turn, asked = rotary(8, is_neox), queries(64)
    turned = apply(turn, asked, torch.arange(64))
    of_both = [query_scales(one.square().mean(0), HEADS, turn) for one in (asked, turned)]
    torch.testing.assert_close(*of_both)


def test_none_is_near_zero_and_bf16_is_taken() -> None:
    squares = torch.ones(2, 8, dtype=torch.bfloat16)
    squares[1] = 1e-6
    scales = query_scales(squares, 2, Rotary.identity())
    assert scales.dtype == torch.float32
    assert scales[8:].tolist() == pytest.approx([SMALLEST] * 8)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_what_says_nothing_weighs_nothing(value: float) -> None:
    squares = torch.ones(2, 8)
    squares[1 if value else slice(None)] = value
    assert query_scales(squares, 2, Rotary.identity()).tolist() == [1.0] * 16
