"""Refusals of what a model is. The models are tiny: fields of `config.json`, beside `architectures.SHAPE`."""

from __future__ import annotations

from typing import Any

from architectures import CONFIGS
from doors import Door, Fields, Platform
from refusal_cases import (
    DRAFT,
    LLAMA,
    NO_CONNECTOR,
    ONE_KIND,
    OTHER,
    OTHER_BACKEND,
    Case,
    case,
    connector,
    options,
    ours,
    value,
)

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
GEMMA_2 = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 4096}
GEMMA_3 = CONFIGS["gemma-3"] | {"architectures": ["Gemma3ForCausalLM"]}
SMALL_GEMMA_3 = GEMMA_3 | {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
FEWER_WINDOWS = SMALL_GEMMA_3 | {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}
FEWER_FULL = SMALL_GEMMA_3 | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
GEMMA_3N = {
    "model_type": "gemma3n_text",
    "architectures": ["Gemma3nForCausalLM"],
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["full_attention"] * 4,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": 1000,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [256] * 4,
}
GEMMA_4 = {
    "model_type": "gemma4_text",
    "architectures": ["Gemma4ForCausalLM"],
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4096,
    "global_head_dim": 128,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
}
BLOOM = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_layer": 2, "n_head": 4}
BERT = {"model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 512}
DEEPSEEK = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 2,
}
HRM_TEXT = {
    "model_type": "hrm_text",
    "architectures": ["HrmTextForCausalLM"],
    "num_layers_per_stack": 1,
    "H_cycles": 1,
    "L_cycles": 1,
    "L_bp_cycles": [1],
}
LLAMA_4 = {
    "model_type": "llama4_text",
    "architectures": ["Llama4ForCausalLM"],
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 256,
    "interleave_moe_layer_step": 100,
    "moe_layers": [],
    "no_rope_layers": [1, 0],
    "use_qk_norm": False,
    "attention_chunk_size": 256,
}
GRANITE_4_H = CONFIGS["granite-4-h"] | {"architectures": ["GraniteMoeHybridForCausalLM"], "mamba_d_state": 128}
GRANITE_4_H_SMALL = GRANITE_4_H | {"mamba_d_state": CONFIGS["granite-4-h"]["mamba_d_state"]}
MIMO = {
    "model_type": "mimo_v2_flash",
    "architectures": ["MiMoV2FlashForCausalLM"],
    "v_head_dim": 32,
    "hybrid_layer_pattern": [0, 0],
    "moe_layer_freq": [0, 0],
}
OLMO_2 = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
OLMO_2 |= {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
NTK = LLAMA | {"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4, "factor": 4.0}}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
RNJ_1 = {
    "model_type": "gemma3_text",
    "architectures": ["Rnj1ForCausalLM"],
    "layer_types": ["full_attention"] * 2,
    "rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE},
}

WINDOW = (
    "serves layers without a sliding window, and this model has none; use another --attention-backend, or lower "
    "--max-model-len to the window"
)
PAGES = (
    "ValueError: shadowkv's pages of {} bytes are not a multiple of those of the other layers ({} bytes, 128 tokens); "
    "set shadowkv.block_size and shadowkv.compression so that block_size / compression (now {}) is a multiple of {}, "
    "or use another --attention-backend for this model."
)
BESIDE = (
    "ValueError: ShadowKVConnector moves sealed blocks alone, of which a model with layers of other backends beside "
    "(windows, chunks, states, a draft model) cannot make use; drop --kv-transfer-config."
)
GROUPS = (
    "needs its 2 layers in one KV cache group, vLLM makes groups of 1 because the layers of another backend (sliding "
    "windows, a draft model) are fewer; use another --attention-backend, or a draft model of as many layers"
)


def layer(name: str, model: Fields, what: str, **fields: Any) -> Case:
    return value(name, f"does not support layers {what}; {OTHER_BACKEND} for this model", model=model, **fields)


def rotation(name: str, model: Fields, what: str, **fields: Any) -> Case:
    says = f"ValueError: ShadowKV cannot undo RoPE in model.layers.0.self_attn.attn: {what}; {OTHER_BACKEND}."
    return case(name, says, model=model, **fields)


VALUES: list[tuple[str, Fields, tuple[Platform, ...]]] = [
    ("values of another size", {}, ("cpu", "cuda")),
    ("values of another size by kind", ONE_KIND, ("cuda",)),
]
MODELS: list[Case] = [
    value("window", WINDOW, OTHER, options(max_model_len=64), quick=True, model=MISTRAL),
    layer("ALiBi", BLOOM, "with ALiBi"),
    layer("soft cap", GEMMA_2, "with a logits soft cap (50.0)"),
    layer("shared KV", GEMMA_3N, "with a KV cache shared between layers"),
    layer("encoder", BERT, "with encoder_only attention", options={"runner": "pooling", "skip_tokenizer_init": False}),
    value(
        "prefixes of chunks",
        "serves models with layers that attend in chunks without prefix caching only, because vLLM finds no prefixes "
        "in chunks beside pages of another block size; add --no-enable-prefix-caching, or use another "
        "--attention-backend",
        options(enable_prefix_caching=False),
        OTHER,
        quick=True,
        model=LLAMA_4,
    ),
    layer("prefixes", HRM_TEXT, "of vLLM's PrefillPrefixLMAttention, which is not plain causal attention"),
    *(
        Case(
            name,
            Door(MIMO, asked),
            "ValueError: shadowkv does not support models whose values are of another head size than their keys, for "
            "which vLLM takes a backend of its own; drop --attention-backend and --attention-config.backend_per_kind.",
            ways_out=(),  # what vLLM then takes asks for a GPU
            platforms=platforms,
            quick=False,
        )
        for name, asked, platforms in VALUES
    ),
    case(
        "large state",
        "ValueError: shadowkv's pages of 65536 bytes hold no state of the model's other layers (… bytes); set "
        "shadowkv.block_size to 5120, or lower shadowkv.compression, or use another --attention-backend for this "
        "model.",
        options(**ours(block_size=5120)),
        options(**ours(compression=1)),
        OTHER,
        model=GRANITE_4_H,
        options={"mamba_ssm_cache_dtype": "float32"},  # what vLLM takes by itself depends on the processor
    ),
    value(
        "MLA",
        "does not support MLA models, whose keys are compressed already; use another --attention-backend",
        model=DEEPSEEK,
    ),
    value(
        "head size",
        "supports head sizes 64, 80, 96, 128, 256, got 48; use another --attention-backend",
        model=LLAMA | {"head_dim": 48},
    ),
    value(
        "unequal layers",
        "needs equal attention layers, got (query heads, KV heads, head size, dtype) (4, 2, 128, torch.bfloat16) after "
        "(4, 2, 64, torch.bfloat16); use another --attention-backend for this model",
        model=GEMMA_4,
    ),
    case(
        "many query heads",
        "ValueError: shadowkv's CUDA kernels take at most 16 query heads per KV head, this model has 17; use another "
        "--attention-backend for this model.",
        on="cuda",
        model=LLAMA | {"num_attention_heads": 34, "hidden_size": 272},
    ),
    rotation(
        "unknown rotary class", NTK, "LlamaAttention rotates with NTKScalingRotaryEmbedding, which is not supported"
    ),
    rotation("rotation by the step", OLMO_2, "Olmo2Attention scales RoPE by dynamic, which depends on the step"),
    rotation(
        "unknown attention class",
        DEEPSEEK,
        "DeepseekV2Attention (of vllm.model_executor.models.deepseek_v2) is not among the attention classes that are "
        "known to leave their keys alone after RoPE",
        environment={"VLLM_MLA_DISABLE": "1"},
    ),
    rotation(
        "keys normalised after RoPE",
        LLAMA_4 | {"use_qk_norm": True, "attention_chunk_size": None},
        "Llama4Attention normalizes keys after RoPE (use_qk_norm)",
    ),
    # Layers of other backends.
    case(
        "pages of a draft model",
        PAGES.format(65536, 49152, 128, 96),
        options(**ours(block_size=768)),
        OTHER,
        on="cpu",
        draft=LLAMA | {"head_dim": 48},
        options=DRAFT,
    ),
    case(
        "pages of windows",
        PAGES.format(32768, 65536, 64, 128),
        options(**ours(block_size=256, compression=2)),
        OTHER,
        model=FEWER_FULL,
        options=ours(block_size=128, compression=2),
    ),
    value("groups of windows", GROUPS, OTHER, model=FEWER_WINDOWS),
    case("connector beside windows", BESIDE, options(**NO_CONNECTOR), model=GEMMA_3, options=connector()),
    case("connector beside states", BESIDE, options(**NO_CONNECTOR), model=GRANITE_4_H_SMALL, options=connector()),
    case(
        "connector beside a draft model",
        BESIDE,
        options(**NO_CONNECTOR),
        on="cpu",
        draft=LLAMA | {"num_hidden_layers": 2},
        options=DRAFT | connector(),
    ),
    value(
        "groups",
        GROUPS,
        OTHER,
        {"draft": {"num_hidden_layers": 2}},
        on="cpu",
        draft=LLAMA | {"num_hidden_layers": 1},
        options=DRAFT,
    ),
]
