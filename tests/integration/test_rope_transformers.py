"""The rotation of Transformers' attention classes, against their own sources and functions."""

from __future__ import annotations

import ast
import importlib
import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm_shadowkv.integration.model import rope, rope_transformers
from vllm_shadowkv.rotary import apply, undo

LAYER, HEADS, POSITIONS = "model.layers.1.self_attn.attn", 4, 300
PATHS = sorted(rope_transformers._ATTENTION_CLASSES)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}


def source_module(path: str) -> ModuleType:
    return importlib.import_module(rope_transformers._MODELS + path.rsplit(".", 1)[0])


def make_config(path: str, **fields: Any) -> Any:
    from transformers import AutoConfig

    fields = {"hidden_size": 256, "num_attention_heads": HEADS, "num_hidden_layers": 2, "head_dim": 64} | fields
    if path.startswith("smollm3"):
        fields["no_rope_layers"] = [0, 1]
    return AutoConfig.for_model(path.split(".")[0], max_position_embeddings=POSITIONS, **fields)


def make_parent(path: str, dtype: torch.dtype, config: Any) -> Any:
    """The attention class with its configuration and a layer, without weights."""
    cls = getattr(source_module(path), path.rsplit(".", 1)[1])
    parent: Any = cls.__new__(cls)
    nn.Module.__init__(parent)
    parent.config, parent.layer_idx, parent.use_rope = config, 1, 1
    layer: Any = nn.Module()
    layer.layer_name, layer.dtype = LAYER, dtype
    parent.attn = layer
    return parent


