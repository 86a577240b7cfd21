"""Needle models as files: what training writes, and Hugging Face Llama checkpoints, tokenizer included.

`python -m benchmarks.needle.export needle.pt benchmarks/needle/checkpoints/needle`
"""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from .model import NeedleConfig, NeedleModel
from .tasks import TOKEN_ID


def save_weights(model: NeedleModel, path: Path) -> None:
    """Writes weights as they are, and the config."""
    torch.save({"config": asdict(model.config), "weights": model.state_dict()}, path)


def read_weights(path: Path) -> NeedleModel:
    """What `save_weights` wrote, on the CPU."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = NeedleModel(NeedleConfig(**saved["config"]))
    model.load_state_dict(saved["weights"])
    return model


def read_checkpoint(directory: Path) -> NeedleModel:
    """What `write_checkpoint` wrote, in fp32."""
    found = json.loads((directory / "config.json").read_text())
    found["rope_theta"] = found["rope_parameters"]["rope_theta"]
    model = NeedleModel(NeedleConfig(**{field.name: found[field.name] for field in fields(NeedleConfig)}))
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def write_checkpoint(model: NeedleModel, directory: Path) -> None:
    """Writes config.json, model.safetensors (bf16), the tokenizer and generation_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.bfloat16().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token_id": TOKEN_ID["<s>"], "eos_token_id": TOKEN_ID["</s>"]}
    special["pad_token_id"] = TOKEN_ID["<pad>"]
    llama_config(model.config, **special).save_pretrained(directory)
    GenerationConfig(do_sample=False, **special).save_pretrained(directory)
    make_tokenizer(model.config.max_position_embeddings).save_pretrained(directory)


def llama_config(config: NeedleConfig, **special: int) -> LlamaConfig:
    """The same as Hugging Face's."""
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


def make_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
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
        model_max_length=max_tokens,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="what train.py wrote (.pt)")
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    write_checkpoint(read_weights(args.weights), args.directory)


if __name__ == "__main__":
    main()
