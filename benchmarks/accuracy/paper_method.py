"""What ShadowKV's paper does (arXiv 2410.21465, sections 3 and 4, algorithm 1), in the words of our reference.

One truncated SVD over the whole prompt's pre-RoPE keys, all KV heads side by side, not centred, factors in bf16; a
chunk's landmark is the mean of its post-RoPE keys, in bf16, its score the highest of a GQA group; the 48 chunks per KV
head and prompt with the lowest minimum cosine are outliers, kept exact and always attended; so are the last 4 chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.accuracy.layers import Layer
from benchmarks.accuracy.view import View, chunked, lowest_cosines, with_exact_chunks
from vllm_shadowkv.config import LOCAL_CHUNKS


@dataclass(frozen=True)
class Paper:
    """Its settings; no others are tuned per model."""

    rank: int = 160
    num_outliers: int = 48
    chunk_size: int = 8

    def view(self, layer: Layer) -> View:
        """What the method keeps of the layer's prompt."""
        flat = layer.pre_rope().flatten(1)
        left, singular, right = torch.linalg.svd(flat, full_matrices=False)
        coefficients = (left[:, : self.rank] * singular[: self.rank]).bfloat16().float()
        rebuilt = (coefficients @ right[: self.rank].bfloat16().float()).bfloat16().float()
        rebuilt = layer.rotated(rebuilt.view(layer.prompt_tokens, *layer.keys.shape[1:]))

        exact = layer.keys[: layer.prompt_tokens]
        chunks = chunked(exact, self.chunk_size)
        landmarks = chunks.mean(2)
        outliers = lowest_cosines(chunks, landmarks).topk(self.num_outliers, largest=False).indices
        forced = torch.zeros(landmarks.shape[:2], dtype=torch.bool)
        forced[:, -LOCAL_CHUNKS:] = True
        forced.scatter_(1, outliers, True)
        keys = with_exact_chunks(rebuilt, exact, forced, self.chunk_size)
        values = layer.values[: layer.prompt_tokens]
        return View(keys, values, landmarks.bfloat16().float(), forced, ~forced, highest=True)

    def bytes_per_token(self, layer: Layer) -> float:
        """Device bytes of what grows with the prompt: coefficients, landmarks and basis, outlier keys left out.

        Generous, as outlier keys and values take bytes too: at 128K tokens few per token, at 8K a tenth of the whole.
        """
        width = layer.keys[0].numel()
        return 2 * (self.rank + width / self.chunk_size + self.rank * width / layer.prompt_tokens)


SAME_SHARE, SAME_BYTES = "paper, 160 of 1024 dimensions", "paper, as many bytes"


def papers(bytes_per_token: float, layer: Layer) -> dict[str, Paper]:
    """The two that ours is compared with: the published share of the width, and what so many device bytes hold."""
    width = layer.keys[0].numel()
    return {SAME_SHARE: Paper(rank=160 * width // 1024), SAME_BYTES: Paper(rank=rank_at(bytes_per_token, layer))}


def rank_at(bytes_per_token: float, layer: Layer, chunk_size: int = 8) -> int:
    """The rank that the paper's method can have in so many bytes, counted as `Paper.bytes_per_token` does."""
    width = layer.keys[0].numel()
    return int((bytes_per_token / 2 - width / chunk_size) / (1 + width / layer.prompt_tokens))
