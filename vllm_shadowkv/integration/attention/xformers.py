"""Exact attention on CUDA where vLLM has no FlashAttention: xformers' memory-efficient attention, row by row."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_shadowkv.integration.attention.cuda import CudaAttention

if TYPE_CHECKING:
    from vllm_shadowkv.integration.attention.library import DenseBatch
    from vllm_shadowkv.page import PageLayout
    from vllm_shadowkv.state.layer import LayerMemory
    from vllm_shadowkv.state.prefill import Partial


class XformersAttention(CudaAttention):
    """An `AttentionLibrary` on CUDA; it gathers a row's exact pages, which costs a copy."""

    def __init__(self, layout: PageLayout, num_heads: int, device: torch.device) -> None:
        """For layers with these pages and `num_heads` query heads.

        Raises:
            RuntimeError: xformers is not installed or does not run here; one sentence.
        """
        try:
            from xformers.ops import fmha
        except ImportError as error:
            raise RuntimeError(
                "shadowkv computes prefills with vLLM's FlashAttention, or xformers where that does not run, and here "
                f"neither does ({error}); pip install 'vllm-shadowkv[xformers]', or use another --attention-backend."
            ) from error
        super().__init__(device)
        self._fmha: Any = fmha
        # What xformers can do depends on the device, the dtype and the head size together: it is asked by trying.
        query, keys = (torch.zeros(1, n, layout.head_size, dtype=layout.dtype, device=device)
                       for n in (num_heads, layout.num_kv_heads))  # fmt: skip
        try:
            self.attend_all(query, keys, keys, 1.0)
        except NotImplementedError as error:
            raise RuntimeError(
                "shadowkv computes prefills with vLLM's FlashAttention or with xformers, and neither does heads of "
                f"{layout.head_size} in {layout.dtype} here (python -m xformers.info); use another --attention-backend."
            ) from error

    def plan(self, batch: DenseBatch) -> list[tuple[int, int, int]]:
        """Each row's first and last query and its length, read from the device once for all layers."""
        starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        return [(first, last, length) for (first, last), length in zip(pairwise(starts), lengths, strict=True)]

    def attend_dense(self, memory: LayerMemory, batch: DenseBatch, query: Tensor, scale: float, output: Tensor) -> None:
        """Causal attention of whole rows over their exact pages; query and output `[tokens, Hq, D]`."""
        for exact_row, (first, last, length) in zip(batch.block_table, batch.plan, strict=True):
            if first < last:
                found = self.attend_exact(memory, query[first:last], exact_row, 0, length, scale)
                output[first:last] = self.finish(found, memory.sinks)

    def attend_exact(
        self, memory: LayerMemory, query: Tensor, exact_row: Tensor, start: int, end: int, scale: float
    ) -> Partial:
        """See `state.prefill.ExactAttention`."""
        keys, values = memory.gather_exact(exact_row, start, end)
        return self._attend(query, keys, values, scale, self._fmha.attn_bias.LowerTriangularFromBottomRightMask())

    def attend_all(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
        """See `state.prefill.ExactAttention`."""
        return self._attend(query, keys, values, scale, None)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Any) -> Partial:
        """Query `[T, Hq, D]`, keys and values `[S, Hkv, D]` as xformers' batch of one with groups of heads."""
        tokens, num_heads, size = query.shape
        num_kv_heads = keys.shape[1]
        shape = (1, -1, num_kv_heads, num_heads // num_kv_heads, size)
        out, lse = self._fmha.memory_efficient_attention_forward_requires_grad(
            query.reshape(shape),
            keys[None, :, :, None].expand(shape),
            values[None, :, :, None].expand(shape),
            attn_bias=mask,
            scale=scale,
        )
        # Some of its kernels pad the log-sum-exp.
        return out.view(tokens, num_heads, size), lse.view(num_heads, -1)[:, :tokens].contiguous()
