"""RoPE undone: against vLLM's own rotary modules, and against the sources of vLLM's models."""

from __future__ import annotations

import ast
import functools
import gc
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vllm_shadowkv import rotary as rotary_module
from vllm_shadowkv.rotary import Rotary, apply, undo

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding import get_rope, phi3_long_rope_scaled_rope
from vllm.platforms import current_platform

from vllm_shadowkv.integration.model import rope

LAYER = "model.layers.3.self_attn.attn"
MAX_POSITION = 8192
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
    "rope_theta": 500000.0,
}
# name -> (rope_parameters, is_neox, max_position of the constructor)
VARIANTS: dict[str, tuple[dict[str, Any], bool, int]] = {
    "neox": ({"rope_theta": 10000.0}, True, MAX_POSITION),
    "interleaved": ({"rope_theta": 10000.0}, False, MAX_POSITION),
    "partial": ({"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, True, MAX_POSITION),
    "partial interleaved": ({"rope_theta": 10000.0, "partial_rotary_factor": 0.25}, False, MAX_POSITION),
    "llama3": (LLAMA3, True, MAX_POSITION),
    "yarn": (YARN, True, MAX_POSITION),
    "yarn interleaved": ({**YARN, "attention_factor": 1.7}, False, MAX_POSITION),
    "linear": ({"rope_type": "linear", "factor": 4.0}, True, MAX_POSITION // 4),
    "dynamic alpha": ({"rope_type": "dynamic", "alpha": 1000.0}, True, MAX_POSITION),
    "dynamic factor": (
        {"rope_type": "dynamic", "factor": 2.0, "max_trained_positions": 4096},
        True,
        MAX_POSITION,
    ),
    "longrope short": ({"rope_type": "longrope", "original_max_position_embeddings": 8192}, True, 16384),
    "longrope long": ({"rope_type": "longrope", "original_max_position_embeddings": 4096}, True, 8192),
    "longrope partial": (
        {"rope_type": "longrope", "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75},
        True,
        8192,
    ),
}
HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A vLLM configuration to build layers in, and no rotary module of an earlier test."""
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    model = SimpleNamespace(model_config=SimpleNamespace(max_model_len=MAX_POSITION))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: model)
    with set_current_vllm_config(VllmConfig()):
        yield


def make_rope(variant: str, head_size: int, dtype: torch.dtype) -> Any:
    parameters, is_neox, max_position = VARIANTS[variant]
    if parameters.get("rope_type") == "longrope":
        dim = int(head_size * parameters.get("partial_rotary_factor", 1.0)) // 2
        parameters = {
            **parameters,
            "short_factor": [1.0 + 0.01 * i for i in range(dim)],
            "long_factor": [2.0 + 0.5 * i for i in range(dim)],
        }
    return get_rope(head_size, max_position, is_neox, parameters, dtype)


def stand_in(path: str, **attributes: Any) -> nn.Module:
    """A module that passes for one of vLLM's classes, without the minutes it takes to import them all."""
    module, name = path.split(".")
    cls = type(name, (nn.Module,), {"__module__": f"vllm.model_executor.models.{module}"})
    parent = cls()
    for key, value in attributes.items():
        setattr(parent, key, value)
    return parent


def make_parent(rotary_emb: Any, dtype: torch.dtype, path: str = "llama.LlamaAttention", **attributes: Any) -> Any:
    """An attention class of vLLM around a rotary module and a layer of this dtype."""
    layer = nn.Module()
    layer.layer_name, layer.dtype = LAYER, dtype  # type: ignore[assignment]
    return stand_in(path, rotary_emb=rotary_emb, attn=layer, **attributes)


def make_keys(tokens: int, heads: int, head_size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + head_size)
    return torch.randn(tokens, heads, head_size, generator=generator).to(dtype)


def make_positions(tokens: int) -> Tensor:
    """In no order, with the ends of the table among them."""
    generator = torch.Generator().manual_seed(tokens)
    positions = torch.randint(0, MAX_POSITION, (tokens,), generator=generator)
    ends = torch.tensor([MAX_POSITION - 1, 0, 1])[:tokens]
    positions[: len(ends)] = ends
    return positions


def rotate_by_vllm(module: Any, how: str, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys as vLLM's module leaves them; `how` names one of its methods."""
    flat = keys.clone().flatten(1)
    query = torch.zeros_like(flat)
    _, rotated = getattr(module, how)(positions, query, flat)
    return rotated.view_as(keys)


def pair_norms(keys: Tensor, rotary: Rotary) -> Tensor:
    """The length of the pair every element belongs to; an element that does not turn is alone."""
    norms = keys.double().abs()
    half = rotary.rotary_dim // 2
    if rotary.is_neox:
        first, second = norms[..., :half], norms[..., half : rotary.rotary_dim]
    else:
        first, second = norms[..., 0 : rotary.rotary_dim : 2], norms[..., 1 : rotary.rotary_dim : 2]
    length = torch.hypot(first, second)
    first.copy_(length)
    second.copy_(length)
    return norms


def methods(module: Any, dtype: torch.dtype) -> tuple[str, ...]:
    """The ways vLLM's module can be called on this machine."""
    if not hasattr(module, "forward_native"):
        return ("forward",)  # LongRoPE
    # vLLM 0.32's CPU kernel crashes on bf16 rows whose sines do not begin at a multiple of 16 bytes.
    misaligned = module.is_neox_style and module.rotary_dim // 2 * dtype.itemsize % 16
    if misaligned or not current_platform.is_cpu():
        return ("forward_native",)
    return ("forward_native", "forward_cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_undo_and_apply_are_those_of_the_model(variant: str, head_size: int, dtype: torch.dtype) -> None:
    module = make_rope(variant, head_size, dtype)
    rotary = rope.rotary_of(make_parent(module, dtype), LAYER, head_size)
    assert rotary.rotary_dim == module.rotary_dim > 0
    for tokens, heads in ((1, 1), (37, 3), (129, 2)):
        keys, positions = make_keys(tokens, heads, head_size, dtype), make_positions(tokens)
        exact = apply(rotary, keys, positions)
        ideal = exact.to(dtype)  # one rounding: the best that a kernel of this dtype can hand over
        norms = pair_norms(keys, rotary)
        assert rotary.cos_sin is not None
        magnitude = float(rotary.cos_sin.float().abs().max())
        for how in methods(module, dtype):
            rotated = rotate_by_vllm(module, how, keys, positions)
            assert rotated.dtype == dtype
            back = undo(rotary, rotated, positions)
            assert back.dtype == torch.float32
            if dtype == torch.float32:
                assert ((exact - rotated).double().abs() <= 1e-5 * magnitude * norms).all()
                assert ((back - keys).double().abs() <= 1e-5 * norms).all()
                continue
            # Two products and a sum, each rounded: 2.42 u in an element, 3.42 u in a pair.
            unit = torch.finfo(dtype).eps / 2
            assert ((exact - rotated).double().abs() <= 2.5 * unit * magnitude * norms).all()
            assert ((back - keys).double().abs() <= 3.5 * unit * norms).all()
            # On average: twice the error of one rounding, if there are enough elements to average over. Not
            # for vLLM's CPU kernel, which truncates to bf16 on machines without an instruction to round.
            if how != "forward_cpu" and keys.numel() >= 4096:
                best = (undo(rotary, ideal, positions) - keys).norm()
                assert (back - keys).norm() <= 2 * best


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_the_identity_whatever_the_table(variant: str, dtype: torch.dtype) -> None:
    # A bf16 table has cos² + sin² up to 0.8% off 1: without the division this fails by two decimals.
    rotary = rope.rotary_of(make_parent(make_rope(variant, 128, dtype), dtype), LAYER, 128)
    keys, positions = make_keys(257, 2, 128, torch.float32), make_positions(257)
    torch.testing.assert_close(undo(rotary, apply(rotary, keys, positions), positions), keys, rtol=0, atol=5e-6)
    torch.testing.assert_close(apply(rotary, undo(rotary, keys, positions), positions), keys, rtol=0, atol=5e-6)


@pytest.mark.parametrize("is_neox", [True, False])
def test_a_quarter_turn_by_hand(is_neox: bool) -> None:
    table = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 2.0, 2.0]])
    rotary = Rotary(table, rotary_dim=4, is_neox=is_neox)
    keys = torch.arange(1.0, 6.0).repeat(3, 1, 1)
    positions = torch.tensor([0, 1, 2], dtype=torch.int32)
    # Position 1 turns the first pair by 90 degrees, position 2 turns both and doubles them.
    expected = {
        True: [[1.0, 2.0, 3.0, 4.0, 5.0], [-3.0, 2.0, 1.0, 4.0, 5.0], [-6.0, -8.0, 2.0, 4.0, 5.0]],
        False: [[1.0, 2.0, 3.0, 4.0, 5.0], [-2.0, 1.0, 3.0, 4.0, 5.0], [-4.0, 2.0, -8.0, 6.0, 5.0]],
    }[is_neox]
    turned = apply(rotary, keys, positions)
    assert torch.equal(turned[:, 0], torch.tensor(expected))
    assert torch.equal(undo(rotary, turned, positions), keys)


def test_arguments_are_left_alone_and_may_have_any_strides() -> None:
    rotary = rope.rotary_of(make_parent(make_rope("neox", 64, torch.float32), torch.float32), LAYER, 64)
    qkv = make_keys(11, 6, 64, torch.float32)
    before, keys, positions = qkv.clone(), qkv[:, 2:4], make_positions(22)[::2]
    for turn in (apply, undo):
        assert torch.equal(turn(rotary, keys, positions), turn(rotary, keys.contiguous(), positions.int()))
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("variant", ["neox", "partial interleaved"])
def test_empty_input(variant: str) -> None:
    rotary = rope.rotary_of(make_parent(make_rope(variant, 64, torch.bfloat16), torch.bfloat16), LAYER, 64)
    for turn, shape in itertools.product((apply, undo), ((0, 2, 64), (3, 0, 64))):
        out = turn(rotary, torch.empty(shape, dtype=torch.bfloat16), torch.zeros(shape[0], dtype=torch.int64))
        assert out.shape == shape
        assert out.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rope_is_the_identity_in_new_memory(dtype: torch.dtype) -> None:
    keys = make_keys(5, 2, 64, dtype)
    for turn in (apply, undo):
        out = turn(Rotary.identity(), keys, torch.full((5,), 10**9))
        assert torch.equal(out, keys.float())
        assert out.data_ptr() != keys.data_ptr()


@pytest.mark.parametrize("turn", [apply, undo])
@pytest.mark.parametrize("position", [-1, -(2**40), MAX_POSITION, 2**40])
def test_position_outside_the_table_is_refused(turn: Any, position: int) -> None:
    rotary = rope.rotary_of(make_parent(make_rope("neox", 64, torch.float32), torch.float32), LAYER, 64)
    positions = torch.tensor([0, position, 1])
    with pytest.raises(ValueError, match=f"position {position} is outside .* 0 to {MAX_POSITION - 1}"):
        turn(rotary, make_keys(3, 1, 64, torch.float32), positions)


@pytest.mark.parametrize(
    ("keys", "positions", "message"),
    [
        (torch.zeros(3, 64), torch.zeros(3, dtype=torch.int64), r"x must be .* \[3, 64\]"),
        (torch.zeros(3, 1, 64, dtype=torch.int8), torch.zeros(3, dtype=torch.int64), "x must be .*int8"),
        (torch.zeros(3, 1, 64), torch.zeros(2, dtype=torch.int64), r"positions must be .*= 3\], got .*\[2\]"),
        (torch.zeros(3, 1, 64), torch.zeros(3, 3, dtype=torch.int64), r"positions must be .*\[3, 3\]"),
        (torch.zeros(3, 1, 64), torch.zeros(3), "positions must be .*float32"),
        (torch.zeros(3, 1, 32), torch.zeros(3, dtype=torch.int64), "head_size 32 is below rotary_dim 64"),
        (torch.zeros(3, 1, 64, device="meta"), torch.zeros(3, dtype=torch.int64), "x is on meta.* on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(keys: Tensor, positions: Tensor, message: str) -> None:
    rotary = Rotary(torch.ones(4, 64), rotary_dim=64, is_neox=True)
    for turn in (apply, undo):
        with pytest.raises(ValueError, match=message):
            turn(rotary, keys, positions)


@pytest.mark.parametrize(
    ("table", "rotary_dim", "message"),
    [
        (None, 64, "needs a cos_sin table"),
        (torch.ones(4, 64), 0, "layer without RoPE"),
        (torch.ones(4, 63), 63, "even"),
        (None, -2, "not negative"),
        (torch.ones(4, 32), 64, r"rotary_dim = 64\], got \[4, 32\]"),
        (torch.ones(64), 64, r"got \[64\]"),
        (torch.ones(4, 64, dtype=torch.int32), 64, "int32"),
    ],
)
def test_rotary_that_contradicts_itself_is_refused(table: Tensor | None, rotary_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rotary(table, rotary_dim, is_neox=True)


# --- which rows ---------------------------------------------------------------------------------


def test_table_is_the_models_own_buffer() -> None:
    module = make_rope("neox", 64, torch.bfloat16)
    rotary = rope.rotary_of(make_parent(module, torch.bfloat16), LAYER, 64)
    assert rotary.cos_sin is not None
    assert rotary.cos_sin.data_ptr() == module.cos_sin_cache.data_ptr()


def test_fp32_cache_of_a_bf16_model_is_rounded_once_for_all_layers() -> None:
    # gpt-oss asks for an fp32 cache; vLLM rounds it to the queries' dtype before it multiplies.
    module = make_rope("yarn", 64, torch.float32)
    first, second = (rope.rotary_of(make_parent(module, torch.bfloat16), LAYER, 64).cos_sin for _ in range(2))
    assert first is not None
    assert second is not None
    assert module.cos_sin_cache.dtype == torch.float32
    assert first.data_ptr() == second.data_ptr()
    keys, positions = make_keys(9, 1, 64, torch.bfloat16), make_positions(9)
    rotate_by_vllm(module, "forward_native", keys, positions)
    assert torch.equal(first, module.cos_sin_cache)  # which the module has rounded by now


def test_longrope_reads_short_rows_up_to_the_original_length_and_long_rows_beyond() -> None:
    short, long = make_rope("longrope short", 64, torch.float32), make_rope("longrope long", 64, torch.float32)
    assert not short.use_long_rope
    assert long.use_long_rope
    tables = [rope.rotary_of(make_parent(m, torch.float32), LAYER, 64).cos_sin for m in (short, long)]
    assert tables[0] is not None
    assert tables[1] is not None
    assert torch.equal(tables[0], short.long_short_cos_sin_cache[:8192])
    assert torch.equal(tables[1], long.long_short_cos_sin_cache[4096:])
    assert tables[1].shape[0] == 8192


@pytest.mark.parametrize("factor", [2.0, 1.3])
def test_linear_scaling_with_several_factors_reads_the_first(factor: float) -> None:
    module = rotary_embedding.LinearScalingRotaryEmbedding(64, 64, 1001, 10000.0, True, [factor, 8.0], torch.float32)
    rotary = rope.rotary_of(make_parent(module, torch.float32), LAYER, 64)
    assert rotary.cos_sin is not None
    assert rotary.cos_sin.shape[0] == module.scaling_factor_to_offset[8.0]
    last = torch.tensor([rotary.cos_sin.shape[0] - 1])
    keys = make_keys(1, 1, 64, torch.float32)
    rotated = rotate_by_vllm(module, "forward_native", keys, last)
    torch.testing.assert_close(undo(rotary, rotated, last), keys, rtol=0, atol=1e-5)


def test_layers_share_one_rotary_per_rotary_module_and_device() -> None:
    for variant in VARIANTS:
        module = make_rope(variant, 64, torch.float32)
        first, second = (rope.rotary_of(make_parent(module, torch.float32), LAYER, 64) for _ in range(2))
        assert first is second
        moved = rope.rotary_of(make_parent(module, torch.float32), LAYER, 64, device=torch.device("meta"))
        assert moved.cos_sin is not None
        assert moved.cos_sin.device == torch.device("meta")
        assert rope.rotary_of(make_parent(module, torch.float32), LAYER, 64) is first


def test_a_rotary_module_is_forgotten_with_its_model() -> None:
    module = make_rope("longrope long", 64, torch.float32)
    rope.rotary_of(make_parent(module, torch.float32), LAYER, 64)
    assert module in rope._known
    count = len(rope._known)
    rotary_embedding._ROPE_DICT.clear()
    del module
    gc.collect()
    assert len(rope._known) < count


# --- refusals -----------------------------------------------------------------------------------


def assert_refused(parent: nn.Module | None, *words: str, head_size: int = 64) -> None:
    """Refused in one sentence that names class, layer and the way out, and holds these words."""
    with pytest.raises(ValueError, match="ShadowKV cannot undo RoPE") as caught:
        rope.rotary_of(parent, LAYER, head_size)
    message = str(caught.value)
    for word in (*words, LAYER, "use another --attention-backend"):
        assert word in message
    assert message.endswith(".")
    assert ". " not in message


def blank(cls: type[nn.Module], **attributes: Any) -> Any:
    """An instance whose constructor has not run."""
    module = object.__new__(cls)
    nn.Module.__init__(module)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


class RotaryOfSomebodyElse(rotary_embedding.RotaryEmbedding):
    pass


@pytest.mark.parametrize(
    "cls",
    [
        rotary_embedding.MRotaryEmbeddingInterleaved,
        rotary_embedding.BailingMRotaryEmbedding,
        rotary_embedding.DualChunkRotaryEmbedding,
        rotary_embedding.DeepseekScalingRotaryEmbedding,
        rotary_embedding.DeepseekV4ScalingRotaryEmbedding,
        rotary_embedding.FourierRotaryEmbedding,
        rotary_embedding.Gemma4RotaryEmbedding,
        rotary_embedding.Llama4VisionRotaryEmbedding,
        rotary_embedding.NTKScalingRotaryEmbedding,
        RotaryOfSomebodyElse,
        nn.Identity,
    ],
)
def test_other_rotary_classes_are_refused_by_name(cls: type[nn.Module]) -> None:
    module = blank(cls, head_size=64, rotary_dim=64)
    assert_refused(make_parent(module, torch.float32), "LlamaAttention", cls.__name__)


class TestMRope:
    """M-RoPE turns a token of an image by three positions, none of which is its place in the prompt."""

    FIRST, TOKENS = 5000, 512

    @pytest.fixture(params=[False, True], ids=["sections", "interleaved"])
    def module(self, request: pytest.FixtureRequest) -> Any:
        parameters = {"rope_theta": 1e6, "mrope_section": [8, 12, 12], "mrope_interleaved": request.param}
        return get_rope(64, MAX_POSITION, True, parameters, torch.float32)

    def positions(self, kind: str) -> Tensor:
        """Of tokens whose places are `FIRST` and on: text 300 positions behind its place, or an image of 16 columns."""
        at = torch.arange(self.TOKENS)
        if kind == "text":
            return (at + self.FIRST - 300).expand(3, -1)
        return torch.stack((torch.zeros_like(at), at // 16, at % 16)) + 4000

    def lost(self, keys: Tensor) -> float:
        """The share of keys beyond rank 88, which is what a page of 512 tokens has for two heads of 64 and more."""
        rows = keys.flatten(1)
        values = torch.linalg.svdvals(rows - rows.mean(0))
        return float(values[88:].norm() / rows.norm())

    def keys(self) -> Tensor:
        """Of low rank before RoPE, as keys are: 4 heads of 64."""
        generator = torch.Generator().manual_seed(3)
        latent = torch.randn(self.TOKENS, 64, generator=generator) * torch.arange(1, 65) ** -0.5
        noise = 0.02 * torch.randn(self.TOKENS, 256, generator=generator)
        return (latent @ torch.randn(64, 256, generator=generator) / 8 + noise).view(-1, 4, 64)

    def turned(self, module: Any, keys: Tensor, positions: Tensor) -> Tensor:
        rotated: Tensor = module.forward_native(positions, keys.flatten(1), keys.flatten(1).clone())[1]
        return rotated.view_as(keys)

    def test_text_is_turned_by_its_place(self, module: Any) -> None:
        rotary = rope.rotary_of(make_parent(module, torch.float32), LAYER, 64)
        keys, at = self.keys(), torch.arange(self.TOKENS)
        torch.testing.assert_close(apply(rotary, keys, at), self.turned(module, keys, at.expand(3, -1)))

    @pytest.mark.parametrize("kind", ["text", "image"])
    def test_turning_back_and_forth_by_a_tokens_place_is_the_identity_and_costs_rank_for_images(
        self, kind: str, module: Any
    ) -> None:
        """Measured: 0.055 of a key's norm is lost where it is turned back as it was turned; 0.29 of an image's here."""
        rotary = rope.rotary_of(make_parent(module, torch.float32), LAYER, 64)
        places = torch.arange(self.FIRST, self.FIRST + self.TOKENS)
        keys = self.turned(module, self.keys(), self.positions(kind))
        back = undo(rotary, keys, places)
        torch.testing.assert_close(apply(rotary, back, places), keys, atol=1e-4, rtol=0)
        least = self.lost(self.keys())
        if kind == "text":
            assert self.lost(back) == pytest.approx(least, rel=0.01)
        else:
            assert self.lost(back) > 3 * least
            assert self.lost(back) > 0.9 * self.lost(apply(rotary, self.keys(), places)), "as if it were not turned"


@pytest.mark.parametrize(
    "parent",
    [
        nn.ModuleList(),
        stand_in("deepseek_v2.DeepseekV2Attention"),
        stand_in("llama.LlamaAttentionOfSomebodyElse"),
        stand_in("nobody.LlamaAttention"),
    ],
    ids=lambda parent: type(parent).__name__,
)
def test_other_attention_classes_are_refused_by_name(parent: nn.Module) -> None:
    assert_refused(parent, type(parent).__name__, type(parent).__module__)


def test_subclass_of_a_known_attention_class_is_refused() -> None:
    known = type(make_parent(None, torch.float32))
    other = type("MyAttention", (known,), {"__module__": "my_models"})
    assert_refused(other(), "MyAttention", "my_models")


def test_same_class_name_outside_vllm_is_refused() -> None:
    cls = type("LlamaAttention", (nn.Module,), {"__module__": "llama"})
    assert_refused(cls(), "LlamaAttention")


def test_no_parent_is_refused() -> None:
    assert_refused(None, "without a parent module")


def test_heads_that_turn_in_part_of_their_own_are_refused() -> None:
    # MLA unfolded: a rotary module for 64 dimensions of a head of 192.
    parent = make_parent(make_rope("neox", 64, torch.float32), torch.float32)
    assert_refused(parent, "heads of 64", "192 dimensions", head_size=192)


def test_parent_without_that_layer_is_refused() -> None:
    parent = make_parent(make_rope("neox", 64, torch.float32), torch.float32)
    parent.attn.layer_name = "another"
    assert_refused(parent, "no attention layer of this name")


def test_class_that_lost_an_attribute_is_refused() -> None:
    assert_refused(stand_in("llama.LlamaAttention"), "LlamaAttention", "rotary_emb")
    assert_refused(stand_in("granite.GraniteAttention"), "GraniteAttention", "use_rope")


def test_keys_changed_after_rope_are_refused() -> None:
    module = make_rope("neox", 64, torch.float32)
    llama4 = make_parent(module, torch.float32, "llama4.Llama4Attention", qk_norm=nn.Identity())
    assert_refused(llama4, "Llama4Attention", "normalizes keys after RoPE")
    hunyuan = make_parent(module, torch.float32, "hy_v3.HYV3Attention", hpc_rope_norm=nn.Identity())
    assert_refused(hunyuan, "HYV3Attention", "HpcRopeNorm")
    llama4.qk_norm = hunyuan.hpc_rope_norm = None
    for parent in (llama4, hunyuan):
        assert rope.rotary_of(parent, LAYER, 64).rotary_dim == 64


# --- the models' sources --------------------------------------------------------------------------


@functools.cache
def _class_source(path: str) -> ast.ClassDef:
    module, name = path.split(".")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    models = Path(spec.submodule_search_locations[0]) / "model_executor" / "models"
    for node in ast.parse((models / f"{module}.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise AssertionError(f"vLLM has no {path} any more")


def _names(target: ast.expr) -> list[str]:
    elements = target.elts if isinstance(target, ast.Tuple) else [target]
    return [e.id for e in elements if isinstance(e, ast.Name)]


def _rotations(body: list[ast.stmt], guards: tuple[str, ...] = ()) -> Iterator[tuple[ast.Assign, tuple[str, ...]]]:
    """Assignments of keys from a rotary call, with the conditions they stand under."""
    for statement in body:
        if isinstance(statement, ast.If):
            condition = ast.unparse(statement.test)
            yield from _rotations(statement.body, (*guards, condition))
            yield from _rotations(statement.orelse, (*guards, f"not ({condition})"))
        elif (
            isinstance(statement, ast.Assign)
            and {"k", "key"} & set(_names(statement.targets[0]))
            and "self.rotary_emb" in ast.unparse(statement.value)
        ):
            yield statement, guards


def _methods_that_rotate(path: str) -> dict[ast.FunctionDef, list[tuple[ast.Assign, tuple[str, ...]]]]:
    source = _class_source(path)
    functions = [node for node in source.body if isinstance(node, ast.FunctionDef)]
    inherits = "forward" not in {function.name for function in functions}
    if inherits and [ast.unparse(base) for base in source.bases] == ["LlamaAttention"]:
        return _methods_that_rotate("llama.LlamaAttention")
    found = {function: list(_rotations(function.body)) for function in functions}
    return {function: rotations for function, rotations in found.items() if rotations}


LISTED = sorted(rope._ATTENTION_CLASSES)
ROTATING = [path for path in LISTED if rope._ATTENTION_CLASSES[path] is not rope._never]
# Holds no keys of its own (refused where keys are shared), or means that the layer is refused.
FALSE_HERE = ("is_kv_shared_layer", "hpc_rope_norm", "qk_norm")


@pytest.mark.parametrize("path", ROTATING)
def test_whether_a_layer_rotates_is_what_its_forward_says(path: str) -> None:
    found = _methods_that_rotate(path)
    assert len(found) == 1, f"{path} rotates in {[f.name for f in found]}"
    (rotations,) = found.values()
    predicate = rope._ATTENTION_CLASSES[path]
    conditions = [" and ".join(f"({g})" for g in guards) or "True" for _, guards in rotations]
    condition = " or ".join(f"({c})" for c in conditions)
    names = {
        node.attr
        for node in ast.walk(ast.parse(condition))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    names |= {name for name in predicate.__code__.co_names if name not in ("bool", "_Unsupported")}
    free = sorted(names - set(FALSE_HERE))
    for values in itertools.product((None, 1), repeat=len(free)):
        layer = SimpleNamespace(**dict.fromkeys(FALSE_HERE), **dict(zip(free, values, strict=True)))
        rotates = bool(eval(condition, {"self": layer}))
        assert predicate(layer) == rotates, f"{path}: {condition} with {layer}"


@pytest.mark.parametrize("path", ROTATING)
def test_nothing_but_a_reshape_happens_to_keys_after_rope(path: str) -> None:
    for function, rotations in _methods_that_rotate(path).items():
        last = max(statement.lineno for statement, _ in rotations)
        later = [
            ast.unparse(node.value)
            for node in ast.walk(function)
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign))
            and node.lineno > last
            and {"k", "key"} & set(_names(node.targets[0] if isinstance(node, ast.Assign) else node.target))
        ]
        changes = [value for value in later if not value.startswith(("k.view(", "k.reshape(", "k.flatten("))]
        if path == "llama4.Llama4Attention":  # refused where it has a qk_norm
            assert any("qk_norm" in change for change in changes)
            continue
        assert not changes


@pytest.mark.parametrize("path", sorted(set(LISTED) - set(ROTATING)))
def test_models_without_rope_mention_none_and_get_the_identity(path: str) -> None:
    assert "rotary" not in ast.unparse(_class_source(path))
    rotary = rope.rotary_of(stand_in(path), LAYER, 64)
    assert (rotary.cos_sin, rotary.rotary_dim) == (None, 0)


@pytest.mark.parametrize(
    ("path", "attributes"),
    [
        ("afmoe.AfmoeAttention", {"is_local_attention": False}),
        ("cohere2_moe.Cohere2MoeAttention", {"sliding_window": None, "force_rope": False}),
        ("cohere_compass.CohereCompassAttention", {"rotary_emb": None}),
        ("commandr.CohereAttention", {"v1": False, "sliding_window": None}),
        ("exaone4.Exaone4Attention", {"sliding_window": None, "apply_rope_all_layers": False}),
        ("exaone_moe.ExaoneMoeAttention", {"use_rope": False}),
        ("falcon.FalconAttention", {"use_rotary": False}),
        ("granite.GraniteAttention", {"use_rope": False}),
        ("llama4.Llama4Attention", {"rotary_emb": None, "qk_norm": None}),
        ("olmo_hybrid.OlmoHybridAttention", {"_use_rope": False}),
        ("step3p5.Step3p5Attention", {"use_rope": False}),
    ],
)
def test_layer_that_has_a_rotary_module_but_does_not_use_it(path: str, attributes: dict[str, Any]) -> None:
    module = make_rope("neox", 64, torch.float32)
    parent = make_parent(attributes.pop("rotary_emb", module), torch.float32, path, **attributes)
    assert rope.rotary_of(parent, LAYER, 64).rotary_dim == 0


def test_no_caller_in_vllm_chooses_longrope_rows_at_run_time() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    callers = [
        path
        for folder in ("model_executor/models", "models")
        for path in (root / folder).rglob("*.py")
        if any("rotary_emb(" in line and "offsets" in line for line in path.read_text().splitlines())
    ]
    assert callers == []


def test_rotary_knows_no_vllm() -> None:
    assert "import vllm\n" not in (source := Path(rotary_module.__file__).read_text())
    assert "from vllm." not in source
