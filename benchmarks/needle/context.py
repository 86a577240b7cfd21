"""What a decode step attends to: the exact context, and ShadowKV's view of it.

A plain simulation in PyTorch, independent of the plugin: blocks of 1024 tokens are sealed into
low-rank keys and int8 landmarks, a step reads the best chunks of them and the open tail exactly.
Shapes use T tokens, H query heads, G KV heads, D head_dim, C chunks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import NeedleConfig, rope_angles, rotate


@dataclass(frozen=True)
class ShadowOptions:
    """Sizes in tokens; the defaults are 6 % of 4096 tokens and a quarter of 2 * 64 dimensions."""

    block_size: int = 1024
    chunk_size: int = 8
    budget: int = 240
    rank: int = 32
    random_selection: bool = False
    """Ignore the landmarks: the control that shows how much selection matters."""
    mean_values: bool = False
    """Let a chunk that is not selected count by its landmark and its block's mean value: a proposal, see docs."""


class ExactContext:
    """One layer's keys and values of one sequence, attended in full."""

    def __init__(self, config: NeedleConfig, k_pre: Tensor, v: Tensor) -> None:
        """Takes pre-RoPE keys and values [G, T, D] of the prompt."""
        self.config, self.values = config, v
        self.keys = self._rotated(k_pre, 0)

    def _rotated(self, k_pre: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + k_pre.shape[1])
        return rotate(k_pre, *rope_angles(positions, self.config))

    def append(self, k_pre: Tensor, v: Tensor) -> None:
        """Adds one decoded token, [G, 1, D] each."""
        self.keys = torch.cat((self.keys, self._rotated(k_pre, self.keys.shape[1])), 1)
        self.values = torch.cat((self.values, v), 1)

    def attend(self, q: Tensor) -> Tensor:
        """Attention of post-RoPE q [H, D]; returns [H, D]."""
        return _attend(q, self.keys, self.values)


class ShadowContext(ExactContext):
    """The same, but a prompt's complete blocks are sealed and read through a selection."""

    def __init__(self, config: NeedleConfig, k_pre: Tensor, v: Tensor, options: ShadowOptions) -> None:
        super().__init__(config, k_pre, v)
        self.options = options
        self.sealed = k_pre.shape[1] // options.block_size * options.block_size
        sealed_keys = self.keys[:, : self.sealed]
        chunks = sealed_keys.unflatten(1, (-1, options.chunk_size)) if self.sealed else None
        self.landmarks = None if chunks is None else _int8(chunks.float().mean(2))
        rebuilt = torch.cat(
            [
                _low_rank(block, options.rank)
                for block in k_pre[:, : self.sealed].split(options.block_size, 1)
                if block.shape[1]
            ]
            + [k_pre[:, self.sealed :]],
            1,
        )
        self.keys = self._rotated(rebuilt, 0)

    def attend(self, q: Tensor) -> Tensor:
        """Attention of post-RoPE q [H, D] over the selected chunks and the open tail."""
        if self.landmarks is None:
            return super().attend(q)
        chunks = self._select(q)
        size = self.options.chunk_size
        tokens = (chunks[..., None] * size + torch.arange(size)).flatten(1)
        index = tokens[..., None].expand(-1, -1, q.shape[-1])
        keys = torch.cat((self.keys.gather(1, index), self.keys[:, self.sealed :]), 1)
        values = torch.cat((self.values.gather(1, index), self.values[:, self.sealed :]), 1)
        if not self.options.mean_values:
            return _attend(q, keys, values)
        block = self.options.block_size
        means = self.values[:, : self.sealed].unflatten(1, (-1, block)).mean(2).repeat_interleave(block // size, 1)
        counts = torch.full(self.landmarks.shape[:2], math.log(size)).scatter(1, chunks, -torch.inf)
        counts = torch.cat((torch.zeros(keys.shape[:2]), counts), 1)
        return _attend(q, torch.cat((keys, self.landmarks), 1), torch.cat((values, means), 1), counts)

    def _select(self, q: Tensor) -> Tensor:
        """The best chunks of each KV head, [G, budget / chunk_size]."""
        num_heads = self.landmarks.shape[0]
        scores = q.float().view(num_heads, -1, q.shape[-1]) @ self.landmarks.transpose(-1, -2)
        weights = (scores * q.shape[-1] ** -0.5).softmax(-1).amax(1)
        if self.options.random_selection:
            weights = torch.rand_like(weights)
        k = min(self.options.budget // self.options.chunk_size, weights.shape[-1])
        return weights.topk(k, -1).indices


def _attend(q: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Attention of q [H, D]; `counts` [G, T] are logarithms of how often a key counts."""
    groups = q.shape[0] // keys.shape[0]
    keys, values = (x.repeat_interleave(groups, 0).float() for x in (keys, values))
    scores = (q.float()[:, None] @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if counts is not None:
        scores = scores + counts.repeat_interleave(groups, 0)[:, None]
    return (scores.softmax(-1) @ values)[:, 0].to(q.dtype)


def _int8(landmarks: Tensor) -> Tensor:
    """Rounds each landmark [..., D] to int8 with its own scale, and back."""
    scale = landmarks.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    return (landmarks / scale).round() * scale


def _low_rank(k_pre: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` copy of one block's mean-centred keys [G, T, D], heads side by side."""
    rows = k_pre.float().transpose(0, 1).flatten(1)
    mean = rows.mean(0)
    basis = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors[:, -rank:]
    rebuilt = (rows - mean) @ basis @ basis.T + mean
    return rebuilt.unflatten(1, (k_pre.shape[0], -1)).transpose(0, 1).to(k_pre.dtype)
