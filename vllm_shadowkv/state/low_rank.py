"""Low-rank factors of a block's pre-RoPE keys, and their int8 form.

    keys ≈ mean + coefficients @ basis

The basis spans (nearly) the leading right singular vectors of the mean-centred keys, which is the best
rank-r subspace there is (Eckart and Young, 1936). It comes from block subspace iteration on the Gram matrix
(Halko, Martinsson and Tropp, arXiv 0909.4061, section 4.5) with shifted Cholesky QR (Fukaya et al., arXiv
1809.11085): batched matrix products and small Cholesky factorisations, so a whole batch of blocks and layers
costs a fixed sequence of launches, and no value ever travels to the host.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Fewest for which every spectrum in tests/state/test_low_rank.py stays below 1.5 % of excess error
# (the bound is 2 %; four iterations reach 1.8 %).
_ITERATIONS = 5
# Added to the Gram matrix, whose trace is 1. A direction without data then keeps its own start vector instead of
# rounding noise, so the basis stays orthonormal whatever the rank of the data. Directions below
# sqrt(1e-8) = 1e-4 of the centred norm are no longer told apart, which is fp32's own limit for a Gram matrix.
_RIDGE = 1e-8
# The same for the product of the keys with the token-side basis, where values are not squared.
_WIDE_RIDGE = 1e-7
_INT8_MAX = 127


class LowRank(NamedTuple):
    """Low-rank factors of n blocks: keys ≈ mean + coefficients @ basis.

    Attributes:
        mean: fp32 [n, width], mean key of the block.
        coefficients: fp32 [n, block_size, rank].
        basis: fp32 [n, rank, width].
    """

    mean: Tensor
    coefficients: Tensor
    basis: Tensor

    def reconstruct(self) -> Tensor:
        """Returns the approximated keys, fp32 [n, block_size, width]."""
        return torch.baddbmm(self.mean.unsqueeze(1), self.coefficients, self.basis)


class QuantisedFactors(NamedTuple):
    """Int8 factors of n blocks.

    keys[t, :] ≈ mean + coefficient_scale[t] * Σ_r coefficients[t, r] * basis_scale[r] * basis[r, :]

    Attributes:
        coefficients: int8 [n, block_size, rank].
        coefficient_scale: fp32 [n, block_size], one scale per token.
        basis: int8 [n, rank, width].
        basis_scale: fp32 [n, rank], one scale per row.
    """

    coefficients: Tensor
    coefficient_scale: Tensor
    basis: Tensor
    basis_scale: Tensor

    def dequantise(self, mean: Tensor) -> LowRank:
        """Returns the fp32 factors that the int8 ones stand for, with `mean` fp32 [n, width]."""
        return LowRank(
            mean,
            self.coefficients.float() * self.coefficient_scale.unsqueeze(-1),
            self.basis.float() * self.basis_scale.unsqueeze(-1),
        )


def factorise(keys: Tensor, rank: int) -> LowRank:
    """Factorises each block of keys into a mean, coefficients and an orthonormal basis.

    Basis rows are orthonormal for every finite block, also where the data has fewer than `rank` directions: the
    surplus rows are arbitrary, and their coefficients are zero up to rounding. Columns are not ordered by importance.

    Args:
        keys: fp32 [n, block_size, width], pre-RoPE keys, any device. Centred values must lie within about 1e-15
            to 1e15, because their squares are summed in fp32. n may be 0. A NaN or an infinity makes that block's
            factors NaN and leaves the other blocks alone.
        rank: number of basis rows, 1 <= rank <= min(block_size, width).

    Returns:
        The factors. Their error is at most 2 % above that of the best rank-r approximation, plus 6e-4 of the
        centred norm (below that, fp32 Gram matrices cannot separate directions).

    Raises:
        ValueError: `keys` is not fp32 or not three-dimensional, or `rank` is out of range.

    Deterministic: the start is a fixed pattern of signs. A block gives the same reconstruction alone or in a batch up
    to fp32 rounding, not bit by bit, because matrix products choose their kernels by batch size. Needs true fp32 matrix
    products: TF32 is too coarse for the Cholesky factorisations.
    """
    if keys.dim() != 3:
        raise ValueError(f"keys: expected [n, block_size, width], got shape {list(keys.shape)}")
    if keys.dtype != torch.float32:
        raise ValueError(f"keys: expected torch.float32, got {keys.dtype}")
    n, block_size, width = keys.shape
    if not 1 <= rank <= min(block_size, width):
        raise ValueError(f"rank: expected 1 to min(block_size, width) = {min(block_size, width)}, got {rank}")

    mean = keys.mean(dim=1)
    centred = keys - mean.unsqueeze(1)
    norm = torch.linalg.vector_norm(centred, dim=(1, 2), keepdim=True)
    norm = torch.where(norm == 0, torch.ones_like(norm), norm)
    centred.div_(norm)

    # The token side when that is the smaller one: both Gram matrices have the same spectrum.
    on_tokens = block_size < width
    gram = centred @ centred.mT if on_tokens else centred.mT @ centred
    gram.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    vectors = _signs(gram.shape[-1], rank, keys.device).expand(n, -1, -1)
    for _ in range(_ITERATIONS):
        vectors = _orthonormalise(gram @ vectors)
    if on_tokens:
        filler = _signs(width, rank, keys.device) * (_WIDE_RIDGE / math.sqrt(width))
        vectors = _orthonormalise(centred.mT @ vectors + filler)
    # One Newton-Schulz step takes away what the Cholesky shift left: orthonormal to fp32 rounding, and it cannot fail.
    vectors = 1.5 * vectors - 0.5 * (vectors @ (vectors.mT @ vectors))
    return LowRank(mean, (centred @ vectors).mul_(norm), vectors.mT.contiguous())


def equalise(low_rank: LowRank) -> LowRank:
    """Rescales coefficient columns to unit RMS and folds their scale into the basis rows.

    `quantised_factors` does not need it, its mixing spreads the scale of the columns too. It is for code that keeps the
    order of columns.

    Args:
        low_rank: factors, fp32.

    Returns:
        Factors with the same product. A column without any value keeps coefficient 0, and its basis row becomes 0.
    """
    scale = low_rank.coefficients.square().mean(dim=1, keepdim=True).sqrt()
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    return LowRank(low_rank.mean, low_rank.coefficients / divisor, low_rank.basis * scale.mT)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises along the last dimension, symmetrically: x ≈ quantised * scale.

    scale = absmax / 127 and quantised = round_half_to_even(x / scale), both in fp32. A zero row has scale 0 and zeros.
    A row with NaN or infinity has a non-finite scale and zeros at the non-finite places, so its product is NaN.

    Args:
        x: fp32 [..., columns], columns >= 1.

    Returns:
        int8 [..., columns] within -127 to 127, and the scale, fp32 [...].

    Raises:
        ValueError: `x` is not fp32, or has no columns.
    """
    if x.dtype != torch.float32:
        raise ValueError(f"x: expected torch.float32, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one column, got shape {list(x.shape)}")
    scale = x.abs().amax(dim=-1, keepdim=True) / _INT8_MAX
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    # A subnormal scale is too coarse to divide by exactly: clamp. NaN has no int8, its conversion is undefined: zero.
    rounded = (x / divisor).round_().clamp_(-_INT8_MAX, _INT8_MAX).nan_to_num_(nan=0.0)
    return rounded.to(torch.int8), scale.squeeze(-1)


