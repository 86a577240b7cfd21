"""Which layers of a model see the whole context, and what stands beside them, read from its config.json.

As vLLM's classes read it: what a published file leaves out is what they, or Transformers, take for it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_shadowkv.config import OTHER_BACKEND
from vllm_shadowkv.state.layers_beside import Kind, LayersBeside

FULL, WINDOW, CHUNK, STATE = "full_attention", "sliding_attention", "chunked_attention", "mamba"
NO_CACHE = "mlp"
_NAMES = {"attention": FULL, "*": FULL, "M": STATE, "conv": STATE, "hybrid": FULL}
_NAMES |= dict.fromkeys(("moe", "-", "E"), NO_CACHE)
"""Other names of kinds, in Granite 4 and Nemotron-H, LFM2, Falcon-H1."""
_DELTA_NETS = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
_EVERY = {"gemma3_text": 6, "cohere2": 4, "exaone4": 4, "olmo3": 4, "afmoe": 4, "llama4_text": 4, "gpt_oss": 2}
"""Of so many layers one sees the whole context, where the file does not say."""


def layers_of_stages(
    config: dict[str, Any], num_layers: Any, stages: int, longest: int, ranks: int, itemsize: int
) -> list[tuple[int, tuple[LayersBeside, ...]]]:
    """Layers of each stage of a pipeline: how many see the whole context, and the others.

    Args:
        config: of the text model.
        num_layers: as the file says it.
        stages: of the pipeline.
        longest: tokens of the longest context; a window that is as long is none.
        ranks: that share heads and states.
        itemsize: bytes of a number of the model's dtype.

    Raises:
        ValueError: layers of a kind that is not counted, or none that sees the whole context; one sentence.
    """
    kinds = _kinds(config, num_layers)
    window = _window(config)
    if window is None or window >= longest:
        kinds = [FULL if kind == WINDOW else kind for kind in kinds]
    unknown = set(kinds) - {FULL, WINDOW, CHUNK, STATE, NO_CACHE}
    in_all = config.get("model_type") == "falcon_h1"
    stateful = in_all or STATE in kinds
    if unknown or (not stateful and (config.get("ssm_cfg") or config.get("mamba_d_state"))):
        what = ", ".join(sorted(unknown)) or "Mamba"
        raise ValueError(
            f"shadowkv: this command does not count layers of type {what}, which share the pool with those that "
            "shadowkv serves; start the engine, whose log says what its pool holds."
        )
    state = _state_bytes(config, ranks, itemsize) if stateful else 0
    sizes = {WINDOW: window, CHUNK: config.get("attention_chunk_size"), STATE: state}
    each = -(-len(kinds) // stages)
    found = [_stage(kinds[first : first + each], sizes) for first in range(0, len(kinds), each)]
    if in_all:
        found = [(ours, (LayersBeside("state", ours, state),)) for ours, _ in found]
    if not any(ours for ours, _ in found):
        raise ValueError(
            f"shadowkv serves layers without a sliding window, and this model has none; {OTHER_BACKEND}, or lower "
            "--max-model-len to the window."
        )
    return found


def _stage(kinds: list[str], sizes: dict[str, Any]) -> tuple[int, tuple[LayersBeside, ...]]:
    counts = Counter(kinds)
    named: dict[str, Kind] = {WINDOW: "window", CHUNK: "chunk", STATE: "state"}
    others = (LayersBeside(name, counts[kind], sizes[kind]) for kind, name in named.items() if counts[kind])
    return counts[FULL], tuple(others)


def _kinds(config: dict[str, Any], num_layers: Any) -> list[str]:
    """The kind of each layer."""
    if blocks := config.get("block_configs"):  # Llama-Nemotron Super
        return [NO_CACHE if block["attention"].get("no_op") else FULL for block in blocks]
    family = config.get("model_type", "")
    if config.get("attention_chunk_size") and family.startswith("llama4"):
        turned = config.get("no_rope_layers")
        every = config.get("no_rope_layer_interval", 4)
        turned = turned or [(layer + 1) % every for layer in range(num_layers)]
        return [CHUNK if rotates else FULL for rotates in turned]
    named = config.get("layers_block_type") or config.get("hybrid_override_pattern") or config.get("layer_types")
    delta_nets = family in _DELTA_NETS
    if named:
        # Transformers 5 writes Mamba 2 so; others mean what is not counted.
        names = _NAMES | ({"linear_attention": STATE} if delta_nets or _is_mamba(config) else {})
        return [names.get(kind, kind) for kind in named]
    if delta_nets:
        every = config.get("full_attention_interval", 4)
        return [STATE if (layer + 1) % every else FULL for layer in range(num_layers)]
    every = config.get("sliding_window_pattern") or config.get("global_attn_every_n_layers") or _EVERY.get(family)
    every = len(every) if isinstance(every, str) else every  # EXAONE 4 says LLLG
    if every and _window(config):
        return [WINDOW if (layer + 1) % every else FULL for layer in range(num_layers)]
    return [WINDOW if _window(config) else FULL] * num_layers


def _is_mamba(config: dict[str, Any]) -> bool:
    return bool(config.get("mamba_n_heads") or config.get("mamba_num_heads"))


def _window(config: dict[str, Any]) -> int | None:
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    # Cohere's windows count what is before a token, vLLM's the token too.
    return window + 1 if window and config.get("model_type") == "cohere2" else window


def _state_bytes(config: dict[str, Any], ranks: int, itemsize: int) -> int:
    """Bytes of a layer's state on one rank: a short convolution's; a delta net's, or a Mamba 2's, with its own."""
    if config.get("conv_L_cache"):
        return (config["conv_L_cache"] - 1) * (config.get("conv_dim") or config["hidden_size"]) // ranks * itemsize
    if config.get("model_type") in _DELTA_NETS:
        heads, head = config["linear_num_value_heads"], config["linear_value_head_dim"]
        groups, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
        kernel, width = config["linear_conv_kernel_dim"], heads * head
        state_itemsize = {"float32": 4}.get(config.get("mamba_ssm_dtype", ""), itemsize)
    elif config.get("model_type") == "nemotron_h":
        heads, head, groups = config["mamba_num_heads"], config["mamba_head_dim"], config["n_groups"]
        size, kernel, width = config["ssm_state_size"], config.get("conv_kernel", 4), heads * head
        state_itemsize = {"float32": 4}.get(config.get("mamba_ssm_cache_dtype") or "float32", itemsize)
    else:
        heads, groups, size = config["mamba_n_heads"], config["mamba_n_groups"], config["mamba_d_state"]
        width = config.get("mamba_d_ssm") or config.get("mamba_expand", 2) * config["hidden_size"]
        head, kernel, state_itemsize = width // heads, config.get("mamba_d_conv", 4), itemsize
    groups += ranks - groups if groups % ranks else 0  # vLLM repeats groups for the heads of each rank
    convolution = (kernel - 1) * (width + 2 * groups * size) // ranks * itemsize
    return int(convolution + heads // ranks * head * size * state_itemsize)
