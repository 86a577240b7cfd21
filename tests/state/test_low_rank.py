"""Low-rank factors against the best ones there are, from an fp64 SVD."""

import pytest
import torch
from torch import Tensor

from vllm_shadowkv.codes import quantise
from vllm_shadowkv.state import low_rank
from vllm_shadowkv.state.low_rank import LowRank, factorise, mix

FP32_EXCESS = 1.02
INT8_EXCESS = 1.05
# Of the centred norm. fp32: what a Gram matrix cannot separate, measured up to 3.1e-4.
FP32_FLOOR = 5e-4
# Of the centred norm, in quadrature. Rounding to absmax / 127 with absmax near 3 RMS is 0.7 % of
# the coefficients and of the basis each, 1 % together; measured up to 1.1 %.
INT8_FLOOR = 0.012
# The same where channels differ in scale, so that absmax over a basis row is far above 3 RMS.
INT8_FLOOR_UNEVEN_CHANNELS = 0.017

SHAPES = {
    "2kv": (2, 1024, 128, 32),
    "4kv": (1, 1024, 512, 120),
    "8kv": (1, 1024, 1024, 176),
    "wide": (1, 256, 512, 64),
    "odd": (2, 37, 53, 20),
}
DECAYS = {
    "flat": lambda i, rank: (i <= rank).double(),
    "half rank": lambda i, rank: (i <= rank // 2).double(),
    "i^-0.5": lambda i, rank: i**-0.5,
    "i^-1": lambda i, rank: 1 / i,
    "i^-2": lambda i, rank: i**-2,
    "exponential": lambda i, rank: torch.exp(-3 * i / rank),
    "steep": lambda i, rank: torch.exp(-20 * i / rank),
    "one dominates": lambda i, rank: torch.where(i == 1, 1e4, i**-0.5),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(shape: tuple[int, int, int, int], decay: str, noise: float = 0.0) -> Tensor:
    """Keys of RMS 1 with the singular values of `decay`, plus `noise`."""
    n, block_size, width, rank = shape
    size = min(block_size, width)
    values = DECAYS[decay](torch.arange(1, size + 1, dtype=torch.float64), rank)
    left = normal(n, block_size, size, seed=1) / block_size**0.5
    right = torch.linalg.qr(normal(n, width, size, seed=2))[0]
    keys = (left * values) @ right.mT
    keys = keys / keys.square().mean().sqrt()
    return (keys + noise * normal(n, block_size, width, seed=3)).float()


def norms(keys: Tensor) -> Tensor:
    return torch.linalg.vector_norm(keys.double(), dim=(1, 2))


def centred_norms(keys: Tensor) -> Tensor:
    return norms(keys.double() - keys.double().mean(dim=1, keepdim=True))


def errors(keys: Tensor, factors: LowRank) -> Tensor:
    return norms(keys.double() - LowRank(*(part.double() for part in factors)).reconstruct())


def best_errors(keys: Tensor, rank: int) -> Tensor:
    centred = keys.double() - keys.double().mean(dim=1, keepdim=True)
    return torch.linalg.svdvals(centred)[:, rank:].square().sum(dim=1).sqrt()


KINDS = (slice(0, 16), slice(16, None))


def int8_factors(factors: LowRank) -> LowRank:
    """The factors as a shadow page keeps them where all directions are leading ones."""
    _, coefficients, basis = mix(factors, factors.basis.shape[1])
    return LowRank(factors.mean, rounded(coefficients), basis.round())


def rounded(rows: Tensor) -> Tensor:
    codes, scales = quantise(rows)
    return codes * scales.unsqueeze(-1)


def assert_close_to_best(keys: Tensor, rank: int, int8_floor: float = INT8_FLOOR) -> None:
    best = best_errors(keys, rank)
    # Rounding of the mean and of the sum, against keys with a large bias.
    norm, rounding = centred_norms(keys), 1e-6 * norms(keys)
    factors = factorise(keys, rank)
    assert (errors(keys, factors) <= FP32_EXCESS * best + FP32_FLOOR * norm + rounding).all()
    error = errors(keys, int8_factors(factors))
    assert (error <= torch.hypot(INT8_EXCESS * best, int8_floor * norm) + rounding).all()
    # Where quantisation is not what limits, it stays within the 5 % alone.
    limited = best < 0.04 * norm
    assert (limited | (error <= INT8_EXCESS * best)).all() or int8_floor > INT8_FLOOR


def assert_orthonormal(basis: Tensor) -> None:
    torch.testing.assert_close(
        basis @ basis.mT, torch.eye(basis.shape[1]).expand(len(basis), -1, -1), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("noise", [0.01, 0.3])
@pytest.mark.parametrize("decay", ["flat", "half rank", "i^-0.5", "i^-1", "exponential"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_noisy_spectra(shape, decay, noise):
    assert_close_to_best(spectrum(shape, decay, noise), shape[-1])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gaussian(shape):
    *size, rank = shape
    assert_close_to_best(normal(*size).float(), rank)


@pytest.mark.parametrize("decay", ["i^-2", "steep", "one dominates"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_steep_spectra_reach_the_floor(shape, decay):
    keys = spectrum(shape, decay)
    assert_close_to_best(keys, shape[-1])
    assert_orthonormal(factorise(keys, shape[-1]).basis)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bias_far_above_the_variation(shape):
    _, _, width, rank = shape
    keys = spectrum(shape, "i^-1", 0.05) + 50 * normal(width, seed=4).float()
    assert_close_to_best(keys, rank)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_uneven_channels(shape):
    _, _, width, rank = shape
    keys = spectrum(shape, "i^-1", 0.05) * torch.exp(1.2 * normal(width, seed=4)).float()
    assert_close_to_best(keys, rank, INT8_FLOOR_UNEVEN_CHANNELS)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scale_changes_nothing_but_the_scale(scale):
    keys = spectrum(SHAPES["2kv"], "i^-1", 0.05)
    assert_close_to_best(keys * scale, 32)
    ratio = errors(keys * scale, factorise(keys * scale, 32)) / errors(keys, factorise(keys, 32))
    torch.testing.assert_close(ratio, torch.full_like(ratio, scale), rtol=1e-3, atol=0)


DEGENERATE = ["zero", "constant", "rank 1", "few channels", "few tokens", "equal channels"]


def degenerate_keys(kind: str, n: int, block_size: int, width: int) -> Tensor:
    keys = normal(n, block_size, width).float()
    few = (torch.arange(max(block_size, width)) % max(width // 10, 1) == 0).float()
    return {
        "zero": torch.zeros_like(keys),
        "constant": keys[:, :1].expand(-1, block_size, -1).contiguous(),
        "rank 1": normal(n, block_size, 1).float() @ normal(n, 1, width, seed=1).float(),
        "few channels": keys * few[:width],
        "few tokens": keys * few[:block_size, None],
        "equal channels": keys[:, :, :3].repeat(1, 1, width // 3 + 1)[:, :, :width],
    }[kind]


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize(
    ("n", "block_size", "width", "rank"),
    [
        (2, 1024, 128, 32),
        (1, 512, 512, 128),
        (1, 256, 512, 64),
        (2, 64, 64, 64),
        (2, 256, 128, 128),
        (2, 64, 100, 64),
        (2, 50, 33, 17),
    ],
)
def test_rank_deficient(kind, n, block_size, width, rank):
    keys = degenerate_keys(kind, n, block_size, width)
    factors = factorise(keys, rank)
    assert_orthonormal(factors.basis)
    # "few tokens" can have more directions than `rank`; elsewhere nothing is lost but rounding.
    bound = FP32_EXCESS * best_errors(keys, rank) + 1e-5 * norms(keys)
    assert (errors(keys, factors) <= bound).all()
    assert_close_to_best(keys, rank, INT8_FLOOR_UNEVEN_CHANNELS)


@pytest.mark.parametrize(
    ("block_size", "width", "rank"),
    [(1, 1, 1), (1, 5, 1), (5, 1, 1), (2, 3, 2), (16, 16, 1), (17, 31, 13), (33, 32, 32)],
)
def test_small_shapes(block_size, width, rank):
    assert_close_to_best(normal(3, block_size, width).float(), rank, INT8_FLOOR_UNEVEN_CHANNELS)


def test_shapes_and_dtypes():
    keys = normal(3, 40, 24).float()
    factors = factorise(keys, 7)
    assert [part.shape for part in factors] == [(3, 24), (3, 40, 7), (3, 7, 24)]
    assert all(part.dtype == torch.float32 and part.is_contiguous() for part in factors)


@pytest.mark.parametrize(("block_size", "width"), [(40, 24), (24, 40)])
def test_no_blocks(block_size, width):
    factors = factorise(torch.empty(0, block_size, width), 7)
    assert factors.reconstruct().shape == (0, block_size, width)
    assert mix(factors, 7).coefficients.shape == (0, block_size, 7)


@pytest.mark.parametrize("name", SHAPES)
def test_a_block_does_not_depend_on_its_batch(name):
    *_, rank = shape = SHAPES[name]
    keys = spectrum(shape, "i^-1", 0.05)[:1]
    others = normal(3, *keys.shape[1:]).float() * torch.tensor([1e4, 1e-4, 0.0])[:, None, None]
    alone = factorise(keys, rank).reconstruct()
    together = factorise(torch.cat([others, keys]), rank).reconstruct()[3:]
    assert norms(alone - together) <= 1e-4 * norms(keys)


def test_deterministic():
    keys = normal(2, 128, 64).float()
    for first, second in zip(factorise(keys, 16), factorise(keys, 16), strict=True):
        assert torch.equal(first, second)


def test_keys_are_left_alone_and_need_not_be_contiguous():
    keys = normal(2, 64, 128).float()
    copy = keys.clone()
    expected = factorise(keys.mT.contiguous(), 16)
    for part, other in zip(factorise(keys.mT, 16), expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-3, atol=1e-3)
    assert torch.equal(keys, copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("block_size", "width"), [(128, 64), (64, 128)])
def test_not_finite_stays_in_its_block(value, block_size, width):
    keys = normal(3, block_size, width).float()
    clean = factorise(keys, 16)
    keys[1, 5, 7] = value
    factors = factorise(keys, 16)
    assert factors.coefficients[1].isnan().all()
    assert factors.basis[1].isnan().all()
    for reconstructed in (factors.reconstruct(), int8_factors(factors).reconstruct()):
        assert reconstructed[1].isnan().all()
        assert reconstructed[[0, 2]].isfinite().all()
    torch.testing.assert_close(factors.reconstruct()[[0, 2]], clean.reconstruct()[[0, 2]])


@pytest.mark.parametrize(
    ("keys", "rank", "message"),
    [
        (torch.zeros(4, 4), 1, r"got shape \[4, 4\]"),
        (torch.zeros(1, 4, 4, dtype=torch.bfloat16), 1, "got torch.bfloat16"),
        (torch.zeros(1, 4, 8), 0, "= 4, got 0"),
        (torch.zeros(1, 4, 8), 5, "= 4, got 5"),
        (torch.zeros(1, 8, 4), 5, "= 4, got 5"),
        (torch.zeros(1, 0, 4), 1, "= 0, got 1"),
    ],
)
def test_factorise_refuses(keys, rank, message):
    with pytest.raises(ValueError, match=message):
        factorise(keys, rank)


def test_mix_keeps_the_product_and_evens_the_columns():
    factors = factorise(spectrum(SHAPES["4kv"], "i^-1", 0.05), 120)
    mixed = mix(factors, 120)
    torch.testing.assert_close(mixed.reconstruct(), factors.reconstruct(), rtol=0, atol=1e-4)
    assert_orthonormal(mixed.basis / mixed.basis.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(mixed.basis.abs().amax(-1), torch.full((1, 120), 127.0))

    def unevenness(coefficients: Tensor) -> float:
        rms = coefficients.square().mean(dim=1).sqrt()
        return float(rms.max() / rms.min())

    assert unevenness(factors.coefficients) > 20
    assert unevenness(mixed.coefficients) < 2


def test_leading_directions_are_mixed_among_themselves():
    factors = factorise(spectrum(SHAPES["4kv"], "i^-1", 0.05), 112)
    mixed = mix(factors, 16)
    torch.testing.assert_close(mixed.reconstruct(), factors.reconstruct(), rtol=0, atol=1e-4)
    parts = [LowRank(factors.mean, factors.coefficients[..., at], factors.basis[:, at]).reconstruct() for at in KINDS]
    kept = [LowRank(factors.mean, mixed.coefficients[..., at], mixed.basis[:, at]).reconstruct() for at in KINDS]
    torch.testing.assert_close(kept, parts, rtol=0, atol=1e-4)


def test_the_strongest_directions_come_first():
    """As far as 8 bits for 16 of them are concerned: what the first leave is little more than what the best leave."""
    for decay in ("i^-0.5", "i^-1", "exponential"):
        keys = spectrum(SHAPES["4kv"], decay, 0.05)
        mean, coefficients, basis = factorise(keys, 112)
        leading = LowRank(mean, coefficients[..., :16], basis[:, :16])
        assert (errors(keys, leading) <= 1.05 * best_errors(keys, 16)).all(), decay


def precisions() -> list[str]:
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "contradiction"
    return [older, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


@pytest.mark.parametrize("older", ["highest", "high", "medium"])
@pytest.mark.parametrize("newer", [None, "ieee", "tf32"])
def test_products_are_of_true_fp32_whatever_the_process_allows(older, newer, monkeypatch):
    """On a CPU that computes bf16 products the results show it, on others the settings alone."""
    *_, rank = shape = SHAPES["4kv"]
    keys = spectrum(shape, "i^-1", 0.05)
    before, expected = precisions(), mix(factorise(keys, rank), rank)
    assert precisions() == before
    inside = []
    orthonormalise = low_rank._orthonormalise
    monkeypatch.setattr(low_rank, "_orthonormalise", lambda *x: (inside.append(precisions()), orthonormalise(*x))[1])
    torch.set_float32_matmul_precision(older)
    if newer:
        torch.backends.cuda.matmul.fp32_precision = newer
    allowed = precisions()
    try:
        factors = mix(factorise(keys, rank), rank)
        assert precisions() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")
        for kind, precision in zip((torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), before[1:], strict=True):
            kind.fp32_precision = precision
    assert inside
    assert all(found[0] == "highest" and found[1:] == ["ieee", "ieee"] for found in inside)
    assert all(torch.equal(one, other) for one, other in zip(factors, expected, strict=True))


@pytest.mark.parametrize("rank", [1, 2, 3, 16, 120, 176])
def test_mix_is_orthogonal_for_any_rank(rank):
    eye = torch.eye(rank).unsqueeze(0)
    basis = mix(LowRank(torch.zeros(1, rank), eye, eye), rank // 3).basis
    assert_orthonormal(basis / basis.norm(dim=-1, keepdim=True))


def test_mix_leaves_a_basis_row_of_zeros():
    zeros = torch.zeros(1, 16, 64)
    mixed = mix(LowRank(torch.zeros(1, 64), torch.zeros(1, 32, 16), zeros), 16)
    assert torch.equal(mixed.basis, zeros)
    assert not mixed.coefficients.any()


def test_int8_of_uneven_channels_is_worse_without_mixing():
    *_, rank = shape = SHAPES["4kv"]
    keys = spectrum(shape, "i^-1", 0.05) * torch.exp(1.2 * normal(512, seed=4)).float()
    factors = factorise(keys, rank)
    unmixed = LowRank(factors.mean, rounded(factors.coefficients), rounded(factors.basis))
    assert (errors(keys, int8_factors(factors)) < 0.9 * errors(keys, unmixed)).all()


@pytest.mark.gpu
def test_never_waits_for_the_device():
    keys = torch.cat([normal(2, 256, 128).float(), torch.zeros(1, 256, 128)]).cuda()
    expected = int8_factors(factorise(keys.cpu(), 32)).reconstruct()
    int8_factors(factorise(keys, 32))  # Libraries allocate their workspaces on first use.
    torch.cuda.set_sync_debug_mode("error")
    try:
        factors = int8_factors(factorise(keys, 32))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = norms(factors.reconstruct().cpu() - expected)
    assert (difference <= 0.02 * norms(keys.cpu()) + 1e-6).all()
