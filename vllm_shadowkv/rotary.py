"""Rotary position embedding as a value: turn keys forward to a position, or back from it.

Sealing needs keys as they were before RoPE, where they have low rank; decoding turns the rebuilt
keys to their position again. Both use the rows that the model itself used, so turning back and
forth is the identity up to fp32 rounding. This module knows no vLLM; `integration/model/rope.py` fills
the table.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """One layer's rotation: a table of cosines and sines and how it meets the head dimensions.

    Attributes:
        cos_sin: floating point, `[max_position, rotary_dim]`, cosines in the first half of a row
            and sines in the second. Its values are the ones the model multiplied with, so a bf16
            model has a bf16 table (usually the model's own buffer, not a copy); rows are widened to
            fp32 for the arithmetic. `cos² + sin²` need not be 1: bf16 rounds, and YaRN and LongRoPE
            fold a magnitude into the table. None for a layer without RoPE.
        rotary_dim: how many leading dimensions of a head turn; 0 for a layer without RoPE.
        is_neox: True pairs dimension i with i + rotary_dim / 2, False pairs 2i with 2i + 1.

    Raises:
        ValueError: the table does not fit `rotary_dim`, is not floating point, or `rotary_dim` is
            odd or negative.
    """

    cos_sin: Tensor | None
    rotary_dim: int
    is_neox: bool

    def __post_init__(self) -> None:
        if self.rotary_dim < 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and not negative, got {self.rotary_dim}")
        if self.rotary_dim == 0:
            if self.cos_sin is not None:
                raise ValueError("rotary_dim 0 means a layer without RoPE, which has no cos_sin table")
            return
        if self.cos_sin is None:
            raise ValueError(f"rotary_dim {self.rotary_dim} needs a cos_sin table, got None")
        if self.cos_sin.ndim != 2 or self.cos_sin.shape[1] != self.rotary_dim:
            raise ValueError(
                f"cos_sin must be [max_position, rotary_dim = {self.rotary_dim}], got {list(self.cos_sin.shape)}"
            )
        if not self.cos_sin.is_floating_point():
            raise ValueError(f"cos_sin must be floating point, got {self.cos_sin.dtype}")

    @classmethod
    def identity(cls) -> "Rotary":
        """Make the rotation of a layer without RoPE: `apply` and `undo` only widen to fp32."""
        return cls(cos_sin=None, rotary_dim=0, is_neox=True)


def apply(rotary: Rotary, x: Tensor, positions: Tensor) -> Tensor:
    """Turn keys (or queries) to their positions, as the model does.

    Args:
        rotary: the layer's rotation.
        x: any floating point dtype, `[tokens, heads, head_size]`, any strides; not changed.
        positions: int32 or int64, `[tokens]`, on the CPU or on x's device; any order.

    Returns:
        fp32, `[tokens, heads, head_size]`, new memory; dimensions from `rotary_dim` on are x's.

    Raises:
        ValueError: a shape, dtype or device does not fit, or a position is negative or beyond the
            table. Without RoPE positions are not looked at, beyond their shape.

    Positions on a CUDA device are checked there, so the call waits for the device: hand over CPU
    positions where the host knows them. Not for CUDA graphs.
    """
    rows = _rows(rotary, x, positions)
    out = x.to(torch.float32, copy=True)
    if rows is not None:
        cos, sin = rows
        _turn(rotary, out, cos, sin)
    return out


def undo(rotary: Rotary, x: Tensor, positions: Tensor) -> Tensor:
    """Turn keys back from their positions: the inverse of `apply`, magnitude included.

    The transpose of a pair's matrix is its inverse times `cos² + sin²`, hence the division: it
    takes out YaRN's and LongRoPE's magnitude and what rounding did to the length of a bf16 row.

    Args, Returns and Raises are those of `apply`.
    """
    rows = _rows(rotary, x, positions)
    out = x.to(torch.float32, copy=True)
    if rows is not None:
        cos, sin = rows
        norm = cos * cos + sin * sin
        _turn(rotary, out, cos / norm, -sin / norm)
    return out


def pairs(rotary: Rotary, x: Tensor) -> tuple[Tensor, Tensor]:
    """Views of both channels of every pair that turns, `[..., rotary_dim / 2]` each, of x `[..., head_size]`."""
    turned = x[..., : rotary.rotary_dim]
    if rotary.is_neox:
        first, second = turned.chunk(2, dim=-1)
        return first, second
    return turned[..., 0::2], turned[..., 1::2]


def _turn(rotary: Rotary, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Multiply every pair of x with [[cos, -sin], [sin, cos]], in place.

    Args:
        rotary: says which dimensions make a pair.
        x: fp32, `[tokens, heads, head_size]`.
        cos: fp32, `[tokens, 1, rotary_dim / 2]`.
        sin: as cos.
    """
    first, second = pairs(rotary, x)
    new_first = first * cos - second * sin
    new_second = second * cos + first * sin
    first.copy_(new_first)
    second.copy_(new_second)


def _rows(rotary: Rotary, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """Check the arguments and gather the table's rows.

    Returns:
        cos and sin, fp32, `[tokens, 1, rotary_dim / 2]` each; None without RoPE.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [tokens, heads, head_size], got {x.dtype} {list(x.shape)}")
    if positions.shape != x.shape[:1] or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions must be int32 or int64 [tokens = {x.shape[0]}], got {positions.dtype} {list(positions.shape)}"
        )
    table = rotary.cos_sin
    if table is None:
        return None
    if x.shape[2] < rotary.rotary_dim:
        raise ValueError(f"head_size {x.shape[2]} is below rotary_dim {rotary.rotary_dim}")
    if x.device != table.device:
        raise ValueError(f"x is on {x.device}, the rotary table on {table.device}")
    if positions.numel():
        low, high = (int(bound) for bound in positions.aminmax())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(
                f"position {low if low < 0 else high} is outside the rotary table, "
                f"which has positions 0 to {table.shape[0] - 1}"
            )
    rows = table.index_select(0, positions.to(table.device, non_blocking=True)).float().unsqueeze(1)
    cos, sin = rows.chunk(2, dim=-1)
    return cos, sin
