"""Writes trained weights as a Hugging Face Llama checkpoint, tokenizer included.

`python -m benchmarks.needle.export needle.pt benchmarks/needle/checkpoints/needle`
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from .model import NeedleConfig
from .tasks import TOKEN_ID


def write_checkpoint(state: dict[str, torch.Tensor], directory: Path) -> None:
    """Writes config.json, model.safetensors (bf16), the tokenizer and generation_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in state.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token_id": TOKEN_ID["<s>"], "eos_token_id": TOKEN_ID["</s>"]}
    special["pad_token_id"] = TOKEN_ID["<pad>"]
    llama_config(**special).save_pretrained(directory)
    GenerationConfig(do_sample=False, **special).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def llama_config(**special: int) -> LlamaConfig:
    """The Hugging Face config of NeedleConfig's defaults."""
    config = NeedleConfig()
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        dtype="bfloat16",
        **special,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; words are split at white space; nothing is added at either end."""
    tokenizer = Tokenizer(WordLevel(TOKEN_ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=NeedleConfig.max_position_embeddings,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="what train.py wrote (.pt)")
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    write_checkpoint(torch.load(args.weights, weights_only=True), args.directory)


if __name__ == "__main__":
    main()
