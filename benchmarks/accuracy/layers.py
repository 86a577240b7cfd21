"""What one attention layer of a model saw: keys, values, and the queries that came after a prompt.

`captured` takes them from any transformers decoder, through transformers' attention interface, `encoded` from a text
encoder; `planted` makes them up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vllm_shadowkv.query_scales import query_scales
from vllm_shadowkv.rotary import Rotary, apply, undo


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of one sequence. The tokens after the prompt are generated ones: a query attends to them exactly.

    Attributes:
        name: for tables.
        keys: fp32 `[tokens, num_kv_heads, head_size]`, post-RoPE, rounded to bf16 as a cache has them.
        values: the same shape and rounding.
        queries: fp32 `[n, num_heads, head_size]`, post-RoPE, of the last n tokens.
        prompt_tokens: what a method may compress; at most `tokens - n`.
        rotary: turns keys.
        query_scales: fp32 `[num_kv_heads * head_size]`, as the engine finds them; None: 1.
    """

    name: str
    keys: Tensor
    values: Tensor
    queries: Tensor
    prompt_tokens: int
    rotary: Rotary
    query_scales: Tensor | None = None

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
    """Runs a transformers decoder over a sequence and returns its layers.

    Args:
        model: name or directory of a decoder with full attention and plain or scaled RoPE (neox pairing).
        token_ids: the sequence; its last `num_queries` tokens are those that follow the prompt.
        num_queries: see `Layer.queries`.
        name: of the sequence, for tables.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen = _attended(network, torch.tensor([token_ids]), use_cache=False)
    with torch.inference_mode():
        cos, sin = network.model.rotary_emb(torch.zeros(1), torch.arange(len(token_ids))[None])
    half = cos.shape[-1] // 2
    rotary = Rotary(torch.cat((cos[0, :, :half], sin[0, :, :half]), -1), 2 * half, is_neox=True)
    prompt = len(token_ids) - num_queries
    random = torch.randint(network.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    probed = _attended(network, random, attend=torch.zeros_like, use_cache=False)
    return [
        Layer(
            f"{name}, layer {i}",
            keys[0],
            values[0],
            queries[0, prompt:],
            prompt,
            rotary,
            query_scales(probed[i][0][0].square().mean(0), keys.shape[2], rotary),
        )
        for i, (queries, keys, values) in enumerate(seen)
    ]


def encoded(
    model: str | Path, text: str, prompt_tokens: int, num_queries: int, theta: float | None, name: str
) -> list[Layer]:
    """Runs a BERT-like encoder over a text in windows of 256 tokens, and puts the windows one after the other.

    It stands in for a decoder where none is at hand: real keys of real text, but a query was never trained to look
    beyond its window, and positions are in the input. Classification and separator tokens are left out.

    Args:
        model: name or directory.
        text: at least as long as is asked for.
        prompt_tokens: a multiple of 256.
        num_queries: at most 256, the last ones of the window after the prompt; only their keys count as generated.
        theta: turn queries and keys by RoPE with this base, as a decoder would; None: as they are.
        name: of the text, for tables.
    """
    window = 256
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor(
        tokenizer(text, add_special_tokens=False, truncation=True, max_length=prompt_tokens + window)["input_ids"]
    )
    if len(ids) < prompt_tokens + window:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than {prompt_tokens + window}")
    rows = ids.view(-1, window)
    ends = [torch.full((len(rows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    seen = _attended(network, torch.cat((ends[0], rows, ends[1]), 1))
    tokens = prompt_tokens + num_queries
    layers = []
    for i, found in enumerate(seen):
        queries, keys, values = (x[:, 1:-1].flatten(0, 1) for x in found)
        queries, keys, values = (torch.cat((x[:prompt_tokens], x[-num_queries:])) for x in (queries, keys, values))
        rotary = Rotary.identity() if theta is None else rotary_table(tokens, keys.shape[-1], theta)
        positions = torch.arange(tokens)
        queries, keys = (apply(rotary, x, positions).bfloat16().float() for x in (queries, keys))
        layers.append(Layer(f"{name}, layer {i}", keys, values, queries[prompt_tokens:], prompt_tokens, rotary))
    return layers


def rotary_table(tokens: int, head_size: int, theta: float) -> Rotary:
    """Plain RoPE over whole heads."""
    pairs = head_size // 2
    angles = torch.arange(tokens)[:, None].double() * theta ** -(torch.arange(pairs).double() / pairs)
    return Rotary(torch.cat((angles.cos(), angles.sin()), -1).float(), head_size, is_neox=True)


def _attended(
    network: PreTrainedModel, ids: Tensor, attend: Callable[[Tensor], Tensor] | None = None, **options: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each layer's attention was called with: q, k, v `[batch, tokens, heads, size]`, rounded to bf16.

    It gives what `attend` makes of `[batch, tokens, heads, size]`; None: attention.
    """
    seen: list[tuple[Tensor, ...]] = []

    def captured(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: object, **more: object):
        seen.append(tuple(x.transpose(1, 2).bfloat16().float() for x in (query, key, value)))
        if attend:
            return attend(query.transpose(1, 2)), None
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    AttentionInterface.register("captured", captured)
    network.set_attn_implementation("captured")
    body = getattr(network, "model", network)  # without the head: nobody reads logits
    with torch.inference_mode():
        body(ids, **options)
    assert len(seen) == network.config.num_hidden_layers
    return seen


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
    rotary = rotary_table(tokens, head_size, 500_000.0)
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
