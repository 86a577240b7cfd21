"""A Llama made by hand that copies: after a token it says what came after that token before.

Its prompt is a sequence of distinct tokens, once and a bit; it repeats them for ever. So the right answer is known at
any length, without another engine, and every token has to be found in the context: the newest place that knows it is
`PERIOD` tokens back.

How: the residual stream has three parts, the token, the one before it, and the answer. Layer 0 looks one token back, by
dimensions that rotate fast, and copies what is there to the second part. Layer 1 asks with the token, by dimensions
that hardly rotate, for a place whose second part is the same, and copies the token there to the answer. The MLPs are
zero.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

PERIOD = 997
"""Tokens until the sequence repeats. Odd, so that a token is not always in the same place of its chunk."""

BEGIN = PERIOD
"""The first token of a prompt. It is its own predecessor, so it must not be one of those that repeat."""

VOCABULARY = PERIOD + 3
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 128, 4, 2, 64
MAX_POSITIONS, THETA = 32_768, 1e9
PART = 32
"""Width of each part of the residual stream; the last component is 1."""

APART = 7
"""Tokens as near as this in the sequence, which can share a chunk of 8, have perpendicular names. Then the mean key of
a chunk that holds the right token is as near to the query as it can be, and sparse attention has no excuse; with names
at random 17 in a thousand were missed after 20,000 tokens, by their neighbours' fault and again in each period."""

FAST_PAIRS = range(12)
SLOW_PAIRS = range(16, 32)
"""Rotary pairs: the fast ones know an offset of 1 from all others, the slow ones turn by 0.6 in 20,000 tokens."""

OFFSET_LOGIT = 60.0
"""Of each fast pair at an offset of 1; at 0 and 2 their sum is 39 lower, elsewhere lower still."""

MATCH_LOGIT = 60.0
"""Of a token with itself; that of the two likest is 0.75 of it."""

ANSWER_LOGIT = 16.0
"""Of the right answer; low enough for its probability to say how pure what was copied is."""


def prompt(tokens: int) -> list[int]:
    """The first tokens of the sequence that the model goes on with, at least one period of it."""
    if tokens < PERIOD + 2:
        raise ValueError(f"a prompt must have at least {PERIOD + 2} tokens, got {tokens}")
    order = _order()
    return [BEGIN, *(order[place % PERIOD] for place in range(tokens - 1))]


def successors() -> dict[int, int]:
    """What follows each token."""
    order = _order()
    return {token: order[(place + 1) % PERIOD] for place, token in enumerate(order)}


def write(directory: Path) -> None:
    """Writes the model in Hugging Face's format, without a tokenizer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": PERIOD + 1,
        "eos_token_id": PERIOD + 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_weights(), directory / "model.safetensors", metadata={"format": "pt"})


def _order() -> list[int]:
    order = list(range(PERIOD))
    random.Random(0).shuffle(order)
    return order


def _names() -> Tensor:
    """What each token is called, float `[VOCABULARY, PART]` of length 1, perpendicular to what is near in the order."""
    names = torch.nn.functional.normalize(torch.randn(VOCABULARY, PART, generator=torch.Generator().manual_seed(0)))
    order = _order()
    for place, token in enumerate(order):
        # Behind it, and in front of it where the sequence begins again.
        near = [order[other % PERIOD] for other in range(place - APART, place + APART + 1) if other < place]
        near += [order[other - PERIOD] for other in range(PERIOD, place + APART + 1)]
        basis, _ = torch.linalg.qr(names[near].T)
        rest = names[token] - basis @ (basis.T @ names[token])
        names[token] = rest / rest.norm()
    return names


def _weights() -> dict[str, Tensor]:
    token, before, answer = (slice(part * PART, (part + 1) * PART) for part in range(3))
    one = HIDDEN - 1
    # What RMSNorm leaves of a part: the stream's length before the layer is known.
    norms = [math.sqrt(HIDDEN / parts) for parts in (2, 3, 4)]
    embedding = torch.zeros(VOCABULARY, HIDDEN)
    names = _names()
    embedding[:, token], embedding[:, one] = names, 1.0
    eye = torch.eye(PART)

    frequencies = THETA ** (-torch.arange(HEAD_SIZE // 2) / (HEAD_SIZE // 2))
    fast, half = list(FAST_PAIRS), HEAD_SIZE // 2
    offset_query, offset_key = torch.zeros(HEAD_SIZE, HIDDEN), torch.zeros(HEAD_SIZE, HIDDEN)
    size = math.sqrt(OFFSET_LOGIT * math.sqrt(HEAD_SIZE)) / norms[0]
    offset_key[fast, one] = size
    # Turned back by one token, so that a key one token back lies in the same direction.
    offset_query[fast, one] = size * frequencies[fast].cos()
    offset_query[[pair + half for pair in fast], one] = -size * frequencies[fast].sin()

    slow = [*SLOW_PAIRS, *(pair + half for pair in SLOW_PAIRS)]
    match_query, match_key = torch.zeros(HEAD_SIZE, HIDDEN), torch.zeros(HEAD_SIZE, HIDDEN)
    size = math.sqrt(MATCH_LOGIT * math.sqrt(HEAD_SIZE)) / norms[1]
    match_query[slow, token] = match_key[slow, before] = size * eye

    weights = {
        "model.embed_tokens": embedding,
        "model.norm": torch.ones(HIDDEN),
        "lm_head": torch.zeros(VOCABULARY, HIDDEN),
    }
    weights["lm_head"][:, answer] = names * ANSWER_LOGIT / norms[2]
    for layer, query, key, to in ((0, offset_query, offset_key, before), (1, match_query, match_key, answer)):
        value, output = torch.zeros(HEAD_SIZE, HIDDEN), torch.zeros(HIDDEN, HEADS * HEAD_SIZE)
        value[:PART, token] = eye / norms[layer]
        for head in range(HEADS):  # all do the same
            output[to, head * HEAD_SIZE : head * HEAD_SIZE + PART] = eye / HEADS
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm": torch.ones(HIDDEN),
            f"{prefix}.post_attention_layernorm": torch.ones(HIDDEN),
            f"{prefix}.self_attn.q_proj": query.repeat(HEADS, 1),
            f"{prefix}.self_attn.k_proj": key.repeat(KV_HEADS, 1),
            f"{prefix}.self_attn.v_proj": value.repeat(KV_HEADS, 1),
            f"{prefix}.self_attn.o_proj": output,
            f"{prefix}.mlp.gate_proj": torch.zeros(64, HIDDEN),
            f"{prefix}.mlp.up_proj": torch.zeros(64, HIDDEN),
            f"{prefix}.mlp.down_proj": torch.zeros(HIDDEN, 64),
        }
    return {f"{name}.weight": tensor.contiguous() for name, tensor in weights.items()}
