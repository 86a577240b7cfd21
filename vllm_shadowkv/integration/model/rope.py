"""Finds the rotation that a vLLM model applies to one attention layer's keys, or refuses by name.

vLLM rotates inside the model, before the attention backend sees the keys, so the backend has to
know three things about code it does not call: whether this layer rotates at all, with which rows,
and that nothing happens to the keys between the rotation and the backend. The answers are in two
tables below, one of rotary classes and one of the attention classes of vLLM's models. Both are
allow-lists of exact classes: a subclass may override `forward`, and a wrong rotation raises no
error, it only makes answers worse. Read against vLLM 0.32.0,
`model_executor/layers/rotary_embedding/` and `model_executor/models/`;
`tests/integration/test_rope.py` re-reads the models' sources.

Which values the model used. `RotaryEmbedding` keeps its cache in the dtype it is built with (the
model's, but fp32 for gpt-oss) and rounds it to the queries' dtype before every use
(`_match_cos_sin_cache_dtype`), so rows are rounded to the layer's dtype here too. LongRoPE never
rounds again. Should a compiler fuse that rounding away, keys differ from ours by one rounding of
the cosine; turning back and forth with one table stays the identity all the same.
"""

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.rotary_embedding import (
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    MRotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)

from vllm_shadowkv.integration.model import rope_transformers
from vllm_shadowkv.integration.model.rope_transformers import Unsupported as _Unsupported
from vllm_shadowkv.rotary import Rotary

_WAY_OUT = "use another --attention-backend"


# --------------------------------------------------------------------------------------------------
# Rotary classes: which rows of the cache position 0, 1, ... read.
# --------------------------------------------------------------------------------------------------


def _whole_cache(module: Any) -> tuple[Tensor, slice]:
    return module.cos_sin_cache, slice(None)


def _first_factor(module: Any) -> tuple[Tensor, slice]:
    """One table per scaling factor, end to end; `forward` has no offsets, so it reads the first.

    `torch.arange(max_position * factor)` made it, hence the ceiling.
    """
    positions = math.ceil(module.max_position_embeddings * module.scaling_factors[0])
    return module.cos_sin_cache, slice(0, positions)


def _long_or_short(module: Any) -> tuple[Tensor, slice]:
    """Short rows, then long rows; the constructor chose one of the two by `max_model_len`.

    `forward` also takes `offsets`, which could choose per token, but no caller in vLLM passes them.
    """
    short = module.original_max_position_embeddings
    rows = slice(short, None) if module.use_long_rope else slice(0, short)
    return module.long_short_cos_sin_cache, rows


# M-RoPE turns a token of text by one row, as the others do, but one after an image by an earlier row
# than its place, and one of an image by three. Turning back and forth by its place is the identity all
# the same, and what it costs is rank: nothing for text, because what remains is one rotation of a whole
# block, and about as much as not turning at all for images (`refusals.check_engine`).
# Not here: every class whose `forward` does more than turn pairs by one row per token (M-RoPE's other
# kin, dual chunk, FoPE), whose cache is not rounded like this (DeepSeek's YaRN), or that is not
# for text keys (Llama 4's vision). Gemma 4's proportional RoPE and NTK's fixed scaling only fill
# the cache in another way, but nobody has tried them here yet.
_ROTARY_CLASSES: dict[type[nn.Module], Callable[[Any], tuple[Tensor, slice]]] = {
    RotaryEmbedding: _whole_cache,
    Llama3RotaryEmbedding: _whole_cache,
    YaRNScalingRotaryEmbedding: _whole_cache,
    DynamicNTKAlphaRotaryEmbedding: _whole_cache,
    DynamicNTKScalingRotaryEmbedding: _whole_cache,
    LinearScalingRotaryEmbedding: _first_factor,
    Phi3LongRoPEScaledRotaryEmbedding: _long_or_short,
    MRotaryEmbedding: _whole_cache,
}


# --------------------------------------------------------------------------------------------------
# Attention classes: does this layer rotate, and is the rotation the last thing done to its keys?
# --------------------------------------------------------------------------------------------------


def _always(parent: Any) -> bool:
    return True


def _never(parent: Any) -> bool:
    return False


def _if_present(parent: Any) -> bool:
    return parent.rotary_emb is not None


def _if_use_rope(parent: Any) -> bool:
    return bool(parent.use_rope)


def _afmoe(parent: Any) -> bool:
    return bool(parent.is_local_attention and parent.rotary_emb is not None)


def _cohere(parent: Any) -> bool:
    return bool(parent.v1 or parent.sliding_window)


def _cohere2_moe(parent: Any) -> bool:
    return bool(parent.sliding_window or parent.force_rope)


def _exaone4(parent: Any) -> bool:
    return bool(parent.sliding_window or parent.apply_rope_all_layers)


def _falcon(parent: Any) -> bool:
    return bool(parent.use_rotary)


def _olmo_hybrid(parent: Any) -> bool:
    return bool(parent._use_rope)


def _llama4(parent: Any) -> bool:
    if parent.qk_norm is not None:
        raise _Unsupported("normalizes keys after RoPE (use_qk_norm)")
    return parent.rotary_emb is not None


