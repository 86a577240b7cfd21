"""A model directory without weights, for `--load-format dummy`: a real model's shapes, as many layers as wanted.

    python -m benchmarks.dummy_model llama-3.1-8b build/llama-2-layers --layers 2

The vocabulary is small, so that the output layer does not hide what attention costs, and its tokenizer splits at
whitespace.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from numpy import base_repr
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "hidden_act": "silu",
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 16,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "hidden_act": "silu",
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 131072, "hidden_act": "silu",
    },
    "glm-4-9b": {
        "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "hidden_size": 4096, "intermediate_size": 13696,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 40,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "attention_bias": True,
        "max_position_embeddings": 131072, "hidden_act": "silu",
    },
    "phi-3-mini": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 131072, "hidden_act": "silu",
    },
}  # fmt: skip
"""What config.json says of a model with these weights' shapes, but for the vocabulary."""

VOCABULARY = 32_000
SPECIAL = ("<s>", "</s>", "<unk>")


def write(shape: str, directory: Path, layers: int | None = None) -> None:
    """Writes config.json and the tokenizer's files.

    Args:
        shape: of `CONFIGS`.
        directory: made if it is missing.
        layers: default: the model's own number.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[shape] | {"vocab_size": VOCABULARY, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1}
    config |= {"pad_token_id": 1, "tie_word_embeddings": False}
    if layers:
        config["num_hidden_layers"] = layers
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    # Short words: vLLM refuses a prompt by its characters when they are more than its tokens could have.
    vocabulary = [*SPECIAL, *(base_repr(i, 36).lower() for i in range(len(SPECIAL), VOCABULARY))]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL[2]))
    words.pre_tokenizer = WhitespaceSplit()
    bos, eos, unknown = SPECIAL
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos, unk_token=unknown).save_pretrained(
        directory
    )


def write_weights(directory: Path, seed: int = 0) -> None:
    """Writes weights at random beside what `write` wrote, in bfloat16.

    They are as large as those of a model that is about to be trained. `--load-format dummy` makes them so small that
    no answer depends on a key.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=CONFIGS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    write(arguments.shape, arguments.directory, arguments.layers)


if __name__ == "__main__":
    main()