def quantised_factors(low_rank: LowRank) -> QuantisedFactors:
    """Quantises the factors to int8, one scale per token and one per basis row.

    The directions are mixed by an orthogonal matrix first, which leaves the product as it is. Leading directions are
    large in the coefficients and may have single large channels in the basis; mixed, no column and no row stands out,
    and absmax scales fit. The mean is not quantised.

    Args:
        low_rank: factors from `factorise`, fp32 (an orthonormal basis, columns that differ in size).

    Returns:
        The int8 factors. Their noise, relative to the centred norm and added in quadrature to the error of
        `low_rank`, is about 1 % (a uniform step of absmax / 127 with absmax near 3 RMS is 0.7 % for either
        factor), and was below 1.6 % for channel scales spread by a log-normal of sigma 1.2.
    """
    rank = low_rank.basis.shape[-2]
    mixing = _mixing(rank, low_rank.basis.device)
    coefficients, coefficient_scale = quantise_rows(low_rank.coefficients @ mixing)
    basis, basis_scale = quantise_rows(mixing.mT @ low_rank.basis)
    return QuantisedFactors(coefficients, coefficient_scale, basis, basis_scale)


def _signs(rows: int, columns: int, device: torch.device) -> Tensor:
    """Returns fp32 [rows, columns] of +1 and -1, the same on every device, from an integer hash of the position."""
    bits = torch.arange(1, rows * columns + 1, device=device)
    for _ in range(2):  # The xor-shift-multiply finaliser of 32-bit hashes, in 31 bits so that int64 cannot overflow.
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    return (1 - 2 * ((bits >> 16) & 1)).float().view(rows, columns)


def _orthonormalise(vectors: Tensor) -> Tensor:
    """Orthonormalises columns, up to a defect of `shift`, by two passes of shifted Cholesky QR.

    Args:
        vectors: fp32 [n, rows, columns]. After normalising, a column may depend on those before it up to about 1e-7.

    Returns:
        fp32 [n, rows, columns] with the same span. NaN input gives NaN, and never raises.
    """
    columns = vectors.shape[-1]
    # Above the rounding of the products below, which grows with the number of columns that are eliminated.
    shift = 4 * (columns + 16) * torch.finfo(torch.float32).eps
    for _ in range(2):
        # Columns shrink like squared singular values; at unit length they are far better conditioned.
        length = torch.linalg.vector_norm(vectors, dim=-2, keepdim=True)
        vectors = vectors / torch.where(length == 0, torch.ones_like(length), length)
        products = vectors.mT @ vectors
        products.diagonal(dim1=-2, dim2=-1).add_(shift)
        # cholesky_ex, because cholesky reads a status back to the host and raises for NaN.
        factor, _ = torch.linalg.cholesky_ex(products)
        vectors = torch.linalg.solve_triangular(factor.mT, vectors, upper=True, left=False)
    return vectors


def _mixing(rank: int, device: torch.device) -> Tensor:
    """Returns an orthogonal fp32 [rank, rank]: signs times DCT-II, whose entries are all of one size for any rank."""
    frequency = torch.arange(rank, device=device, dtype=torch.float64).unsqueeze(1)
    position = torch.arange(rank, device=device, dtype=torch.float64).unsqueeze(0) + 0.5
    cosines = torch.cos(frequency * position * (math.pi / rank)) * math.sqrt(2 / rank)
    cosines[:1] *= math.sqrt(0.5)
    return (_signs(rank, 1, device) * cosines).float()
