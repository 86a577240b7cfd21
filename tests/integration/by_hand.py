"""Tiny models of architectures that Transformers has no class of: their configurations, and their weights by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from sharp_model import VOCABULARY
from sharp_weights import fill

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_SIZE, LAYERS, EXPERTS = 256, 256, 4, 2, 64, 2, 4
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "dtype": "float32"}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ByHand:
    """A configuration, the shapes of the weights, and the names of both files."""

    config: dict[str, Any]
    shapes: Callable[[], Shapes]
    config_name: str = "config.json"
    weights_name: str = "model.safetensors"


# vLLM has kept the class of GLM-4-9B's first release, Transformers has not.
CHATGLM = ENDS | {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "num_layers": LAYERS,
    "padded_vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": INNER,
    "kv_channels": HEAD_SIZE,
    "num_attention_heads": HEADS,
    "multi_query_attention": True,
    "multi_query_group_num": KV_HEADS,
    "seq_length": 8192,
    "add_qkv_bias": True,
    "original_rope": True,
    "rope_ratio": 500,
}


def _chatglm() -> Shapes:
    qkv = (HEADS + 2 * KV_HEADS) * HEAD_SIZE
    shapes: Shapes = {
        "transformer.embedding.word_embeddings": (VOCABULARY, HIDDEN),
        "transformer.encoder.final_layernorm": (HIDDEN,),
        "transformer.output_layer": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"transformer.encoder.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm": (HIDDEN,),
            f"{prefix}.post_attention_layernorm": (HIDDEN,),
            f"{prefix}.self_attention.query_key_value": (qkv, HIDDEN),
            f"{prefix}.self_attention.query_key_value.bias": (qkv,),
            f"{prefix}.self_attention.dense": (HIDDEN, HEADS * HEAD_SIZE),
            f"{prefix}.mlp.dense_h_to_4h": (2 * INNER, HIDDEN),
            f"{prefix}.mlp.dense_4h_to_h": (HIDDEN, INNER),
        }
    return shapes


QUERY_RANK = 128
STEP_3 = ENDS | {
    "model_type": "step3_vl",
    "architectures": ["Step3VLForConditionalGeneration"],
    "image_token_id": VOCABULARY - 1,
    "text_config": ENDS
    | {
        "architectures": ["Step3TextForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_attention_groups": 1,
        "head_dim": HEAD_SIZE,
        "share_q_dim": QUERY_RANK,
        "max_seq_len": 8192,
        "max_position_embedding": 8192,
        "moe_layers_enum": "1",
        "moe_num_experts": EXPERTS,
        "moe_top_k": 2,
        "moe_intermediate_size": INNER,
        "share_expert_dim": INNER,
        "norm_expert_weight": True,
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "output_hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


def _step_3() -> Shapes:
    """The first layer is dense, the second a mixture of experts; all heads share one key and one value."""
    shapes = _ends()
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= _norms(prefix)
        shapes |= {
            f"{prefix}.self_attn.q_proj": (QUERY_RANK, HIDDEN),
            f"{prefix}.self_attn.inter_norm": (QUERY_RANK,),
            f"{prefix}.self_attn.wq": (HEADS * HEAD_SIZE, QUERY_RANK),
            f"{prefix}.self_attn.k_proj": (HEAD_SIZE, HIDDEN),
            f"{prefix}.self_attn.v_proj": (HEAD_SIZE, HIDDEN),
            f"{prefix}.self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE),
        }
        shapes |= _mlp(f"{prefix}.share_expert" if layer else f"{prefix}.mlp", INNER)
    shapes |= {name: (EXPERTS, *shape) for name, shape in _mlp("model.layers.1.moe", INNER).items()}
    return shapes | {"model.layers.1.moe.gate": (EXPERTS, HIDDEN)}


# Llama-Nemotron Super: a Llama without what a search found that it can do without.
BLOCKS = [(True, 1.5), (False, 1.5), (True, None), (False, 3.0), (True, 0.75)]
"""Of each layer: whether it attends, and its MLP's width in 3/512; None: it has no MLP."""
NEMOTRON_SUPER = ENDS | {
    "model_type": "nemotron-nas",
    "architectures": ["DeciLMForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": len(BLOCKS),
    "num_attention_heads": HEADS,
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "block_configs": [
        {
            "attention": {"no_op": not attends, "n_heads_in_group": HEADS // KV_HEADS if attends else None},
            "ffn": {"no_op": width is None, "ffn_mult": width},
        }
        for attends, width in BLOCKS
    ],
}


def _nemotron_super() -> Shapes:
    shapes = _ends()
    for layer, (attends, width) in enumerate(BLOCKS):
        prefix = f"model.layers.{layer}"
        norms = _norms(prefix)
        if attends:
            shapes[f"{prefix}.input_layernorm"] = norms[f"{prefix}.input_layernorm"]
            shapes |= _attention(f"{prefix}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
        if width:
            shapes[f"{prefix}.post_attention_layernorm"] = norms[f"{prefix}.post_attention_layernorm"]
            inner = -(-int(2 * width * HIDDEN / 3) // 256) * 256  # as vLLM rounds it
            shapes |= _mlp(f"{prefix}.mlp", inner)
    return shapes


def register_nemotron_super() -> None:
    """Makes its configuration known; the published model brings the class, and wants to be trusted for it."""
    from transformers import AutoConfig, LlamaConfig

    class NemotronSuper(LlamaConfig):
        model_type = NEMOTRON_SUPER["model_type"]

        def __init__(self, block_configs: list[dict[str, Any]] | None = None, **fields: Any) -> None:
            super().__init__(**fields)
            self.block_configs = [
                SimpleNamespace(**{part: SimpleNamespace(**of_part) for part, of_part in block.items()})
                for block in block_configs or []
            ]

        def to_dict(self) -> dict[str, Any]:
            blocks = [{part: vars(of_part) for part, of_part in vars(block).items()} for block in self.block_configs]
            plain = copy.copy(self)
            plain.block_configs = []
            return LlamaConfig.to_dict(plain) | {"block_configs": blocks}

    AutoConfig.register(NemotronSuper.model_type, NemotronSuper, exist_ok=True)


# In Mistral's own format, as it was published.
PIXTRAL = {
    "dim": HIDDEN,
    "n_layers": LAYERS,
    "head_dim": HEAD_SIZE,
    "hidden_dim": INNER,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "rope_theta": 1_000_000_000.0,
    "norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "dtype": "float32",
    "max_position_embeddings": 8192,
    "vision_encoder": {
        "hidden_size": 64,
        "num_channels": 3,
        "image_size": 64,
        "patch_size": 16,
        "rope_theta": 10_000.0,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_token_id": 10,
    },
}


def _pixtral() -> Shapes:
    shapes: Shapes = {"tok_embeddings": (VOCABULARY, HIDDEN), "norm": (HIDDEN,), "output": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"layers.{layer}"
        shapes |= {f"{prefix}.attention_norm": (HIDDEN,), f"{prefix}.ffn_norm": (HIDDEN,)}
        shapes |= _attention(f"{prefix}.attention", "wq", "wk", "wv", "wo")
        shapes |= _mlp(f"{prefix}.feed_forward", INNER, "w1", "w3", "w2")
    return shapes


def _ends() -> Shapes:
    return {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}


def _norms(prefix: str) -> Shapes:
    return {f"{prefix}.input_layernorm": (HIDDEN,), f"{prefix}.post_attention_layernorm": (HIDDEN,)}


def _attention(prefix: str, query: str, key: str, value: str, output: str) -> Shapes:
    return {
        f"{prefix}.{query}": (HEADS * HEAD_SIZE, HIDDEN),
        f"{prefix}.{key}": (KV_HEADS * HEAD_SIZE, HIDDEN),
        f"{prefix}.{value}": (KV_HEADS * HEAD_SIZE, HIDDEN),
        f"{prefix}.{output}": (HIDDEN, HEADS * HEAD_SIZE),
    }


def _mlp(prefix: str, inner: int, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Shapes:
    return {
        f"{prefix}.{gate}": (inner, HIDDEN),
        f"{prefix}.{up}": (inner, HIDDEN),
        f"{prefix}.{down}": (HIDDEN, inner),
    }


BY_HAND = {
    "glm-4": ByHand(CHATGLM, _chatglm),
    "step-3": ByHand(STEP_3, _step_3),
    "nemotron-super": ByHand(NEMOTRON_SUPER, _nemotron_super),
    "pixtral": ByHand(PIXTRAL, _pixtral, "params.json", "consolidated.safetensors"),
}


def write_by_hand(name: str, directory: Path, seed: int) -> None:
    """Writes the model of this name in `BY_HAND`."""
    model = BY_HAND[name]
    named = {name if name.endswith(".bias") else f"{name}.weight": shape for name, shape in model.shapes().items()}
    weights = {name: torch.ones(shape) for name, shape in named.items()}
    generator = torch.Generator().manual_seed(seed)
    for name, values in weights.items():
        fill(name, values, generator, tied=False)
    (directory / model.config_name).write_text(json.dumps(model.config))
    save_file(weights, directory / model.weights_name, metadata={"format": "pt"})
