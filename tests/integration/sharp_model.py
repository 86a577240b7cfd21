"""A tiny random Llama whose attention is sharp, so that one wrong key or value anywhere changes what it says.

With the usual initialisation attention is nearly flat, every value is averaged with hundreds of others, and no error
shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 1000
MAX_POSITIONS = 4096
LAYERS, HIDDEN, INTERMEDIATE = 2, 256, 512
HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 64

# Standard deviation of the weights. Logits of attention come out with one near 5; values and the last layer are large,
# so that a difference is visible at the end.
WIDTH = {"q_proj": 0.14, "k_proj": 0.14, "v_proj": 0.1, "o_proj": 0.1, "lm_head": 0.12}
USUAL_WIDTH = 0.02


def write_sharp_model(directory: Path, seed: int = 7) -> None:
    """Writes the model in Hugging Face's format, without a tokenizer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_weights(seed), directory / "model.safetensors", metadata={"format": "pt"})


def _weights(seed: int) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm": (HIDDEN,),
            f"{prefix}.post_attention_layernorm": (HIDDEN,),
            f"{prefix}.self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN),
            f"{prefix}.self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{prefix}.self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{prefix}.self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE),
            f"{prefix}.mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * WIDTH.get(name.rsplit(".", 1)[-1], USUAL_WIDTH)
        for name, shape in shapes.items()
    }
