"""Exact attention on CUDA: vLLM's FlashAttention, for exact pages and where sealed blocks join."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.v1.attention.backends import fa_utils

from vllm_shadowkv.integration.attention.cuda import CudaAttention, caches

if TYPE_CHECKING:
    from vllm_shadowkv.integration.attention.library import DenseBatch
    from vllm_shadowkv.page import PageLayout
    from vllm_shadowkv.state.layer import LayerMemory
    from vllm_shadowkv.state.prefill import Partial


class FlashAttention(CudaAttention):
    """An `AttentionLibrary` on CUDA (`vllm/v1/attention/backends/flash_attn.py`)."""

    def __init__(self, layout: PageLayout, device: torch.device) -> None:
        """For layers with these pages.

        Raises:
            ImportError: FlashAttention does not run here.
        """
        self.version = fa_utils.get_flash_attn_version(head_size=layout.head_size)
        if self.version is None or not fa_utils.is_flash_attn_varlen_func_available():
            raise ImportError("vLLM's FlashAttention does not run on this device")
        # From version 3 on it reads whole pages of values; 2 clears what lies beyond a row
        # (https://github.com/Dao-AILab/flash-attention/issues/2374).
        self.reads_unwritten_values = self.version != 2
        super().__init__(device)

    def plan(self, batch: DenseBatch) -> None:
        """Nothing: FlashAttention plans a launch itself."""

    def attend_dense(self, memory: LayerMemory, batch: DenseBatch, query: Tensor, scale: float, output: Tensor) -> None:
        """Causal attention of whole rows over their exact pages; query and output `[tokens, Hq, D]`."""
        keys, values = caches(memory)
        found = fa_utils.flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=batch.max_query_len,
            seqused_k=batch.seq_lens,
            max_seqlen_k=batch.max_seq_len,
            softmax_scale=scale,
            causal=True,
            block_table=batch.block_table,
            return_softmax_lse=memory.sinks is not None,
            fa_version=self.version,
        )
        if memory.sinks is not None:  # only some versions take them
            output.copy_(self.finish(found, memory.sinks))

    def attend_exact(
        self, memory: LayerMemory, query: Tensor, exact_row: Tensor, start: int, end: int, scale: float
    ) -> Partial:
        """See `state.prefill.ExactAttention`."""
        keys, values = caches(memory)
        first = start // memory.layout.exact_tokens
        out, lse = fa_utils.flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_q=_ends(query, len(query)),
            max_seqlen_q=len(query),
            seqused_k=_lengths(query, end - start),
            max_seqlen_k=end - start,
            softmax_scale=scale,
            causal=True,  # aligned at the end: the last query sees the last key
            block_table=exact_row[None, first:],
            return_softmax_lse=True,
            fa_version=self.version,
        )
        return out, lse

    def attend_all(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
        """See `state.prefill.ExactAttention`."""
        out, lse = fa_utils.flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_q=_ends(query, len(query)),
            max_seqlen_q=len(query),
            cu_seqlens_k=_ends(query, len(keys)),
            max_seqlen_k=len(keys),
            softmax_scale=scale,
            causal=False,
            return_softmax_lse=True,
            fa_version=self.version,
        )
        return out, lse


def _ends(like: Tensor, count: int) -> Tensor:
    """`[0, count]` on the device, without waiting for it."""
    return torch.arange(0, count + 1, count, dtype=torch.int32, device=like.device)


def _lengths(like: Tensor, count: int) -> Tensor:
    return torch.full((1,), count, dtype=torch.int32, device=like.device)
