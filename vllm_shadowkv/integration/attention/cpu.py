"""Exact attention on the CPU: vLLM's own kernel for exact pages, PyTorch's flash attention where sealed blocks join."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm import envs

if TYPE_CHECKING:
    from vllm_shadowkv.integration.attention.library import DenseBatch
    from vllm_shadowkv.page import PageLayout
    from vllm_shadowkv.state.layer import LayerMemory
    from vllm_shadowkv.state.prefill import Partial


class CpuAttention:
    """An `AttentionLibrary` on the CPU (`vllm/v1/attention/backends/cpu_attn.py`)."""

    decodes_densely = False
    """A row that reads exact pages only goes to vLLM's kernel, so that it computes what the stock backend would."""
    reads_unwritten_values = True
    """vLLM's kernel multiplies the values of a page's unwritten tokens by a weight of 0."""

    def __init__(self, layout: PageLayout, num_heads: int) -> None:
        """For layers with `num_heads` query heads."""
        self.layout, self.num_heads = layout, num_heads
        # The variant that stores a head's keys as `[head_size, tokens]`, which sealing reads. vLLM would pick AMX where
        # it can, whose layout of keys is private to it.
        self.isa = "vec" if layout.head_size % 32 == 0 and layout.exact_tokens % 32 == 0 else "vec16"

    def write(self, memory: LayerMemory, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Writes new tokens' keys and values `[tokens, Hkv, D]` to exact pages."""
        key_cache, value_cache = _vllm_caches(memory)
        vllm_ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, self.isa)

    def plan(self, batch: DenseBatch) -> Tensor:
        """What `attend_dense` wants planned, once for all layers."""
        plan: Tensor = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(batch.seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=self.layout.num_kv_heads,
            head_dim=self.layout.head_size,
            seq_lens=batch.seq_lens,
            dtype=self.layout.dtype,
            query_start_loc=batch.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        return plan

    def attend_dense(self, memory: LayerMemory, batch: DenseBatch, query: Tensor, scale: float, output: Tensor) -> None:
        """Causal attention of whole rows over their exact pages; query and output `[tokens, Hq, D]`."""
        key_cache, value_cache = _vllm_caches(memory)
        vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.block_table,
            softcap=0,
            scheduler_metadata=batch.plan,
            s_aux=_sinks_of_kernel(memory.sinks),
        )

    def attend_exact(
        self, memory: LayerMemory, query: Tensor, exact_row: Tensor, start: int, end: int, scale: float
    ) -> Partial:
        """See `state.prefill.ExactAttention`."""
        keys, values = memory.gather_exact(exact_row, start, end)
        context = end - start - len(query)
        new = _flash(query, keys[context:], values[context:], scale, causal=True)
        if not context:
            return new
        return self.merge(new, _flash(query, keys[:context], values[:context], scale, causal=False))

    def attend_all(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
        """See `state.prefill.ExactAttention`."""
        return _flash(query, keys, values, scale, causal=False)

    def merge(self, one: Partial, other: Partial) -> Partial:
        """See `state.prefill.ExactAttention`."""
        lse = torch.logaddexp(one[1], other[1])
        out = one[0] * (one[1] - lse).exp().unsqueeze(-1) + other[0] * (other[1] - lse).exp().unsqueeze(-1)
        return out, lse

    def finish(self, merged: Partial, sinks: Tensor | None) -> Tensor:
        """See `state.prefill.ExactAttention`."""
        out, lse = merged
        return out if sinks is None else out * (lse - sinks).sigmoid().unsqueeze(-1)


def _sinks_of_kernel(sinks: Tensor | None) -> Tensor | None:
    """VLLM's kernel takes them in bfloat16 or float32."""
    return sinks if sinks is None or sinks.dtype == torch.bfloat16 else sinks.float()


def _vllm_caches(memory: LayerMemory) -> tuple[Tensor, Tensor]:
    """Exact pages as vLLM's CPU kernels take them: per head all keys, then all values."""
    layout = memory.layout
    shape = (-1, layout.num_kv_heads, 2 * layout.exact_tokens, layout.head_size)
    keys, values = memory.exact_pages.view(layout.dtype).view(shape).chunk(2, dim=2)
    return keys, values


def _flash(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> Partial:
    """PyTorch's flash attention for the CPU, which also gives the log-sum-exp.

    Args:
        query: `[T, Hq, D]`.
        keys, values: `[S, Hkv, D]`; S = T if causal.
        scale: of the logits.
        causal: token i sees keys up to i.

    Returns:
        Output fp32 `[T, Hq, D]` and log-sum-exp fp32 `[T, Hq]`.
    """
    tokens, num_heads, size = query.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    if causal:  # is_causal numbers the queries, so heads of a group cannot be laid one after the other
        q = query.transpose(0, 1)[None]
        k, v = (x.transpose(0, 1).repeat_interleave(group, 0)[None] for x in (keys, values))
    else:
        q = query.view(tokens, num_kv_heads, group, size).permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, size)
        k, v = (x.transpose(0, 1)[None] for x in (keys, values))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attention(q, k, v, 0.0, causal, scale=scale)
    out = out[0].reshape(num_heads, tokens, size).transpose(0, 1).float()
    return out, lse[0].reshape(num_heads, tokens).transpose(0, 1).float()