def _hy_v3(parent: Any) -> bool:
    if parent.hpc_rope_norm is not None:
        raise _Unsupported("rotates and writes the KV cache in one kernel (HpcRopeNorm)")
    return True


# Path below `_MODELS` -> whether a layer of this class rotates. "_always" stands for: `forward`
# calls `rotary_emb(positions, q, k)` on every path, any key norm, bias, clamp or multiplier comes
# before, and nothing but a reshape comes after.
#
# Not here, although they hold an `Attention`:
# - MLA and its unfolded forms (DeepseekV2, AXK1, MiniCPM3): only a trailing part of a key turns;
# - Zamba2, HRM-Text, LoopCoder: several `Attention` in a list or dict, whose parent is the list;
# - DFlash and Gemma 4's drafters: keys come into the cache by another door;
# - the Transformers modelling backend (SmolLM3, OLMo 2 and 3, Starcoder 2, ...): `rope_transformers.py`;
# - encoders, cross attention, ALiBi models, Gemma 4, Ernie 4.5 VL (own rotary class), and
#   `vllm/models/` (sparse or latent attention).
_MODELS = "vllm.model_executor.models."

_ATTENTION_CLASSES: dict[str, Callable[[Any], bool]] = {
    "afmoe.AfmoeAttention": _afmoe,
    "apertus.ApertusAttention": _always,
    "bailing_moe.BailingAttention": _always,
    "chatglm.GLMAttention": _always,
    "cohere2_moe.Cohere2MoeAttention": _cohere2_moe,
    "cohere_compass.CohereCompassAttention": _if_present,
    "commandr.CohereAttention": _cohere,
    "dbrx.DbrxAttention": _always,
    "deepseek_v2.DeepseekAttention": _always,
    "ernie45_moe.Ernie4_5_MoeAttention": _always,
    "exaone.ExaoneAttention": _always,
    "exaone4.Exaone4Attention": _exaone4,
    "exaone_moe.ExaoneMoeAttention": _if_use_rope,
    "falcon.FalconAttention": _falcon,
    "falcon_h1.FalconH1AttentionDecoderLayer": _always,
    "gemma.GemmaAttention": _always,
    "gemma2.Gemma2Attention": _always,
    "gemma3.Gemma3Attention": _always,
    "gemma3n.Gemma3nAttention": _always,
    "glm4.Glm4Attention": _always,
    "glm4_moe.Glm4MoeAttention": _always,
    "gpt2.GPT2Attention": _never,
    "gpt_j.GPTJAttention": _always,
    "gpt_oss.OAIAttention": _always,
    "granite.GraniteAttention": _if_use_rope,
    "granitemoe.GraniteMoeAttention": _if_use_rope,
    "granitemoehybrid.GraniteMoeHybridAttention": _if_present,
    "hy_v3.HYV3Attention": _hy_v3,
    "hyperclovax.HyperCLOVAXAttention": _always,
    "internlm2.InternLM2Attention": _always,
    "interns1_pro.InternS1ProMoeAttention": _always,
    "jamba.JambaAttentionDecoderLayer": _never,
    # Unfolded partial RoPE permutes channels around a smaller rotary: the head size check refuses.
    "k2_horizon.K2HorizonAttention": _always,
    "k2_horizon.K2HorizonMoVAAttention": _always,
    "laguna.LagunaAttention": _always,
    "lfm2.Lfm2Attention": _always,
    "lfm2_moe.Lfm2MoeAttention": _always,
    "llama.LlamaAttention": _always,
    "llama4.Llama4Attention": _llama4,
    "mimo_v2.MiMoV2Attention": _always,
    "minicpm.MiniCPMAttention": _always,
    "minimax_m2.MiniMaxM2Attention": _always,
    "mistral.MistralAttention": _always,
    "mixtral.MixtralAttention": _always,
    "molmo.MolmoAttention": _always,
    "molmo2.Molmo2Attention": _always,
    "moondream3.Moondream3Attention": _always,
    "muse_glimmer.MuseGlimmerAttention": _if_present,
    "nemotron.NemotronAttention": _always,
    "nemotron_h.NemotronHAttention": _never,
    "nemotron_nas.DeciLMAttention": _always,
    "olmo_hybrid.OlmoHybridAttention": _olmo_hybrid,
    "olmoe.OlmoeAttention": _always,
    "openpangu.OpenPanguEmbeddedAttention": _always,
    "opt.OPTAttention": _never,
    "orion.OrionAttention": _always,
    "param2moe.Param2MoEAttention": _always,
    "phimoe.PhiMoEAttention": _always,
    "plamo3.Plamo3AttentionMixer": _always,
    "qwen2.Qwen2Attention": _always,
    "qwen2_moe.Qwen2MoeAttention": _always,
    "qwen3.Qwen3Attention": _always,
    "qwen3_moe.Qwen3MoeAttention": _always,
    "qwen3_next.Qwen3NextAttention": _always,
    "rnj1.Rnj1Attention": _always,
    "solar.SolarAttention": _always,
    "stablelm.StablelmAttention": _always,
    "step3_text.Step3TextAttention": _always,
    "step3p5.Step3p5Attention": _if_use_rope,
}


