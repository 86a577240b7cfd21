"""Low-rank factors of a block's pre-RoPE keys, and their form for codes.

    keys ≈ mean + coefficients @ basis

The basis spans (nearly) the leading right singular vectors of the mean-centred keys, which is the
best rank-r subspace there is (Eckart and Young, 1936). It comes from subspace iteration on the Gram
matrix with oversampling (Halko, Martinsson and Tropp, arXiv 0909.4061, section 4.5) and shifted
Cholesky QR (Fukaya et al., arXiv 1809.11085): batched matrix products and Cholesky factorisations,
so a batch of blocks and layers is one fixed sequence of launches, and no value travels to the host.
The sequence is as long for one block as for many: batch as many as memory allows.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

BASIS_RANGE = 127
"""Largest magnitude of an int8 code."""

# Fewest with which every spectrum and start that was tried stays below 1.5 % of excess error, where
# 2 % is promised; four reach 1.9 %.
_ITERATIONS = 5
# A random start of exactly `rank` vectors can miss a wanted direction almost entirely (excess error
# up to 5.7 % at rank 32). A few more vectors make that improbable; they are dropped once they have
# done so, after the first product with the Gram matrix.
_OVERSAMPLING = 16
_DROP_ITERATIONS = 8
# Added to the Gram matrix, whose trace is 1. A direction without data then keeps its own start
# vector instead of rounding noise, so the basis stays orthonormal whatever the rank of the data.
# Directions below sqrt(1e-8) = 1e-4 of the centred norm blur: an fp32 Gram matrix ends about there.
_RIDGE = 1e-8
# The same for the product of keys and token-side vectors, where values are not squared.
_WIDE_RIDGE = 1e-7
# The same for the Cholesky factorisation that only finds which directions to drop.
_DROP_RIDGE = 1e-6


class LowRank(NamedTuple):
    """Low-rank factors of n blocks: keys ≈ mean + coefficients @ basis.

    Attributes:
        mean: fp32 `[n, width]`, mean key of the block.
        coefficients: fp32 `[n, block_size, rank]`.
        basis: fp32 `[n, rank, width]`.
    """

    mean: Tensor
    coefficients: Tensor
    basis: Tensor

    def reconstruct(self) -> Tensor:
        """Returns the approximated keys, fp32 `[n, block_size, width]`."""
        return self.mean.unsqueeze(1) + self.coefficients @ self.basis


@contextmanager
def _true_fp32() -> Iterator[None]:
    """Turns off TF32 and bf16 in fp32 products, which vLLM allows by VLLM_FLOAT32_MATMUL_PRECISION.

    PyTorch has an older and a newer setting. It raises where they contradict each other, so both are set, and set back.
    """
    mkldnn: Any = torch.backends.mkldnn
    kinds = (torch.backends.cuda.matmul, mkldnn.matmul)
    newer = [kind.fp32_precision for kind in kinds]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one allows what the older one does not
        older = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for kind, precision in zip(kinds, newer, strict=True):
            kind.fp32_precision = precision


@_true_fp32()
def factorise(keys: Tensor, rank: int) -> LowRank:
    """Factorises each block of keys into a mean, coefficients and an orthonormal basis.

    Basis rows are orthonormal (to about 3e-6) for every finite block, also where the data has fewer
    than `rank` directions: surplus rows are arbitrary, their coefficients zero up to rounding. Rows
    are roughly ordered by importance: nearly all of what the strongest 16 hold is in the first 16.

    Deterministic: the start is a fixed pattern of signs. A block has the same reconstruction alone
    and in a batch up to fp32 rounding, not bit by bit, because matrix products choose their kernel
    by batch size; its factors may differ by a rotation where singular values are close.

    Args:
        keys: fp32 `[n, block_size, width]`, pre-RoPE keys, any device; n may be 0. Centred values
            must be within about 1e-15 to 1e15 in size, because their squares are summed in fp32. A
            NaN or an infinity makes its own block's factors NaN and leaves other blocks alone.
        rank: number of basis rows, 1 <= rank <= min(block_size, width).

    Returns:
        Factors whose Frobenius error is at most 2 % above that of the best rank-r approximation,
        plus 5e-4 of the centred norm.

    Raises:
        ValueError: `keys` is not fp32 or not three-dimensional, or `rank` is out of range.

    Its products are of true fp32 whatever the process is set to: TF32 is too coarse for the Cholesky factorisations.
    """
    if keys.dim() != 3:
        raise ValueError(f"keys: expected [n, block_size, width], got shape {list(keys.shape)}")
    if keys.dtype != torch.float32:
        raise ValueError(f"keys: expected torch.float32, got {keys.dtype}")
    n, block_size, width = keys.shape
    if not 1 <= rank <= min(block_size, width):
        limit = min(block_size, width)
        raise ValueError(f"rank: expected 1 to min(block_size, width) = {limit}, got {rank}")

    mean = keys.mean(dim=1)
    centred = keys - mean.unsqueeze(1)
    norm = torch.linalg.vector_norm(centred, dim=(1, 2), keepdim=True)
    norm = torch.where(norm == 0, torch.ones_like(norm), norm)
    centred.div_(norm)

    # On the token side when that is the smaller: both Gram matrices have the same spectrum.
    on_tokens = block_size < width
    gram = centred @ centred.mT if on_tokens else centred.mT @ centred
    gram.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    size = gram.shape[-1]
    start = _signs(size, min(rank + _OVERSAMPLING, size), keys.device)
    vectors = _orthonormalise(gram @ start.expand(n, -1, -1))
    vectors = _drop_weakest(vectors, gram @ vectors, rank)
    for _ in range(_ITERATIONS - 2):
        vectors = gram @ _orthonormalise(vectors)
    vectors = _orthonormalise(vectors)
    if on_tokens:
        filler = _signs(width, rank, keys.device) * (_WIDE_RIDGE / math.sqrt(width))
        vectors = _orthonormalise(centred.mT @ vectors + filler)
    # A Newton-Schulz step removes what the Cholesky shift left over, and cannot break down.
    vectors = 1.5 * vectors - 0.5 * (vectors @ (vectors.mT @ vectors))
    return LowRank(mean, (centred @ vectors).mul_(norm), vectors.mT.contiguous())


@_true_fp32()
def mix(low_rank: LowRank, leading: int) -> LowRank:
    """Makes the factors fit for codes: no direction of a kind stands out, and the basis needs no scale.

    The first directions are large in the coefficients, and single channels may be large in their
    basis rows. Fixed orthogonal matrices mix the leading directions, whose coefficients get 8 bits,
    and the others, which get 4, so that all of a kind are about equally large. Then each basis row
    is scaled to the range of its codes, and its column of coefficients by the inverse: a key is one
    integer product of codes and the scale of its token. The product of the factors stays as it is.

    Args:
        low_rank: factors as `factorise` returns them, fp32.
        leading: how many directions are leading ones.

    Returns:
        Factors with the same product up to fp32 rounding; the largest element of a basis row that
        is not zero is `BASIS_RANGE`, and the rows of an orthonormal basis stay orthogonal.
    """
    mixing = _mixing(leading, low_rank.basis.shape[-2] - leading, low_rank.basis.device)
    basis = mixing.mT @ low_rank.basis
    scales = basis.abs().amax(-1, keepdim=True) / BASIS_RANGE
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return LowRank(low_rank.mean, low_rank.coefficients @ mixing * scales.mT, basis / scales)


@functools.lru_cache(maxsize=8)
def _signs(rows: int, columns: int, device: torch.device) -> Tensor:
    """Returns fp32 `[rows, columns]` of ±1 from an integer hash, the same on every device."""
    bits = torch.arange(1, rows * columns + 1, device=device)
    # The xor-shift-multiply of 32-bit hash finalisers, with 31 bits: int64 cannot overflow.
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    return (1 - 2 * ((bits >> 16) & 1)).float().view(rows, columns)


def _orthonormalise(vectors: Tensor, passes: int = 3) -> Tensor:
    """Orthonormalises columns by passes of shifted Cholesky QR.

    Three, because what is new in the last column may be 1e-7 of it, and a pass gains a factor of
    1 / sqrt(shift), about a hundred. After fewer, rank-deficient keys lose orthogonality.

    Args:
        vectors: fp32 `[n, rows, columns]`.
        passes: fewer than three only keep the columns apart, for one that will follow.

    Returns:
        fp32 `[n, rows, columns]` with the same span, orthonormal up to `shift` (1e-4 for 192
        columns). NaN gives NaN.
    """
    columns = vectors.shape[-1]
    # Above the rounding of the products below, which grows with the columns that are eliminated.
    shift = 4 * (columns + 16) * torch.finfo(torch.float32).eps
    for _ in range(passes):
        # Columns fall like squared singular values: at unit length they are far better conditioned.
        length = torch.linalg.vector_norm(vectors, dim=-2, keepdim=True)
        vectors = vectors / torch.where(length == 0, torch.ones_like(length), length)
        products = vectors.mT @ vectors
        products.diagonal(dim1=-2, dim2=-1).add_(shift)
        # cholesky_ex, because cholesky reads a status on the host, and raises for NaN.
        factor, _ = torch.linalg.cholesky_ex(products)
        vectors = torch.linalg.solve_triangular(factor.mT, vectors, upper=True, left=False)
    return vectors


def _drop_weakest(vectors: Tensor, images: Tensor, rank: int) -> Tensor:
    """Leaves `rank` of the images, without the directions to which the Gram matrix gives least.

    These come from inverse iteration on the matrix that `vectors` project the Gram matrix to. It
    costs one Cholesky factorisation and work on a few columns; eigh would wait for the device.

    Args:
        vectors: fp32 `[n, size, columns]`, orthonormal columns, most important ones roughly first.
        images: fp32 `[n, size, columns]`, Gram matrix times `vectors`.
        rank: number of columns to leave, at most `columns`.

    Returns:
        fp32 `[n, size, rank]`, not orthonormal.
    """
    n, _, columns = vectors.shape
    if columns == rank:
        return images
    projected = vectors.mT @ images
    projected.diagonal(dim1=-2, dim2=-1).add_(_DROP_RIDGE)
    factor, _ = torch.linalg.cholesky_ex(projected)
    weakest = torch.eye(columns, device=vectors.device)[:, rank:].expand(n, -1, -1)
    for step in range(1, _DROP_ITERATIONS + 1):
        weakest = _orthonormalise(torch.cholesky_solve(weakest, factor), 3 if step == _DROP_ITERATIONS else 1)
    return images[..., :rank] - (images @ weakest) @ weakest[..., :rank, :].mT


@functools.lru_cache(maxsize=4)
def _mixing(leading: int, tail: int, device: torch.device) -> Tensor:
    """Returns an orthogonal fp32 matrix that mixes the first directions and the others."""
    return torch.block_diag(*(_flat(size, device) for size in (leading, tail) if size))


def _flat(size: int, device: torch.device) -> Tensor:
    """Returns an orthogonal fp32 `[size, size]`: signs times DCT-II, flat entries for any size."""
    frequency = torch.arange(size, device=device, dtype=torch.float64).unsqueeze(1)
    position = torch.arange(size, device=device, dtype=torch.float64) + 0.5
    cosines = torch.cos(frequency * position * (math.pi / size)) * math.sqrt(2 / size)
    cosines[:1] *= math.sqrt(0.5)
    return (_signs(size, 1, device) * cosines).float()
