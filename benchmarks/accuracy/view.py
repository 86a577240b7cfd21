"""A method's view of a prompt, and the decode step that every method shares.

A method says what it keeps (`View`); `attend` then does what ShadowKV does with it: score landmarks, softmax per query
head, their sum over a GQA group (or the highest), the best chunks per KV head, exact attention over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.accuracy.layers import Layer


@dataclass(frozen=True, eq=False)
class View:
    """What a method keeps of a prompt of T tokens in C chunks.

    Attributes:
        keys: fp32 `[T, num_kv_heads, head_size]`, post-RoPE, as attention will read them.
        values: the same shape.
        landmarks: fp32 `[num_kv_heads, C, head_size]`.
        forced: bool `[num_kv_heads, C]`, chunks that are attended whatever their score.
        scored: bool `[num_kv_heads, C]`, chunks whose landmarks are in the softmax.
        mean_values: fp32 `[groups, num_kv_heads, head_size]`, of equally many tokens each. They stand for the values of
            the rest, the chunks that are not attended, as landmarks stand for its keys; None: the rest is left out.
        highest: a chunk's score is the highest of its GQA group, in place of the sum.
    """

    keys: Tensor
    values: Tensor
    landmarks: Tensor
    forced: Tensor
    scored: Tensor
    mean_values: Tensor | None = None
    highest: bool = False

    @property
    def num_forced(self) -> int:
        """Chunks per KV head that are attended whatever their score, on average."""
        return round(self.forced.float().sum(1).mean().item())


def attend(view: View, layer: Layer, budget_chunks: int, truly_best: bool = False) -> Tensor:
    """Attention of the layer's queries over forced chunks, the best ones and generated tokens, `[n, heads, size]`.

    Args:
        view: what there is of the prompt.
        layer: its queries, and the generated tokens.
        budget_chunks: chosen by score.
        truly_best: see `choose`.
    """
    n, prompt = len(layer.queries), layer.prompt_tokens
    num_chunks = view.forced.shape[1]
    chunk_size = prompt // num_chunks
    behind = len(layer.keys) - prompt  # a query is at its own place among the last of them
    generated = torch.ones(n, behind, dtype=torch.bool).tril(behind - n)
    outputs = []
    for head, queries in enumerate(_by_head(view, layer)):
        chosen, marks = choose(view, layer, head, budget_chunks, truly_best)
        seen = torch.cat((chosen.repeat_interleave(chunk_size, 1), generated), 1)
        keys = torch.cat((view.keys[:, head], layer.keys[prompt:, head]))
        values = torch.cat((view.values[:, head], layer.values[prompt:, head]))
        logits = (layer.scale * (queries @ keys.T)).masked_fill(~seen[:, None], -torch.inf)
        if view.mean_values is not None:
            rest = marks + math.log(chunk_size)  # a chunk counts as so many tokens like its landmark
            logits = torch.cat((logits, rest.masked_fill(chosen[:, None], -torch.inf)), -1)
            means = view.mean_values[:, head]
            values = torch.cat((values, means.repeat_interleave(num_chunks // len(means), 0)))
        outputs.append(logits.softmax(-1) @ values)
    return torch.cat(outputs, 1)


def choose(view: View, layer: Layer, head: int, budget_chunks: int, truly_best: bool = False) -> tuple[Tensor, Tensor]:
    """The chunks that each query of a KV head's group attends to, forced ones included.

    Args:
        view: what there is of the prompt.
        layer: its queries.
        head: the KV head.
        budget_chunks: chosen by score.
        truly_best: a chunk's score is the attention that its keys get, which no method knows beforehand.

    Returns:
        Bool `[n, C]`; and the logits of chunks, fp32 `[n, group, C]`: of eight tokens each like its landmark.
    """
    queries, num_chunks = _by_head(view, layer)[head], view.forced.shape[1]
    marks = layer.scale * (queries @ view.landmarks[head].T)
    shares = marks.masked_fill(~view.scored[head], -torch.inf).softmax(-1)
    if truly_best:
        every = (layer.scale * (queries @ view.keys[:, head].T)).softmax(-1)
        shares = every.unflatten(-1, (num_chunks, -1)).sum(-1)
    scores = shares.amax(1) if view.highest else shares.sum(1)
    scores = scores.masked_fill(view.forced[head], -torch.inf)
    best = scores.topk(min(budget_chunks, num_chunks)).indices
    chosen = view.forced[head].expand(len(queries), -1)
    return chosen | torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True), marks


def _by_head(view: View, layer: Layer) -> tuple[Tensor, ...]:
    """Queries of each KV head's group, `[n, group, size]`."""
    return layer.queries.unflatten(1, (len(view.forced), -1)).unbind(1)


def full_attention(layer: Layer) -> Tensor:
    """The same without a method."""
    heads = layer.keys.shape[1]
    everything = torch.ones(heads, layer.prompt_tokens, dtype=torch.bool)
    prompt = slice(0, layer.prompt_tokens)
    landmarks = layer.keys[prompt].transpose(0, 1)
    return attend(View(layer.keys[prompt], layer.values[prompt], landmarks, everything, everything), layer, 0)


def relative_error(output: Tensor, exact: Tensor) -> Tensor:
    """|output - exact| / |exact| of each query and head, `[n, heads]`."""
    return (output - exact).norm(dim=-1) / exact.norm(dim=-1)


def lowest_cosines(chunks: Tensor, landmarks: Tensor) -> Tensor:
    """The lowest cosine between a landmark `[heads, C, size]` and a key of its chunk, `[heads, C]`."""
    return torch.cosine_similarity(chunks, landmarks.unsqueeze(2), dim=-1).amin(-1)


def chunked(keys: Tensor, chunk_size: int) -> Tensor:
    """`[T, heads, size]` -> `[heads, chunks, chunk_size, size]`."""
    return keys.unflatten(0, (-1, chunk_size)).permute(2, 0, 1, 3)


def with_exact_chunks(rebuilt: Tensor, exact: Tensor, chunks: Tensor, chunk_size: int) -> Tensor:
    """Rebuilt keys, but exact ones where `chunks` (bool `[heads, C]`) says so; `[T, heads, size]`."""
    return torch.where(chunks.repeat_interleave(chunk_size, 1).T[..., None], exact, rebuilt)
