"""Assertions about numbers: bytes where a result is a copy, the dtype's own error where it is arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_bytes_equal(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """The same dtype, shape and bytes (a NaN equals itself).

    Raises:
        AssertionError: says where they first differ.
    """
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    item = actual.element_size()
    a = actual.contiguous().view(-1).view(torch.uint8).view(-1, item)
    b = expected.contiguous().view(-1).view(torch.uint8).view(-1, item)
    differs = (a != b).any(-1)
    if differs.any():
        first = int(differs.nonzero()[0])
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), actual.shape))
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {len(differs)} elements differ, first at {place}: "
            f"{actual[place].item()}, expected {expected[place].item()}"
        )


def assert_close(actual: Tensor, expected: Tensor, same_maths: Tensor | None = None, what: str = "result") -> None:
    """Within twice the error that the same maths has in PyTorch at the kernel's dtype.

    NaN and infinities must be at the same places, with the same sign.

    Args:
        actual: of the kernel, in its dtype.
        expected: of the reference, fp32 or fp64, before it is rounded to the dtype.
        same_maths: of PyTorch at the kernel's dtype; None allows one rounding to the dtype of an exact result.
        what: names the tensor in the message.

    Raises:
        AssertionError: says how far off it is, and where.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    got, want = actual.double(), expected.double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN at other places"
    infinite = want.isinf() | got.isinf()
    assert torch.equal(got[infinite], want[infinite]), f"{what}: infinities at other places"
    finite = want.isfinite()
    got, want = got[finite], want[finite]
    if got.numel() == 0:
        return
    # The floor: a rounding to the dtype, and what fp32 sums in another order differ by.
    resolution = torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0
    bound = resolution * want.abs() + 2e-6 * want.abs().max() + 1e-30
    if same_maths is not None:
        bound = bound + 2 * (same_maths.double()[finite] - want).abs().max()
    excess = (got - want).abs() - bound
    if excess.max() > 0:
        i = int(excess.argmax())
        raise AssertionError(
            f"{what}: {got[i].item():.8g}, expected {want[i].item():.8g}, off by {abs(got[i] - want[i]).item():.3g}, "
            f"allowed {bound[i].item():.3g} ({int((excess > 0).sum())} of {len(got)} elements too far)"
        )