# By dtype and device of the table, so that layers that share a rotary module share its table.
_known: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, torch.device], Rotary]] = WeakKeyDictionary()


def rotary_of(
    parent: nn.Module | None,
    layer_name: str,
    head_size: int,
    device: torch.device | None = None,
    max_positions: int | None = None,
) -> Rotary:
    """Return the rotation that the model applies to one layer's keys before attention.

    Layers that share a rotary module get the same `Rotary`, whose table is a view of the model's own
    buffer. Only a cache in another dtype or on another device is copied, once.

    Args:
        parent: the module that holds the attention layer (`LlamaAttention`, ...), constructed;
            None if nobody saw it, which is refused.
        layer_name: the attention layer's name, as in `static_forward_context`; the layer is the
            child of parent with this `layer_name`, and its `dtype` is the keys' dtype.
        head_size: the attention layer's head size.
        device: where the keys will be; None: where the rotary module keeps its cache.
        max_positions: longest request in tokens, for models that keep no table (`rope_transformers.py`).

    Returns:
        The rotation; the identity for a layer that does not rotate.

    Raises:
        ValueError: the attention class, its rotary class or their combination is not known to be
            undone exactly. The message is one sentence: class, layer, reason and way out.

    Known by reading, not by trying: what a model's `forward` does is what vLLM 0.32.0 shipped.
    """
    try:
        if parent is None:
            raise _Unsupported("tells nothing about its rotation")
        if max_positions is not None and rope_transformers.knows(parent):
            dtype = _layer_dtype(parent, layer_name)
            return rope_transformers.rotary_of(parent, head_size, dtype, device, max_positions)
        if not _rotates(parent):
            return Rotary.identity()
        return _rotary(parent, layer_name, head_size, device)
    except AttributeError as error:  # vLLM has changed a class that is in the tables
        raise _refusal(parent, layer_name, f"is not as in vLLM 0.32.0: {error}") from error
    except _Unsupported as error:
        raise _refusal(parent, layer_name, str(error)) from error


def weight_after(parent: nn.Module) -> Tensor | None:
    """What the model multiplies a layer's keys with after RoPE, per dimension.

    Args:
        parent: the module that holds the attention layer, of a class that `rotary_of` accepts.

    Returns:
        The model's own parameter `[head_size]`; None: nothing.
    """
    return rope_transformers.weight_after(parent) if rope_transformers.knows(parent) else None


def _refusal(parent: nn.Module | None, layer_name: str, reason: str) -> ValueError:
    """Write the one sentence that refuses a layer: class, layer, reason, way out."""
    name = "a layer without a parent module" if parent is None else type(parent).__name__
    return ValueError(f"ShadowKV cannot undo RoPE in {layer_name}: {name} {reason}; {_WAY_OUT}.")


def _rotates(parent: nn.Module) -> bool:
    """Whether a known attention class rotates in this layer."""
    cls = type(parent)
    path = f"{cls.__module__}.{cls.__qualname__}"
    rotates = _ATTENTION_CLASSES.get(path.removeprefix(_MODELS)) if path.startswith(_MODELS) else None
    if rotates is None:
        raise _Unsupported(
            f"(of {cls.__module__}) is not among the attention classes that are known to leave "
            "their keys alone after RoPE"
        )
    return rotates(parent)


def _rotary(parent: nn.Module, layer_name: str, head_size: int, device: torch.device | None) -> Rotary:
    """Return the rotation of a layer that rotates; `rotary_of` states arguments and result."""
    module: Any = parent.rotary_emb
    read_rows = _ROTARY_CLASSES.get(type(module))
    if read_rows is None:
        raise _Unsupported(f"rotates with {type(module).__name__}, which is not supported")
    if module.head_size != head_size:
        raise _Unsupported(
            f"rotates heads of {module.head_size} with {type(module).__name__}, "
            f"but its attention heads have {head_size} dimensions"
        )
    cache, rows = read_rows(module)
    rounds_again = isinstance(module, RotaryEmbedding | MRotaryEmbedding)
    dtype = _layer_dtype(parent, layer_name) if rounds_again else cache.dtype
    key = dtype, cache.device if device is None else torch.empty(0, device=device).device
    known = _known.setdefault(module, {})
    if key not in known:
        is_neox = module.is_neox_style if rounds_again else True  # LongRoPE has no other style
        table = cache[rows].to(device=key[1], dtype=dtype)
        known[key] = Rotary(cos_sin=table, rotary_dim=module.rotary_dim, is_neox=is_neox)
    return known[key]


def _layer_dtype(parent: nn.Module, layer_name: str) -> torch.dtype:
    """Return the dtype of the attention layer of this name, a child of parent."""
    for child in parent.children():
        if getattr(child, "layer_name", None) == layer_name:
            dtype = child.dtype
            if not isinstance(dtype, torch.dtype):
                raise _Unsupported(f"has a layer of dtype {dtype!r}")
            return dtype
    raise _Unsupported("has no attention layer of this name")
