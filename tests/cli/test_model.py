from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_shadowkv.cli.model import ModelShape, read_model

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
OLD = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "max_position_embeddings": 4096}
SHAPES = {
    "llama": (LLAMA, (32, 32, 8, 128, 131_072)),
    "qwen2": (QWEN2, (28, 28, 4, 128, 131_072)),
    "qwen3": (QWEN3, (36, 32, 8, 128, 40_960)),
    "mistral": (MISTRAL, (40, 32, 8, 128, 1_024_000)),
    "phi3": (PHI3, (40, 40, 10, 128, 131_072)),
    "glm4": (GLM4, (40, 32, 2, 128, 131_072)),
    "chatglm": (CHATGLM, (40, 32, 4, 128, 1_048_576)),
    "multi-head": (OLD, (32, 32, 32, 128, 4096)),
    "with images": ({"model_type": "llava", "text_config": LLAMA}, (32, 32, 8, 128, 131_072)),
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
