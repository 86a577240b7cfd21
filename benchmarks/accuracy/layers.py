"""What one attention layer of a model saw: keys, values, and the queries that came after a prompt.

`captured` takes them from any transformers model, through its attention interface; `planted` makes them up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vllm_shadowkv.rotary import Rotary, apply, undo


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of one sequence. The tokens after the prompt are generated ones: a query attends to them exactly.

    Attributes:
        name: for tables.
        keys: fp32 `[tokens, num_kv_heads, head_size]`, post-RoPE, rounded to bf16 as a cache has them.
        values: the same shape and rounding.
        queries: fp32 `[n, num_heads, head_size]`, post-RoPE, of the last n tokens.
        prompt_tokens: what a method may compress; `tokens - n`.
        rotary: turns keys.
    """

    name: str
    keys: Tensor
    values: Tensor
    queries: Tensor
    prompt_tokens: int
    rotary: Rotary

    @property
    def scale(self) -> float:
        """What dot products are multiplied with."""
        return self.keys.shape[-1] ** -0.5

    def pre_rope(self) -> Tensor:
        """The prompt's keys before RoPE, `[prompt_tokens, num_kv_heads, head_size]`."""
        return undo(self.rotary, self.keys[: self.prompt_tokens], torch.arange(self.prompt_tokens))

    def rotated(self, keys: Tensor) -> Tensor:
        """The prompt's keys after RoPE, from what `pre_rope` gave or a copy of it."""
        return apply(self.rotary, keys, torch.arange(self.prompt_tokens))


def captured(model: str | Path, token_ids: list[int], num_queries: int, name: str) -> list[Layer]:
    """Runs a transformers model over a sequence and returns its layers.

    Args:
        model: name or directory of a decoder with full attention and plain or scaled RoPE (neox pairing).
        token_ids: the sequence; its last `num_queries` tokens are those that follow the prompt.
        num_queries: see `Layer.queries`.
        name: of the sequence, for tables.
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: object, **options: object):
        seen.append(
            tuple(x[0].transpose(0, 1).bfloat16().float() for x in (query[:, :, -num_queries:], key, value))  # type: ignore[arg-type]
        )
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    AttentionInterface.register("captured", attend)
    config = AutoConfig.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="captured")
    with torch.inference_mode():
        positions = torch.arange(len(token_ids))[None]
        cos, sin = network.model.rotary_emb(torch.zeros(1), positions)
        network.model(torch.tensor([token_ids]), use_cache=False)
    half = cos.shape[-1] // 2
    rotary = Rotary(torch.cat((cos[0, :, :half], sin[0, :, :half]), -1), 2 * half, is_neox=True)
    assert len(seen) == config.num_hidden_layers
    return [
        Layer(f"{name}, layer {i}", keys, values, queries, len(token_ids) - num_queries, rotary)
        for i, (queries, keys, values) in enumerate(seen)
    ]


def planted(
    generator: Generator,
    prompt_tokens: int,
    num_queries: int = 64,
    num_kv_heads: int = 8,
    num_heads: int = 32,
    head_size: int = 128,
    directions: int = 96,
    drift: float = 0.15,
) -> Layer:
    """Made-up keys whose structure is known: a mean, a subspace that drifts, a tail of noise, single odd tokens.

    Every passage of 512 tokens has its own copy of a shared subspace, turned a little (`drift`: share of it that is
    new). One token in 200 is odd: its key is far from its neighbours'. A query looks for 8 tokens, some of them odd,
    and for what is near; that is what a method must find.
    """
    width = num_kv_heads * head_size
    tokens = prompt_tokens + num_queries

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    strengths = torch.arange(1, directions + 1) ** -0.5
    shared = normal(directions, width) / math.sqrt(width)
    passages = []
    for start in range(0, tokens, 512):
        length = min(512, tokens - start)
        own = math.sqrt(1 - drift) * shared + math.sqrt(drift) * normal(directions, width) / math.sqrt(width)
        topic = normal(1, directions)
        slow = normal(length // 8 + 2, directions).repeat_interleave(8, 0)[:length]
        passages.append((topic + 0.7 * slow + 0.7 * normal(length, directions)) * strengths @ own * 6)
    keys = torch.cat(passages) + 0.1 * normal(tokens, width) + 2 * normal(1, width) / math.sqrt(width)
    odd = torch.rand(tokens, generator=generator) < 1 / 200
    keys[odd] += 0.6 * normal(int(odd.sum()), width)
    pairs = head_size // 2
    angles = torch.arange(tokens)[:, None].double() * 500_000.0 ** -(torch.arange(pairs).double() / pairs)
    rotary = Rotary(torch.cat((angles.cos(), angles.sin()), -1).float(), head_size, is_neox=True)
    keys = apply(rotary, keys.unflatten(1, (num_kv_heads, head_size)), torch.arange(tokens)).bfloat16().float()
    values = normal(tokens, num_kv_heads, head_size).bfloat16().float()
    sought = torch.randint(prompt_tokens, (num_queries, num_heads, 8), generator=generator)
    odd_ones = odd[:prompt_tokens].nonzero()[:, 0]
    sought[..., :2] = odd_ones[torch.randint(len(odd_ones), (num_queries, num_heads, 2), generator=generator)]
    heads = torch.arange(num_heads) // (num_heads // num_kv_heads)
    targets = keys[sought, heads[None, :, None]]  # [n, heads, 8, size]
    targets = targets / targets.norm(dim=-1, keepdim=True)
    queries = targets.sum(2) * math.sqrt(head_size) * 2 + 0.5 * normal(num_queries, num_heads, head_size)
    return Layer("planted", keys, values, queries.bfloat16().float(), prompt_tokens, rotary)


def passages(token_ids: list[int], prompt_tokens: int, num_queries: int, count: int) -> Iterator[list[int]]:
    """`count` stretches of a long text, evenly spread, of `prompt_tokens + num_queries` tokens each."""
    length = prompt_tokens + num_queries
    room = len(token_ids) - length
    if room < 0:
        raise ValueError(f"the text has {len(token_ids)} tokens, fewer than {length}")
    for i in range(count):
        start = room * i // max(count - 1, 1)
        yield token_ids[start : start + length]
