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

from vllm_shadowkv.cli.layers import layers_of_stages
from vllm_shadowkv.config import OTHER_BACKEND
from vllm_shadowkv.state.layers_beside import LayersBeside

DTYPE_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_FIELDS = {
    "layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_attention_groups"),
    "head_size": ("head_dim", "attention_head_dim", "kv_channels"),
    "hidden_size": ("hidden_size", "n_embd"),
    "length": ("max_position_embeddings", "seq_length", "max_sequence_length", "max_seq_len"),
    "dtype": ("dtype", "torch_dtype"),
}
_DEFAULTS = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "gpt_oss": {"head_dim": 64},
}
"""What published files of a family leave out, as Transformers takes it."""


@dataclass(frozen=True)
class ModelShape:
    """One rank's layers.

    Attributes:
        num_layers: that see the whole context, of the pipeline stage that has most.
        num_heads, num_kv_heads: query and KV heads of this rank's shard; a KV head is repeated where there are fewer
            than ranks, as vLLM does it.
        head_size: dimensions of a head.
        dtype: of keys and values.
        max_model_len: longest context: as given, or that the configuration names.
        others: layers that stand beside them in that stage.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    max_model_len: int
    others: tuple[LayersBeside, ...] = ()


def read_model(
    model: str,
    dtype: str = "auto",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    max_model_len: int | None = None,
) -> ModelShape:
    """Reads a model's shape.

    Args:
        model: path of a config.json or of a directory with one.
        dtype: as vLLM's `--dtype`; "auto": what the file says, bfloat16 in the place of float32.
        tensor_parallel: ranks that share the heads.
        pipeline_parallel: ranks that share the layers.
        max_model_len: longest context; None: what the file says. A window that is as long is none.

    Returns:
        One rank's part.

    Raises:
        ValueError: not readable, or a model that the backend does not serve; one sentence with the way out.
    """
    config = _load(model)
    _refuse(config)
    heads = _number(config, "heads")
    grouped = config.get("multi_query_attention", True)  # ChatGLM says False where every head is a KV head
    kv_heads = _first(config, "kv_heads") if grouped else None
    kv_heads = int(kv_heads or heads // next(iter(_groups(config)), 1))
    head_size = _first(config, "head_size") or _number(config, "hidden_size") // heads
    if heads % tensor_parallel or (kv_heads % tensor_parallel and tensor_parallel % kv_heads):
        raise ValueError(
            f"shadowkv: {heads} query and {kv_heads} KV heads cannot be divided among {tensor_parallel} ranks; lower "
            "--tensor-parallel-size."
        )
    longest, of_dtype = max_model_len or _number(config, "length"), _dtype(config, dtype)
    layers = len(config.get("layers_block_type") or config.get("hybrid_override_pattern") or ()) or _number(
        config, "layers"
    )
    stages = layers_of_stages(config, layers, pipeline_parallel, longest, tensor_parallel, of_dtype.itemsize)
    ours, others = max(stages, key=lambda stage: stage[0])
    return ModelShape(
        num_layers=ours,
        num_heads=heads // tensor_parallel,
        num_kv_heads=max(kv_heads // tensor_parallel, 1),
        head_size=int(head_size),
        dtype=of_dtype,
        max_model_len=longest,
        others=others,
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
    config = {**config, **text} if isinstance(text, dict) else config
    return {**_DEFAULTS.get(config.get("model_type", ""), {}), **config}


def _refuse(config: dict[str, Any]) -> None:
    """Refuses what the engine would, as far as a config.json tells."""
    for wrong, what in (
        (config.get("kv_lora_rank"), "MLA attention"),
        (config.get("attn_logit_softcapping"), "a logits soft cap"),
        (len(_groups(config)) > 1, "layers of different numbers of KV heads"),
    ):
        if wrong:
            raise ValueError(f"shadowkv does not support models with {what}; {OTHER_BACKEND}.")


def _groups(config: dict[str, Any]) -> set[int]:
    """Query heads of a KV head, where a Llama-Nemotron says it for every layer that attends."""
    attentions = (block["attention"] for block in config.get("block_configs") or ())
    return {attention["n_heads_in_group"] for attention in attentions if not attention.get("no_op")}


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
