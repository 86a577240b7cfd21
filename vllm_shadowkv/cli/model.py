"""What `plan` must know of a model, read from its config.json.

Field names differ between families; `_FIELDS` lists those of Llama, Qwen 2 and 3, Mistral, Phi-3, GLM-4 and of the
original ChatGLM configurations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_shadowkv.config import OTHER_BACKEND

DTYPE_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_FIELDS = {
    "layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num"),
    "head_size": ("head_dim", "kv_channels"),
    "hidden_size": ("hidden_size", "n_embd"),
    "length": ("max_position_embeddings", "seq_length", "max_sequence_length"),
    "dtype": ("dtype", "torch_dtype"),
}


@dataclass(frozen=True)
class ModelShape:
    """One rank's attention layers.

    Attributes:
        num_layers: of the pipeline stage that has most.
        num_heads, num_kv_heads: query and KV heads of this rank's shard; a KV head is repeated where there are fewer
            than ranks, as vLLM does it.
        head_size: dimensions of a head.
        dtype: of keys and values.
        max_model_len: longest context that the configuration names.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    max_model_len: int


def read_model(model: str, dtype: str = "auto", tensor_parallel: int = 1, pipeline_parallel: int = 1) -> ModelShape:
    """Reads a model's shape.

    Args:
        model: path of a config.json or of a directory with one.
        dtype: as vLLM's `--dtype`; "auto": what the file says, bfloat16 in the place of float32.
        tensor_parallel: ranks that share the heads.
        pipeline_parallel: ranks that share the layers.

    Returns:
        One rank's part.

    Raises:
        ValueError: not readable, or a model that the backend does not serve; one sentence with the way out.
    """
    config = _load(model)
    _refuse(config)
    heads, layers = _number(config, "heads"), _number(config, "layers")
    grouped = config.get("multi_query_attention", True)  # ChatGLM says False where every head is a KV head
    kv_heads = _first(config, "kv_heads") if grouped else None
    kv_heads = int(kv_heads or heads)
    head_size = _first(config, "head_size") or _number(config, "hidden_size") // heads
    if heads % tensor_parallel or (kv_heads % tensor_parallel and tensor_parallel % kv_heads):
        raise ValueError(
            f"shadowkv: {heads} query and {kv_heads} KV heads cannot be divided among {tensor_parallel} ranks; lower "
            "--tensor-parallel-size."
        )
    return ModelShape(
        num_layers=-(-layers // pipeline_parallel),
        num_heads=heads // tensor_parallel,
        num_kv_heads=max(kv_heads // tensor_parallel, 1),
        head_size=int(head_size),
        dtype=_dtype(config, dtype),
        max_model_len=_number(config, "length"),
    )


def _load(model: str) -> dict[str, Any]:
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"shadowkv: no model configuration at {path} ({error.strerror}); name a config.json or a directory with "
            "one, nothing is downloaded."
        ) from error
    except ValueError as error:
        raise ValueError(f"shadowkv: {path} is not JSON ({error}); name a model's config.json.") from error
    if not isinstance(config, dict):
        raise ValueError(f"shadowkv: {path} holds no JSON object; name a model's config.json.")
    text = config.get("text_config")  # of a model that also takes images
    return {**config, **text} if isinstance(text, dict) else config


def _refuse(config: dict[str, Any]) -> None:
    """Refuses what the engine would, as far as a config.json tells, and layers beside ours, which are not counted."""
    layer_types = set(config.get("layer_types") or ())
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    for wrong, what in (
        (config.get("kv_lora_rank"), "MLA attention"),
        (config.get("attn_logit_softcapping"), "a logits soft cap"),
    ):
        if wrong:
            raise ValueError(f"shadowkv does not support models with {what}; {OTHER_BACKEND}.")
    for beside, what in (
        (layer_types - {"full_attention"}, f"of type {', '.join(sorted(layer_types - {'full_attention'}))}"),
        (window and not layer_types, f"with a sliding window ({window} tokens)"),
        (config.get("ssm_cfg") or config.get("mamba_d_state"), "with a state"),
    ):
        if beside:
            raise ValueError(
                f"shadowkv: this command does not count layers {what}, which share the pool with those that shadowkv "
                "serves; start the engine, whose log says what its pool holds."
            )


def _first(config: dict[str, Any], what: str) -> Any:
    return next((config[name] for name in _FIELDS[what] if config.get(name) is not None), None)


def _number(config: dict[str, Any], what: str) -> int:
    value = _first(config, what)
    if not isinstance(value, int) or value < 1:
        names = " or ".join(_FIELDS[what])
        raise ValueError(f"shadowkv: config.json says no {names}; name the config.json of a decoder-only model.")
    return value


def _dtype(config: dict[str, Any], dtype: str) -> torch.dtype:
    if dtype != "auto":
        return DTYPE_NAMES[dtype]
    name = str(_first(config, "dtype") or "bfloat16").removeprefix("torch.")
    return DTYPE_NAMES["bfloat16" if name == "float32" else name] if name in DTYPE_NAMES else torch.bfloat16
