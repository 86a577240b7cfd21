"""How numbers become codes of 8 and of 4 bits, in fp32 PyTorch: the oracle of the kernels that write and read them."""

from __future__ import annotations

import torch
from torch import Tensor

NIBBLE_CODE = 7
NIBBLE_OFFSET = 8
"""The largest code of 4 bits, and what is added to one where it is stored."""
TAIL_GROUP = 16
"""So many tail coefficients of a token are a run of `pack_nibbles`."""
TAIL_STEP = 17
"""Largest step of a tail: code times step is an int8."""


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with one fp32 scale per row (last dimension): absmax / 127, halves to even; a zero row has scale 0."""
    scales = values.float().abs().amax(-1) / 127
    return _codes(values.float(), scales, 127), scales


def quantise_coefficients(coefficients: Tensor, leading: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8 bits for the leading directions and 4 for the others, the tail, which are smaller (docs/adr/0012).

    A tail code counts whole steps of the token's scale, so that both kinds are int8 multiples of one scale.

    Args:
        coefficients: `[tokens, rank]`.
        leading: directions of 8 bits.

    Returns:
        int8 `[tokens, leading]`; the tail, uint8 `[tokens, (rank - leading) / 2]`; its steps, uint8 `[tokens]`, from 1
        to `TAIL_STEP`; and scales, bf16 `[tokens]`: about the least with which nothing is clipped.
    """
    head, tail = coefficients.float().split((leading, coefficients.shape[1] - leading), 1)
    head_size, tail_size = (torch.cat((part, part.new_zeros(len(part), 1)), 1).abs().amax(1) for part in (head, tail))
    scales = torch.maximum(head_size / 127, tail_size / (NIBBLE_CODE * TAIL_STEP)).bfloat16()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0)
    steps = (tail_size / NIBBLE_CODE * inverse).round().nan_to_num(nan=1).clamp(1, TAIL_STEP)
    groups = pack_nibbles(_codes(tail, steps * scales, NIBBLE_CODE).unflatten(1, (-1, TAIL_GROUP)))
    return _codes(head, scales.float(), 127), groups.flatten(1), steps.byte(), scales


def quantise_landmarks(landmarks: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """4 bits for what a landmark differs by from the mean key of its block (docs/adr/0014).

    Args:
        landmarks: fp32 `[..., chunks, head_size]`.
        mean: fp32 `[..., head_size]`.

    Returns:
        uint8 `[..., chunks, head_size / 2]`, a landmark is a run of `pack_nibbles`; and fp32 scales `[..., chunks]`,
        absmax / 7.
    """
    apart = landmarks - mean.unsqueeze(-2)
    scales = apart.abs().amax(-1) / NIBBLE_CODE
    return pack_nibbles(_codes(apart, scales, NIBBLE_CODE)), scales


def coefficients_of(codes: Tensor, tail: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
    """fp32 `[tokens, rank]` of what `quantise_coefficients` returns."""
    tail_codes = unpack_nibbles(tail.unflatten(1, (-1, TAIL_GROUP // 2))).flatten(1)
    return torch.cat((codes, tail_codes * steps[:, None].char()), 1) * scales.float()[:, None]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits, int8 `[..., n]` with n even, two to a byte: uint8 `[..., n / 2]`.

    Byte i of a run has its i-th code in the low half and the one half a run later in the high half.
    """
    low, high = (codes + NIBBLE_OFFSET).unflatten(-1, (2, -1)).unbind(-2)
    return (low + 16 * high).byte()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """int8 `[..., n]` of what `pack_nibbles` returns."""
    return torch.cat((packed & 15, packed >> 4), -1).char() - NIBBLE_OFFSET


def _codes(values: Tensor, scales: Tensor, largest: int) -> Tensor:
    """int8, halves to even; what has none (NaN, or beside an infinity) gets 0 or the ends."""
    inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
    return (values * inverse.unsqueeze(-1)).round().nan_to_num(nan=0.0).clamp(-largest, largest).to(torch.int8)
