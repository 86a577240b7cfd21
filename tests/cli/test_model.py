from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_shadowkv.cli.model import ModelShape, read_model
from vllm_shadowkv.state.layers_beside import LayersBeside

# As published, cut to what matters.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "torch_dtype": "bfloat16",
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "sliding_window": 131_072,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40_960,
    "sliding_window": None,
    "dtype": "bfloat16",
}
MISTRAL = {
    "model_type": "mistral",
    "head_dim": 128,
    "hidden_size": 5120,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1_024_000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
PHI3 = {
    "model_type": "phi3",
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "max_position_embeddings": 131_072,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
GLM4 = {
    "model_type": "glm",
    "head_dim": 128,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131_072,
    "torch_dtype": "bfloat16",
}
CHATGLM = {
    "model_type": "chatglm",
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 4,
    "num_attention_heads": 32,
    "num_layers": 40,
    "seq_length": 1_048_576,
    "torch_dtype": "bfloat16",
}
STEP3 = {
    "model_type": "step3_vl",
    "text_config": {
        "head_dim": 256,
        "hidden_size": 7168,
        "max_position_embedding": 65_536,
        "max_seq_len": 65_536,
        "num_attention_groups": 1,
        "num_attention_heads": 64,
        "num_hidden_layers": 61,
        "torch_dtype": "bfloat16",
    },
}
QWEN3_NEXT = LLAMA | {
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
QWEN35_TEXT = QWEN3_NEXT | {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 32,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
    "mamba_ssm_dtype": "float32",
}
QWEN35 = {"model_type": "qwen3_5", "text_config": QWEN35_TEXT}
ATTENDS = {"attention": {"n_heads_in_group": 8, "no_op": False}}
NEMOTRON_SUPER = LLAMA | {
    "model_type": "nemotron-nas",
    "num_key_value_heads": None,
    "block_configs": [*[ATTENDS] * 3, {"attention": {"n_heads_in_group": None, "no_op": True}}] * 8,
}
OLD = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "max_position_embeddings": 4096}
SHAPES = {
    "llama": (LLAMA, (32, 32, 8, 128, 131_072)),
    "qwen2": (QWEN2, (28, 28, 4, 128, 131_072)),
    "qwen3": (QWEN3, (36, 32, 8, 128, 40_960)),
    "mistral": (MISTRAL, (40, 32, 8, 128, 1_024_000)),
    "phi3": (PHI3, (40, 40, 10, 128, 131_072)),
    "glm4": (GLM4, (40, 32, 2, 128, 131_072)),
    "chatglm": (CHATGLM, (40, 32, 4, 128, 1_048_576)),
    "step 3": (STEP3, (61, 64, 1, 256, 65_536)),
    "nemotron super": (NEMOTRON_SUPER, (24, 32, 4, 128, 131_072)),
    "multi-head": (OLD, (32, 32, 32, 128, 4096)),
    "with images": ({"model_type": "llava", "text_config": LLAMA}, (32, 32, 8, 128, 131_072)),
}
# As published, cut to what matters: what they hold beside full layers, and how they say which layers those are.
GEMMA3 = {
    "model_type": "gemma3",
    "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024},
    "torch_dtype": "bfloat16",
}
COMMAND_A = LLAMA | {"model_type": "cohere2", "sliding_window": 4096, "sliding_window_pattern": 4}
EXAONE4 = LLAMA | {"model_type": "exaone4", "sliding_window": 4096, "sliding_window_pattern": "LLLG"}
OLMO3 = LLAMA | {
    "model_type": "olmo3",
    "sliding_window": 4096,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
LLAMA4 = {"model_type": "llama4", "text_config": LLAMA | {"model_type": "llama4_text", "attention_chunk_size": 8192}}
GRANITE4_H = LLAMA | {
    "model_type": "granitemoehybrid",
    "layer_types": [*["mamba"] * 7, "attention"] * 4,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 128,
    "mamba_expand": 2,
}
FALCON_H1 = LLAMA | {
    "model_type": "falcon_h1",
    "mamba_n_heads": 24,
    "mamba_n_groups": 2,
    "mamba_d_state": 256,
    "mamba_d_ssm": 3072,
}
LFM2 = LLAMA | {
    "model_type": "lfm2",
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "conv_L_cache": 3,
}
AS_TRANSFORMERS_WRITES = GRANITE4_H | {"layer_types": [*["linear_attention"] * 7, "full_attention"] * 4}
NEMOTRON_H = LLAMA | {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M-M*-M-M*E",
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
}
BESIDE = {
    "gemma 3": (GEMMA3, 5, LayersBeside("window", 29, 1024)),
    "command-a": (COMMAND_A, 8, LayersBeside("window", 24, 4097)),
    "exaone 4": (EXAONE4, 8, LayersBeside("window", 24, 4096)),
    "olmo 3": (OLMO3, 8, LayersBeside("window", 24, 4096)),
    "gpt-oss": (GPT_OSS, 12, LayersBeside("window", 12, 128)),
    "llama 4": (LLAMA4, 8, LayersBeside("chunk", 24, 8192)),
    "granite 4 h": (GRANITE4_H, 4, LayersBeside("state", 28, 2 * (3 * (8192 + 256) + 8192 * 128))),
    "written by transformers 5": (AS_TRANSFORMERS_WRITES, 4, LayersBeside("state", 28, 2 * (3 * 8448 + 8192 * 128))),
    "falcon-h1": (FALCON_H1, 32, LayersBeside("state", 32, 2 * (3 * (3072 + 1024) + 3072 * 256))),
    "lfm2": (LFM2, 1, LayersBeside("state", 3, 8192)),
    "qwen3-next": (QWEN3_NEXT, 12, LayersBeside("state", 36, 2 * (3 * 64 * 128 + 32 * 128 * 128))),
    "qwen 3.5": (QWEN35, 8, LayersBeside("state", 24, 2 * 3 * 64 * 128 + 4 * 32 * 128 * 128)),
    "nemotron-h": (NEMOTRON_H, 2, LayersBeside("state", 5, 2 * 3 * (8192 + 2048) + 4 * 8192 * 128)),
}


def write(folder: Path, config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(("config", "shape"), SHAPES.values(), ids=SHAPES)
def test_families(config: dict[str, Any], shape: tuple[int, ...], tmp_path: Path) -> None:
    layers, heads, kv_heads, head_size, length = shape
    expected = ModelShape(layers, heads, kv_heads, head_size, torch.bfloat16, length)
    assert read_model(write(tmp_path, config)) == expected
    assert read_model(str(tmp_path / "config.json")) == expected


@pytest.mark.parametrize(("config", "ours", "others"), BESIDE.values(), ids=BESIDE)
def test_layers_beside_ours(config: dict[str, Any], ours: int, others: LayersBeside, tmp_path: Path) -> None:
    shape = read_model(write(tmp_path, config))
    assert (shape.num_layers, shape.others) == (ours, (others,))


def test_a_window_that_no_request_exceeds_is_none(tmp_path: Path) -> None:
    assert read_model(write(tmp_path, OLMO3), max_model_len=4096).others == ()
    assert read_model(write(tmp_path, OLMO3), max_model_len=4096).num_layers == 32
    assert read_model(write(tmp_path, OLMO3), max_model_len=4097).num_layers == 8


def test_ranks_share_a_state_and_its_groups_are_repeated(tmp_path: Path) -> None:
    (state,) = read_model(write(tmp_path, GRANITE4_H), tensor_parallel=2).others
    assert state.size == 2 * (3 * (8192 + 2 * 2 * 128) // 2 + 4096 * 128)


def test_the_stage_with_most_of_our_layers_counts(tmp_path: Path) -> None:
    shape = read_model(write(tmp_path, NEMOTRON_H), pipeline_parallel=2)
    assert (shape.num_layers, [other.count for other in shape.others]) == (1, [3])


def test_stages_are_of_layers_with_and_without_a_cache(tmp_path: Path) -> None:
    blocks = sorted(NEMOTRON_SUPER["block_configs"], key=lambda block: block["attention"]["no_op"])
    assert read_model(write(tmp_path, NEMOTRON_SUPER | {"block_configs": blocks}), pipeline_parallel=2).num_layers == 16


def test_layers_of_other_numbers_of_heads_are_refused(tmp_path: Path) -> None:
    wide = {"attention": {"n_heads_in_group": 16, "no_op": False}}
    with pytest.raises(ValueError, match="layers of different numbers of KV heads"):
        read_model(write(tmp_path, NEMOTRON_SUPER | {"block_configs": [ATTENDS, wide]}))


@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), [(2, 16, 4), (8, 4, 1), (16, 2, 1)])
def test_tensor_parallel_ranks_share_heads(ranks: int, heads: int, kv_heads: int, tmp_path: Path) -> None:
    shape = read_model(write(tmp_path, LLAMA), tensor_parallel=ranks)
    assert (shape.num_heads, shape.num_kv_heads) == (heads, kv_heads)


def test_pipeline_stages_share_layers(tmp_path: Path) -> None:
    assert read_model(write(tmp_path, LLAMA), pipeline_parallel=3).num_layers == 11


@pytest.mark.parametrize(
    ("named", "given", "dtype"),
    [
        ("float16", "auto", torch.float16),
        ("float32", "auto", torch.bfloat16),  # as vLLM
        ("torch.float16", "auto", torch.float16),
        ("bfloat16", "float32", torch.float32),
    ],
)
def test_dtype(named: str, given: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert read_model(write(tmp_path, LLAMA | {"torch_dtype": named}), dtype=given).dtype == dtype
