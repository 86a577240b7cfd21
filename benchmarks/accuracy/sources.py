"""Where layers come from: the needle model and its twin, made-up keys, and keys of text."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.accuracy.layers import Layer, captured, encoded, passages, planted
from benchmarks.needle import CHECKPOINT, TWIN_CHECKPOINT
from benchmarks.needle.tasks import make_prompt

QUERIES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `chosen` reads."""
    parser.add_argument("--tokens", type=int, default=8192, help="of each prompt, a multiple of 1024")
    parser.add_argument("--sequences", type=int, default=2, help="per source")
    parser.add_argument("--text-model", type=Path, help="a decoder's checkpoint; see text_model.py")
    parser.add_argument("--text", type=Path, help="its text; default: held_out.txt beside it")
    parser.add_argument("--encoder", type=Path, help="a text encoder's checkpoint")
    parser.add_argument("--encoder-text", type=Path, help="its text")
    parser.add_argument("--every", type=int, default=1, help="every so-many-th layer, from the last one back")
    parser.add_argument("--skip", nargs="+", choices=["needle", "twin", "planted"], default=[])


def chosen(arguments: argparse.Namespace) -> dict[str, list[Layer]]:
    """Layers by source, those of several sequences one after the other."""
    tokens, sequences, queries = arguments.tokens, arguments.sequences, QUERIES
    found: dict[str, list[Layer]] = {}
    for name, checkpoint in (("needle", CHECKPOINT), ("twin", TWIN_CHECKPOINT)):
        if name not in arguments.skip:
            found[name] = [layer for seed in range(sequences) for layer in needle_layers(checkpoint, tokens, seed)]
    if "planted" not in arguments.skip:
        generator = torch.Generator().manual_seed(0)
        found["planted"] = [planted(generator, tokens, 16, num_kv_heads=4, num_heads=16) for _ in range(sequences)]
    if arguments.text_model:
        text = (arguments.text or arguments.text_model / "held_out.txt").read_text(errors="ignore")
        ids = AutoTokenizer.from_pretrained(arguments.text_model)(text)["input_ids"]
        found["decoder"] = [
            layer
            for number, part in enumerate(passages(ids, tokens, queries, sequences))
            for layer in captured(arguments.text_model, part, queries, f"decoder {number}")
        ]
    if arguments.encoder:
        text = arguments.encoder_text.read_text(errors="ignore")
        found["encoder"] = encoded(arguments.encoder, text, tokens, queries, None, "encoder")
        found["encoder, with RoPE"] = encoded(arguments.encoder, text, tokens, queries, 500_000.0, "encoder with RoPE")
    return {source: layers[:: -arguments.every][::-1] for source, layers in found.items()}


def needle_layers(checkpoint: Path, tokens: int, seed: int) -> list[Layer]:
    """A crowded haystack of `tokens` tokens; the queries are those of a question and its answer."""
    prompt = make_prompt("multi_key", tokens + 2, 9_000_000 + seed)
    ids = prompt.token_ids + prompt.answer_ids
    return captured(checkpoint, ids, len(ids) - tokens, f"{checkpoint.name} {seed}")