def rotated_by_transformers(path: str, config: Any, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys `[tokens, heads, head_size]` as the model turns them."""
    source = source_module(path)
    module = getattr(source, path.rsplit(".", 1)[1].removesuffix("Attention") + "RotaryEmbedding")(config=config)
    takes_type = "layer_type" in inspect.signature(inspect.unwrap(type(module).forward)).parameters
    options = {"layer_type": config.layer_types[1]} if takes_type else {}
    cosines, sines = module(keys[:0], positions[None], **options)
    heads_first, turned = keys.transpose(0, 1)[None], cosines.shape[-1]
    if path.startswith("phi."):  # the only one whose `forward` cuts the heads, instead of the function
        _, rotated = source.apply_rotary_pos_emb(heads_first[..., :turned], heads_first[..., :turned], cosines, sines)
        rotated = torch.cat((rotated, heads_first[..., turned:]), dim=-1)
    else:
        _, rotated = source.apply_rotary_pos_emb(heads_first, heads_first, cosines, sines)
    return rotated[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_keys_are_turned_as_the_model_turns_them(path: str, dtype: torch.dtype) -> None:
    config = make_config(path)
    rotary = rope.rotary_of(make_parent(path, dtype, config), LAYER, 64, max_positions=POSITIONS)
    assert rotary.rotary_dim >= 16
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(50, HEADS, 64, generator=generator).to(dtype)
    positions = torch.randint(0, POSITIONS, (50,), generator=generator)
    expected = rotated_by_transformers(path, config, keys, positions).float()
    unit = torch.finfo(dtype).eps
    assert (apply(rotary, keys, positions) - expected).abs().max() <= 4 * unit * keys.abs().max()
    assert (keys.float() - expected).abs().max() > 1, "nothing was turned"


def test_scaling_is_the_models() -> None:
    path = "seed_oss.modeling_seed_oss.SeedOssAttention"
    plain, scaled = make_config(path), make_config(path, rope_parameters=YARN)
    tables = [
        rope.rotary_of(make_parent(path, torch.float32, config), LAYER, 64, max_positions=POSITIONS).cos_sin
        for config in (plain, scaled)
    ]
    assert tables[0] is not None
    assert tables[1] is not None
    assert not torch.allclose(tables[0], tables[1], atol=0.1)
    keys, positions = torch.ones(POSITIONS, 1, 64), torch.arange(POSITIONS)
    rotary = rope.rotary_of(make_parent(path, torch.float32, scaled), LAYER, 64, max_positions=POSITIONS)
    torch.testing.assert_close(apply(rotary, keys, positions), rotated_by_transformers(path, scaled, keys, positions))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_scaling_that_depends_on_the_step_is_refused(rope_type: str) -> None:
    config = make_config("seed_oss.modeling_seed_oss.SeedOssAttention")
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    parent = make_parent("seed_oss.modeling_seed_oss.SeedOssAttention", torch.float32, config)
    sentence = f"SeedOssAttention scales RoPE by {rope_type}, which depends on the step; use another"
    with pytest.raises(ValueError, match=sentence):
        rope.rotary_of(parent, LAYER, 64, max_positions=POSITIONS)


def test_each_kind_of_layer_has_its_own_scaling() -> None:
    path = "olmo3.modeling_olmo3.Olmo3Attention"
    config = make_config(path, layer_types=["full_attention", "sliding_attention"])
    config.rope_parameters = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    full, sliding = (make_parent(path, torch.float32, config) for _ in range(2))
    full.layer_idx = 0
    tables = [rope.rotary_of(parent, LAYER, 64, max_positions=POSITIONS).cos_sin for parent in (full, sliding)]
    assert tables[0] is not None
    assert tables[1] is not None
    assert not torch.allclose(tables[0], tables[1], atol=0.1)


def test_a_layer_without_rope_is_the_identity() -> None:
    path = "smollm3.modeling_smollm3.SmolLM3Attention"
    parent = make_parent(path, torch.float32, make_config(path))
    parent.use_rope = 0
    assert rope.rotary_of(parent, LAYER, 64, max_positions=POSITIONS).rotary_dim == 0


def test_heads_that_are_too_small_are_refused() -> None:
    path = "olmo2.modeling_olmo2.Olmo2Attention"
    parent = make_parent(path, torch.float32, make_config(path))
    with pytest.raises(ValueError, match="Olmo2Attention turns 64 dimensions, but its attention heads have 32; use"):
        rope.rotary_of(parent, LAYER, 32, max_positions=POSITIONS)


def test_layers_share_one_table() -> None:
    path = "olmo2.modeling_olmo2.Olmo2Attention"
    config = make_config(path)
    first, second = (
        rope.rotary_of(make_parent(path, torch.float32, config), LAYER, 64, max_positions=POSITIONS) for _ in range(2)
    )
    assert first is second


@pytest.mark.parametrize("path", ["vaultgemma.modeling_vaultgemma.VaultGemmaAttention"])
def test_other_classes_are_refused_by_name(path: str) -> None:
    parent = make_parent(path, torch.float32, SimpleNamespace())
    with pytest.raises(ValueError, match=r"VaultGemmaAttention \(of transformers\..*use another --attention-backend"):
        rope.rotary_of(parent, LAYER, 64, max_positions=POSITIONS)


@pytest.mark.parametrize("path", PATHS)
def test_forward_turns_keys_once_and_changes_them_no_more(path: str) -> None:
    cls = getattr(source_module(path), path.rsplit(".", 1)[1])
    forward = ast.parse(inspect.cleandoc(inspect.getsource(inspect.unwrap(cls.forward)))).body[0]
    assert isinstance(forward, ast.FunctionDef)
    keys = [
        (ast.unparse(node.value), guards)
        for node, guards in _assignments(forward.body)
        if any(name.id in ("key_states", "key_rot") for target in node.targets for name in _names(target))
    ]
    turned = [index for index, (value, _) in enumerate(keys) if value.startswith("apply_rotary_pos_emb(")]
    assert len(turned) == 1
    guarded = path.startswith("smollm3")
    assert keys[turned[0]][1] == (("self.use_rope",) if guarded else ())
    later = [value for value, guards in keys[turned[0] + 1 :] if not any("is not None" in guard for guard in guards)]
    norm = rope_transformers._NORMS_AFTER.get(path)
    expected = [f"self.{norm}(key_states)"] if norm else []
    assert later == (["torch.cat((key_rot, key_pass), dim=-1)"] if path.startswith("phi.") else expected)


@pytest.mark.parametrize("path", sorted(rope_transformers._NORMS_AFTER))
def test_without_the_weight_a_key_that_was_normalised_after_rope_can_be_turned_back(path: str) -> None:
    config = make_config(path)
    parent = make_parent(path, torch.float32, config)
    norm = type(parent).__name__.replace("Attention", "RMSNorm")
    parent.key_layernorm = getattr(source_module(path), norm)(64)
    generator = torch.Generator().manual_seed(1)
    parent.key_layernorm.weight.data = 1 + torch.rand(64, generator=generator)
    keys, positions = torch.randn(50, HEADS, 64, generator=generator), torch.arange(50) * 5
    rotary = rope.rotary_of(parent, LAYER, 64, max_positions=POSITIONS)
    weight = rope.weight_after(parent)
    assert weight is parent.key_layernorm.weight
    found = parent.key_layernorm(rotated_by_transformers(path, config, keys, positions))
    expected = keys / keys.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(undo(rotary, found.detach() / weight.detach(), positions), expected, atol=1e-4, rtol=0)
    assert (undo(rotary, found.detach(), positions) / weight.detach() - expected).abs().max() > 0.1


@pytest.mark.parametrize(("longest", "steady"), [(POSITIONS, True), (POSITIONS + 1, False)])
def test_hunyuans_scaling_does_not_depend_on_the_step_up_to_the_models_length(longest: int, steady: bool) -> None:
    path = "hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1Attention"
    config = make_config(path)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
    parent = make_parent(path, torch.float32, config)
    if not steady:
        with pytest.raises(ValueError, match="scales RoPE by dynamic, which depends on the step"):
            rope.rotary_of(parent, LAYER, 64, max_positions=longest)
        return
    rotary = rope.rotary_of(parent, LAYER, 64, max_positions=longest)
    keys = torch.randn(50, HEADS, 64, generator=torch.Generator().manual_seed(1))
    for positions in torch.arange(50), torch.arange(250, 300):
        torch.testing.assert_close(
            apply(rotary, keys, positions), rotated_by_transformers(path, config, keys, positions), atol=1e-4, rtol=0
        )


def _names(target: ast.expr) -> list[ast.Name]:
    return [node for node in ast.walk(target) if isinstance(node, ast.Name)]


def _assignments(body: list[ast.stmt], guards: tuple[str, ...] = ()) -> list[tuple[ast.Assign, tuple[str, ...]]]:
    """Assignments in order, with the conditions they stand under."""
    found = []
    for statement in body:
        if isinstance(statement, ast.If):
            found += _assignments(statement.body, (*guards, ast.unparse(statement.test)))
            found += _assignments(statement.orelse, (*guards, f"not ({ast.unparse(statement.test)})"))
        elif isinstance(statement, ast.Assign):
            found.append((statement, guards))
    return found
