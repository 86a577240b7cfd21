"""The rotation of models that vLLM runs through its Transformers modelling backend (SmolLM3, OLMo 2 and 3, ...).

There the parent of an attention layer is a class of Transformers. It turns keys with cosines that its model computes in
every step and hands down, by a rotary module that the parent does not know. That module stands in the same source file
and is made of the configuration alone, so another one is made here and asked for every position.

Another allow-list of exact classes, for the same reason as in `rope.py`. Read against Transformers 5.19;
`tests/integration/test_rope_transformers.py` re-reads the sources, and compares with their own `apply_rotary_pos_emb`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from vllm_shadowkv.rotary import Rotary

_MODELS = "transformers.models."

# These choose their frequencies once. Others (dynamic, longrope) choose them by the longest position of a step.
_STEADY_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _always(parent: Any) -> bool:
    return True


def _if_use_rope(parent: Any) -> bool:
    return bool(parent.use_rope)


# Path below `_MODELS` -> whether a layer of this class rotates, and whether it pairs dimension i with
# i + rotary_dim / 2 (else 2i with 2i + 1). Each class calls its file's `apply_rotary_pos_emb` once, on keys that only a
# reshape or the other, unturned part of a head joins afterwards.
#
# Not here: VaultGemma, whose attention has a soft cap.
_ATTENTION_CLASSES: dict[str, tuple[Callable[[Any], bool], bool]] = {
    "arcee.modeling_arcee.ArceeAttention": (_always, True),
    "cwm.modeling_cwm.CwmAttention": (_always, True),
    "dots1.modeling_dots1.Dots1Attention": (_always, True),
    "flex_olmo.modeling_flex_olmo.FlexOlmoAttention": (_always, True),
    "glm.modeling_glm.GlmAttention": (_always, False),
    "gpt_neox.modeling_gpt_neox.GPTNeoXAttention": (_always, True),
    "hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1Attention": (_always, True),
    "hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1Attention": (_always, True),
    "jais2.modeling_jais2.Jais2Attention": (_always, True),
    "mellum.modeling_mellum.MellumAttention": (_always, True),
    "olmo.modeling_olmo.OlmoAttention": (_always, True),
    "olmo2.modeling_olmo2.Olmo2Attention": (_always, True),
    "olmo3.modeling_olmo3.Olmo3Attention": (_always, True),
    "phi.modeling_phi.PhiAttention": (_always, True),
    "seed_oss.modeling_seed_oss.SeedOssAttention": (_always, True),
    "smollm3.modeling_smollm3.SmolLM3Attention": (_if_use_rope, True),
    "solar_open.modeling_solar_open.SolarOpenAttention": (_always, True),
    "starcoder2.modeling_starcoder2.Starcoder2Attention": (_always, True),
}

# Classes that normalise keys after RoPE -> the norm. It divides a token by a number, which leaves a turned key a turned
# key, but its weight stretches dimensions that were turned into one another.
_NORMS_AFTER = {
    "hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1Attention": "key_layernorm",
    "hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1Attention": "key_layernorm",
}

# By value, because the layers of a model share a configuration, which is not hashable.
_known: WeakValueDictionary[tuple[Any, ...], Rotary] = WeakValueDictionary()


class Unsupported(Exception):
    """What about the parent class is not supported: a phrase that follows the class's name."""


def knows(parent: nn.Module) -> bool:
    """Whether the class is among those of Transformers that are supported."""
    return _path(parent) in _ATTENTION_CLASSES


def rotary_of(
    parent: Any, head_size: int, dtype: torch.dtype, device: torch.device | None, max_positions: int
) -> Rotary:
    """Return the rotation that a Transformers attention module applies to its keys.

    Args:
        parent: the attention module, of a class that `knows` accepts.
        head_size: its head size.
        dtype: of its keys.
        device: where the table is wanted; None: the CPU.
        max_positions: rows of the table.

    Returns:
        The rotation; equal ones are shared. The identity for a layer that does not rotate.

    Raises:
        Unsupported: a way of scaling that changes from step to step, or heads that do not fit.
    """
    rotates, is_neox = _ATTENTION_CLASSES[_path(parent)]
    if not rotates(parent):
        return Rotary.identity()
    cls, config = type(parent), parent.config
    # Models with sliding windows may have one set of parameters per kind of layer.
    layer_type = config.layer_types[parent.layer_idx] if getattr(config, "layer_types", None) else None
    parameters = config.rope_parameters
    per_type = layer_type in parameters
    rope_type = (parameters[layer_type] if per_type else parameters)["rope_type"]
    # HunYuan's way of scaling, which takes no other frequencies up to the length that the model was made for.
    steady = "alpha" in parameters and rope_type == "dynamic" and max_positions <= config.max_position_embeddings
    if rope_type not in _STEADY_ROPE_TYPES and not steady:
        raise Unsupported(f"scales RoPE by {rope_type}, which depends on the step")
    key = (cls, config.to_json_string(), layer_type if per_type else None, max_positions, dtype, str(device))
    known = _known.get(key)
    if known is None:
        module = getattr(sys.modules[cls.__module__], cls.__name__.removesuffix("Attention") + "RotaryEmbedding")
        table = _table(module(config=config), {"layer_type": layer_type} if per_type else {}, dtype, max_positions)
        if table.shape[1] > head_size:
            raise Unsupported(f"turns {table.shape[1]} dimensions, but its attention heads have {head_size}")
        known = _known[key] = Rotary(cos_sin=table.to(device), rotary_dim=table.shape[1], is_neox=is_neox)
    return known


def weight_after(parent: Any) -> Tensor | None:
    """What a class that `knows` accepts multiplies keys with after RoPE, `[head_size]`; None: nothing."""
    norm = _NORMS_AFTER.get(_path(parent))
    return None if norm is None else getattr(parent, norm).weight


def _path(parent: nn.Module) -> str:
    cls = type(parent)
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix(_MODELS)


def _table(module: Any, options: dict[str, Any], dtype: torch.dtype, max_positions: int) -> Tensor:
    """Cosines and sines of every position, `[max_positions, rotary_dim]`, as the model rounds them."""
    states = torch.empty(0, dtype=dtype, device="cpu")
    positions = torch.arange(max_positions, device="cpu")[None]
    cosines, sines = module.to("cpu")(states, positions, **options)
    half = cosines.shape[-1] // 2  # the other half repeats it, for the other dimension of each pair
    return torch.cat((cosines[0, :, :half], sines[0, :, :half]), dim=-1).contiguous()
