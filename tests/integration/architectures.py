"""Tiny random models of the architectures that `test_models.py` runs, in Hugging Face's format, without tokenizers.

Their attention is sharp, as in `sharp_model.py`; `sharp_weights.py` fills them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from by_hand import BY_HAND, write_by_hand
from safetensors.torch import load_file, save_file
from sharp_model import VOCABULARY
from sharp_weights import fill

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
NTK_ALPHA = {"rope_type": "dynamic", "rope_theta": 10_000.0, "alpha": 1000.0, "factor": 1.0}
SLIDING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 96,
}
DELTA_NETS = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}


def _longrope(rotary_dim: int, **more: Any) -> dict[str, Any]:
    """Scaled from 64 positions, so that the long factors are the ones in use."""
    long = [1.0 + 0.5 * pair for pair in range(rotary_dim // 2)]
    return {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * (rotary_dim // 2),
            "long_factor": long,
            **more,
        },
    }


# Name -> what of Hugging Face's configuration differs from `SHAPE`.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1": {"model_type": "llama", "rope_parameters": LLAMA3_SCALING},
    "yi": {"model_type": "llama", "head_dim": 128, "num_attention_heads": 8, "rope_theta": 5e6},
    "qwen2.5": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6},
    "mistral": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
    "phi-3-mini-128k": {
        "model_type": "phi3",
        "hidden_size": 384,
        "head_dim": 96,
        "num_key_value_heads": 4,
        "sliding_window": 262_144,  # as shipped: more than a request can have
        **_longrope(96),
    },
    "phi-4-mini": {
        "model_type": "phi3",
        "hidden_size": 512,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "sliding_window": 262_144,
        **_longrope(96, partial_rotary_factor=0.75),
    },
    "phi-4": {"model_type": "phi3", "hidden_size": 512, "head_dim": 128, "rope_theta": 250_000.0},
    "glm-4-0414": {"model_type": "glm4", "head_dim": 128, "attention_bias": True},
    "gemma": {"model_type": "gemma", "head_dim": 256, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma-3": {
        "model_type": "gemma3_text",
        "head_dim": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 7,
        "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2 + ["sliding_attention"],
        "sliding_window": 96,
        "query_pre_attn_scalar": 256,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "glm-4-hf": {"model_type": "glm", "head_dim": 128, "attention_bias": True},
    "olmo-2": {"model_type": "olmo2"},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": True, **EXPERTS},
    "dots1": {
        "model_type": "dots1",
        "sliding_window": None,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        **EXPERTS,
    },
    "command-a": {"model_type": "cohere2", "tie_word_embeddings": True, "logit_scale": 1.0, **SLIDING},
    "olmo-3": {"model_type": "olmo3", **SLIDING},
    "exaone-4": {"model_type": "exaone4", **SLIDING},
    "exaone-4-1.2b": {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "exaone-moe": {"model_type": "exaone_moe", "num_experts": 4, "num_shared_experts": 1, **EXPERTS, **SLIDING},
    "trinity": {
        "model_type": "afmoe",
        "num_experts": 4,
        "num_shared_experts": 1,
        "score_func": "sigmoid",
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
        **EXPERTS,
        **SLIDING,
    },
    "llama-4": {
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": 128,
        "intermediate_size_mlp": 256,
        "num_local_experts": 4,
        "floor_scale": 128,
    },
    "hunyuan": {"model_type": "hunyuan_v1_dense", "rope_parameters": NTK_ALPHA},
    "hunyuan-a13b": {
        "model_type": "hunyuan_v1_moe",
        "num_experts": 4,
        "moe_topk": 2,
        "rope_parameters": NTK_ALPHA,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **SLIDING,
    },
    "lfm2": {
        "model_type": "lfm2",
        "num_hidden_layers": 5,
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        **dict.fromkeys(("conv_dim", "block_dim", "block_ff_dim", "conv_dim_out"), 256),
    },
    "lfm2-moe": {
        "model_type": "lfm2_moe",
        "num_hidden_layers": 5,
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "num_experts": 4,
        "num_dense_layers": 1,
        **EXPERTS,
    },
    "granite-4-h": {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_chunk_size": 64,
        "num_local_experts": 0,
        "shared_intermediate_size": 256,
        "position_embedding_type": "rope",
    },
    "falcon-h1": {
        "model_type": "falcon_h1",
        "mamba_d_ssm": 512,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_chunk_size": 64,
    },
    "nemotron-h": {
        "model_type": "nemotron_h",
        "layers_block_type": ["mamba", "attention", "mlp"] * 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "n_groups": 1,
        "ssm_state_size": 16,
        "chunk_size": 64,
    },
    "qwen3-next": {
        "model_type": "qwen3_next",
        "num_experts": 4,
        "shared_expert_intermediate_size": 128,
        "partial_rotary_factor": 0.25,
        **EXPERTS,
        **DELTA_NETS,
    },
    "solar-open": {"model_type": "solar_open", "n_routed_experts": 4, "n_shared_experts": 1, **EXPERTS},
    "seed-oss": {"model_type": "seed_oss", "attention_bias": True},
    "apertus": {"model_type": "apertus", "rope_parameters": LLAMA3_SCALING},
    "arcee": {"model_type": "arcee"},
    "ernie-4.5": {"model_type": "ernie4_5"},
    "ernie-4.5-moe": {
        "model_type": "ernie4_5_moe",
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 128,
        "moe_layer_start_index": 1,
    },
    "starcoder-2": {"model_type": "starcoder2", "sliding_window": None, "use_bias": True},
    "pythia": {"model_type": "gpt_neox", "rotary_pct": 0.25, "num_key_value_heads": 4},
    "granite-3": {"model_type": "granite", "attention_multiplier": 0.125, "residual_multiplier": 0.5},
    "granite-3-moe": {
        "model_type": "granitemoe",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.125,
    },
    "command-r": {"model_type": "cohere", "tie_word_embeddings": True, "logit_scale": 1.0},
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "shared_expert_intermediate_size": 128,
        **EXPERTS,
    },
    "phi-3.5-moe": {
        "model_type": "phimoe",
        "architectures": ["PhiMoEForCausalLM"],
        "attention_bias": True,
        "lm_head_bias": True,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 262_144,
    },
    "nemotron-4": {"model_type": "nemotron", "partial_rotary_factor": 0.5},
    "ministral-3": {"model_type": "ministral3"},
    "glm-4.5-air": {
        "model_type": "glm4_moe",
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        **EXPERTS,
    },
    "hy-v3": {
        "model_type": "hy_v3",
        "num_experts": 4,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "expert_hidden_dim": 128,
        "route_norm": True,
        "qk_norm": True,
        **EXPERTS,
    },
    "minicpm-4": {
        "model_type": "llama",
        "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": 12,
        "dim_model_base": 256,
        "scale_depth": 1.4,
        "num_experts": 0,
    },
    "mimo-7b": {"model_type": "qwen2", "architectures": ["MiMoForCausalLM"]},
    "internlm-3": {"model_type": "llama", "architectures": ["InternLM3ForCausalLM"]},
    "granite-4-micro": {
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * 2,
        "num_local_experts": 0,
        "attention_multiplier": 0.125,
        "shared_intermediate_size": 256,
        "position_embedding_type": "rope",
    },
    "internlm-2.5": {"model_type": "llama", "architectures": ["InternLM2ForCausalLM"]},
    "ling-2": {
        "model_type": "qwen3_moe",
        "architectures": ["BailingMoeV2ForCausalLM"],
        "num_experts": 4,
        "norm_topk_prob": True,
        "num_shared_experts": 0,
        "first_k_dense_replace": 0,
        "score_function": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "moe_router_enable_expert_bias": True,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "use_bias": False,
        "use_qkv_bias": False,
        "embedding_dropout": 0.0,
        "partial_rotary_factor": 0.5,
        **EXPERTS,
    },
    "qwen2.5-yarn": {
        "model_type": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
    },
    "stablelm-2": {"model_type": "stablelm", "use_qkv_bias": True, "partial_rotary_factor": 0.25},
    "minimax-m2": {
        "model_type": "minimax_m2",
        "rotary_dim": 32,
        "scoring_func": "softmax",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "phi-4-multimodal": {
        "model_type": "phi3",
        "architectures": ["Phi4MMForCausalLM"],
        "hidden_size": 512,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "sliding_window": 262_144,
        "img_processor": {"layer_idx": 0},
        "embd_layer": {"audio_embd_layer": {"embedding_cls": "audio", "projection_cls": "mlp"}},
        "audio_processor": {
            "name": "cascades",
            "config": {
                **{"input_size": 80, "attention_dim": 64, "attention_heads": 2, "num_blocks": 1},
                **{"chunk_size": -1, "left_chunk": 18, "time_reduction": 8},
                "nemo_conv_settings": {"conv_channels": 64},
                "relative_attention_bias_args": {"type": "t5"},
                "encoder_embedding_config": {"input_size": 80},
            },
        },
        **_longrope(96, partial_rotary_factor=0.75),
    },
    "falcon-3": {"model_type": "llama", "head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
}

# Parts of names in a model that Transformers has not -> in the one of the same shape that writes its weights.
RENAMED: dict[str, dict[str, str]] = {
    "internlm-2.5": {
        "self_attn.qkv": "attention.wqkv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    },
    "ling-2": {
        "self_attn.qkv": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
        "embed_tokens": "word_embeddings",
    },
}


def _mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections, **more}}


EYE = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256}
PLACED_EYE = EYE | {"deepstack_visual_indexes": [], "num_position_embeddings": 64}
DEEP_EYE = PLACED_EYE | {"deepstack_visual_indexes": [0]}
THREE = _mrope([8, 12, 12])
INTERLEAVED = _mrope([12, 10, 10], mrope_interleaved=True)
PARTIAL = _mrope([4, 6, 6], partial_rotary_factor=0.5)
QUARTER = _mrope([3, 3, 2], mrope_interleaved=True, partial_rotary_factor=0.25)
# Models that also take images: name -> model type, what of the text's configuration differs from `SHAPE`, the vision's.
VISION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2-vl": ("qwen2_vl", THREE, {"depth": 1, "embed_dim": 64, "hidden_size": 256, "num_heads": 2}),
    "qwen2.5-vl": ("qwen2_5_vl", THREE, EYE | {"fullatt_block_indexes": [0]}),
    "qwen3-vl": ("qwen3_vl", INTERLEAVED, DEEP_EYE),
    "qwen3-vl-moe": ("qwen3_vl_moe", INTERLEAVED | {"num_experts": 4, "norm_topk_prob": True, **EXPERTS}, DEEP_EYE),
    "qwen3.5": ("qwen3_5", QUARTER | DELTA_NETS, PLACED_EYE),
    "qwen3.5-moe": (
        "qwen3_5_moe",
        QUARTER | DELTA_NETS | {"num_experts": 4, "shared_expert_intermediate_size": 128, **EXPERTS},
        PLACED_EYE,
    ),
    "glm-4.1v": ("glm4v", PARTIAL, EYE),
    "glm-4.5v": (
        "glm4v_moe",
        PARTIAL
        | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": False, **EXPERTS},
        EYE,
    ),
    "gemma-3-mm": (
        "gemma3",
        {name: value for name, value in CONFIGS["gemma-3"].items() if name != "model_type"},
        {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "internvl-3": (
        "internvl",
        {"model_type": "qwen2"},
        {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "mistral-3.1": (
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32,
         "num_attention_heads": 2},
    ),
}  # fmt: skip
WITH_DELTA_NETS = {"qwen3-next", "qwen3.5", "qwen3.5-moe"}
IMAGES = {*VISION, "step-3", "pixtral", "phi-4-multimodal"}
NAMES = (*CONFIGS, *BY_HAND, *VISION)
SEEDS = {"hy-v3": 8, "qwen2.5": 8, "arcee": 8, "gemma-3": 1, "lfm2-moe": 1, "stablelm-2": 1}


def write_model(name: str, directory: Path) -> None:
    """Writes the model of this name in `NAMES`."""
    seed = SEEDS.get(name, 7)
    if name in BY_HAND:
        return write_by_hand(name, directory, seed)
    torch.manual_seed(seed)  # of what Transformers draws and `fill` only alters
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if name in VISION:
        kind, text, vision = VISION[name]
        config = AutoConfig.for_model(kind, text_config=SHAPE | text, vision_config=vision, tie_word_embeddings=False)
        config.dtype = torch.float32
        model = AutoModelForImageTextToText.from_config(config)
    else:
        fields = SHAPE | CONFIGS[name]
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        config.dtype = torch.float32
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter, values in model.named_parameters():
        fill(parameter, values.data, generator, tied=config.tie_word_embeddings)
        if name == "nemotron-4" and "norm" in parameter and parameter.endswith(".weight"):
            values.data.sub_(1)  # it adds 1 itself, and Transformers begins with 1 all the same
    model.save_pretrained(directory)
    if name in CONFIGS and "architectures" in CONFIGS[name]:  # of vLLM's own, whose weights are another's
        config.architectures = CONFIGS[name]["architectures"]
        config.save_pretrained(directory)
    if name in RENAMED:
        _rename(directory / "model.safetensors", RENAMED[name])
    if name == "minimax-m2":
        _drop(directory / "model.safetensors", "e_score_correction_bias")  # a correction of the other way of routing
    if name == "qwen3-vl-moe":
        _transpose_experts(directory / "model.safetensors")


def _rename(path: Path, names: dict[str, str]) -> None:
    """Random weights may be stacked in any order."""
    weights = load_file(path)
    for name in [name for name in weights if "q_proj" in name]:
        parts = [weights.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        weights[name.replace("q_proj", "qkv")] = torch.cat(parts)
    for name in [name for name in weights if "mlp.gate.weight" in name]:  # Ling's correction of its router
        weights[name.replace("weight", "expert_bias")] = weights[name][:, 0].float() * 0.1
    for old, new in names.items():
        weights = {name.replace(old, new): values for name, values in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})


def _drop(path: Path, ending: str) -> None:
    weights = {name: values for name, values in load_file(path).items() if not name.endswith(ending)}
    save_file(weights, path, metadata={"format": "pt"})


def _transpose_experts(path: Path) -> None:
    """vLLM reads them as the model was published, and Transformers 5 writes them the other way."""
    weights = {name: w.mT.contiguous() if ".experts." in name else w for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
