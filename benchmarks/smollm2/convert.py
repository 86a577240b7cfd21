"""A Llama in a GGUF file as a checkpoint in Hugging Face's format, in float32.

transformers does it, too, but only together with accelerate; and it splits numbers otherwise than SmolLM2's own
tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What GGUF calls a weight, and what Hugging Face does."""

CONTROL = 3
"""GGUF's type of a token that no text is tokenised to."""


def convert(file: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files.

    Args:
        file: a GGUF file with a Llama and a tokenizer of SmolLM's kind.
        folder: exists.

    Raises:
        ValueError: it holds something else.
    """
    reader = GGUFReader(file)
    said: dict[str, Any] = {}
    for name, field in reader.fields.items():
        said[name] = field.contents()
    kind = (said["general.architecture"], said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"])
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{file} holds {', '.join(kind)}; only llama with gpt2's tokenizer, smollm's way, is read")
    config = _config(said, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _halves(
                weight, config["num_attention_heads" if "attn_q" in tensor.name else "num_key_value_heads"]
            )
        weights[_name(tensor.name)] = torch.from_numpy(np.array(weight, np.float32))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(said).save_pretrained(folder)


def _name(gguf: str) -> str:
    """Hugging Face's name of a weight."""
    part, *rest = gguf.removesuffix(".weight").split(".")
    return f"{f'model.layers.{rest[0]}.{LAYER[rest[1]]}' if part == 'blk' else TOP[part]}.weight"


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in Hugging Face's order: RoPE turns dimensions i and i + half; in GGUF they are neighbours."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config(said: dict[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(said["tokenizer.ggml.tokens"]),
        "hidden_size": said["llama.embedding_length"],
        "intermediate_size": said["llama.feed_forward_length"],
        "num_hidden_layers": said["llama.block_count"],
        "num_attention_heads": said["llama.attention.head_count"],
        "num_key_value_heads": said["llama.attention.head_count_kv"],
        "head_dim": said["llama.rope.dimension_count"],
        "max_position_embeddings": said["llama.context_length"],
        "rope_theta": said["llama.rope.freq_base"],
        "rms_norm_eps": said["llama.attention.layer_norm_rms_epsilon"],
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": said["tokenizer.ggml.bos_token_id"],
        "eos_token_id": said["tokenizer.ggml.eos_token_id"],
        "pad_token_id": said["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(said: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Bytes in pairs, with every digit apart: what llama.cpp calls "smollm"."""
    tokens = said["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, said["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[said["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[said["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[said["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[said["tokenizer.ggml.padding_token_id"]],
        chat_template=said.get("tokenizer.chat_template"),
    )
