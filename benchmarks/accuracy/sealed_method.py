"""What vllm_shadowkv keeps of a prompt, with every choice open: the defaults are the page as it is.

A part that is at its default is the reference's own function. `tests/test_accuracy.py` holds this file to the whole of
`vllm_shadowkv.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.accuracy.layers import Layer
from benchmarks.accuracy.view import View, chunked, lowest_cosines, with_exact_chunks
from vllm_shadowkv.codes import coefficients_of, quantise, quantise_coefficients, quantise_landmarks, unpack_nibbles
from vllm_shadowkv.config import LOCAL_CHUNKS, SINK_CHUNKS, ShadowKVConfig
from vllm_shadowkv.page import HEAD_SIZES, RANK_STEP, PageLayout, lay_out, plan_page
from vllm_shadowkv.reference import factorise, landmarks_and_outliers


@dataclass(frozen=True)
class Sealed:
    """A method of our kind.

    Attributes:
        rank: None: what fits the page, with its leading directions; else all coefficients have 8 bits.
        block_size: tokens that share a basis; None: the whole prompt.
        num_outliers: chunks per KV head and block.
        codec: of the factors; "none": exact keys.
        eight_bits: all coefficients have 8 bits, not the leading ones alone; fewer directions fit then.
        centred: factorise what differs from the block's mean key.
        weighed: keys, and their distances in a chunk, by how large queries are in each channel.
        landmark_codec: in 4 bits about the mean key of a block, in int8, or exact, in fp32.
        mean_landmarks: a landmark is the mean of its chunk's keys.
        highest: a chunk's score is the highest of its GQA group, in place of the sum.
        int8_values: with one scale per token; False: as the model has them.
        exact_tokens: newest tokens of the prompt that stay exact (`decode_exact_tokens`).
        rest: chunks that are not attended count by their landmark and a mean value; False: they are left out.
        mean_value_tokens: tokens that share that mean value; None: a block's.
    """

    rank: int | None = None
    block_size: int | None = 1024
    chunk_size: int = 8
    compression: int = 8
    num_outliers: int = 1
    codec: Literal["int8", "bf16", "none"] = "int8"
    eight_bits: bool = False
    centred: bool = True
    weighed: bool = True
    landmark_codec: Literal["4 bits", "int8", "none"] = "4 bits"
    mean_landmarks: bool = False
    highest: bool = False
    int8_values: bool = True
    exact_tokens: int = 0
    rest: bool = True
    mean_value_tokens: int | None = None

    def bytes_per_token(self, layer: Layer) -> float:
        """Device bytes of a page, over its tokens."""
        return layer.keys[0].numel() * 4 / self.compression

    def page(self, layer: Layer) -> PageLayout:
        """What fits."""
        config = ShadowKVConfig(
            block_size=self.block_size or 1024,
            chunk_size=self.chunk_size,  # type: ignore[arg-type]
            compression=self.compression,  # type: ignore[arg-type]
            num_outlier_chunks=self.num_outliers,
            sparse_budget=2048,
        )
        heads, size = layer.keys.shape[1:]
        if size not in HEAD_SIZES:  # only of an encoder: a page of the same width
            heads, size = heads * size // HEAD_SIZES[0], HEAD_SIZES[0]
        page = plan_page(config, heads, size, torch.bfloat16)
        if self.eight_bits:
            pages = (
                lay_out(config, heads, size, torch.bfloat16, rank, rank, page.page_bytes)
                for rank in range(page.rank, 0, -RANK_STEP)
            )
            return next(filter(None, pages))
        return page

    def view(self, layer: Layer) -> View:
        """What the method keeps of the layer's prompt, whose length must be a multiple of the block size."""
        prompt, exact = layer.prompt_tokens, layer.keys[: layer.prompt_tokens]
        block = self.block_size or prompt
        if prompt % block:
            raise ValueError(f"the prompt must be a multiple of {block} tokens, got {prompt}")
        page = self.page(layer)
        rank, leading = (page.rank, page.leading_rank) if self.rank is None else (self.rank, self.rank)
        scales = layer.query_scales if self.weighed else None
        rebuilt = exact
        if self.codec != "none":
            blocks = layer.pre_rope().flatten(1).split(block)
            flat = torch.cat([self._rebuild(keys, min(rank, *keys.shape), leading, scales) for keys in blocks])
            rebuilt = layer.rotated(flat.view_as(exact))

        chunks = chunked(exact, self.chunk_size)
        landmarks = chunks.mean(2)
        if not self.mean_landmarks:
            landmarks = landmarks_and_outliers(exact, self.chunk_size, 0, scales)[0]
        cosines = lowest_cosines(chunks, landmarks).unflatten(1, (-1, block // self.chunk_size))
        worst = cosines.topk(self.num_outliers, largest=False).indices
        forced = torch.zeros_like(cosines, dtype=torch.bool).scatter_(2, worst, True).flatten(1)
        if self.landmark_codec == "int8":
            codes, scales = quantise(landmarks)
            landmarks = codes * scales[..., None]
        elif self.landmark_codec == "4 bits":
            mean_keys = exact.unflatten(0, (-1, block)).mean(1).transpose(0, 1)  # [heads, blocks, head_size]
            codes, scales = quantise_landmarks(landmarks.unflatten(1, (-1, block // self.chunk_size)), mean_keys)
            landmarks = (mean_keys.unsqueeze(2) + unpack_nibbles(codes) * scales[..., None]).flatten(1, 2)
        keys = with_exact_chunks(rebuilt, exact, forced, self.chunk_size)  # no other sealed key is exact
        forced[:, :SINK_CHUNKS] = forced[:, -LOCAL_CHUNKS:] = True
        values = layer.values[:prompt]
        if self.int8_values:
            codes, scales = quantise(values)
            values = codes * scales[..., None]
        if self.exact_tokens:
            keys[-self.exact_tokens :] = exact[-self.exact_tokens :]
            values = torch.cat((values[: -self.exact_tokens], layer.values[prompt - self.exact_tokens : prompt]))
            forced[:, -self.exact_tokens // self.chunk_size :] = True
        scored = torch.ones_like(forced)
        if self.exact_tokens:
            scored[:, -self.exact_tokens // self.chunk_size :] = False  # their landmarks are not sealed yet
        means = None
        if self.rest:
            shared = self.mean_value_tokens or block
            means = layer.values[:prompt].unflatten(0, (-1, shared)).mean(1).bfloat16().float()
        return View(keys, values, landmarks, forced, scored, means, self.highest)

    def _rebuild(self, keys: Tensor, rank: int, leading: int, scales: Tensor | None) -> Tensor:
        # With every key's opposite beside it, the mean is 0 and the directions are those of the keys as they are.
        leading = min(leading, rank)
        mean, coefficients, basis = factorise(keys if self.centred else torch.cat((keys, -keys)), rank, leading, scales)
        coefficients = coefficients[: len(keys)]
        if self.codec == "bf16":
            return mean + coefficients.bfloat16().float() @ basis.bfloat16().float()
        return mean + coefficients_of(*quantise_coefficients(coefficients, leading)) @ basis.round()
