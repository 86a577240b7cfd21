"""One attention layer of vLLM's own backends over a KV cache with synthetic content."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from benchmarks.workload import normal

FP8 = torch.float8_e4m3fn


class Baseline(Protocol):
    """A stock backend's layer.

    Attributes:
        name: for tables.
        kind: the fastest of a kind counts.
    """

    name: str
    kind: str

    def step(self) -> None:
        """Writes one token per request, and attends to everything."""


class _Cpu:
    """CPU_ATTN as `vllm/v1/attention/backends/cpu_attn.py` calls it."""

    kind = "CPU_ATTN"

    def __init__(self, cache: Tensor, heads: int, context: int, batch: int, split_kv: bool) -> None:
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.name = f"CPU_ATTN, split KV {'on' if split_kv else 'off'}"
        self._ops = ops
        _, kv_heads, twice, size = cache.shape
        block = twice // 2
        self._keys, self._values = cache.chunk(2, dim=2)
        self._isa = _get_attn_isa(cache.dtype, block, size)
        if self._isa == "amx":  # Linux gives a process the tiles when it asks; in an engine oneDNN has done so by now
            torch.cpu._init_amx()
        self._starts = torch.arange(batch + 1, dtype=torch.int32)
        self._lengths = torch.full((batch,), context, dtype=torch.int32)
        self._table = block_table(len(cache), batch)
        self._slots = self._table[:, -1].long() * block + (context - 1) % block
        self._query = torch.randn(batch, heads, size).to(cache.dtype)
        self._key, self._value = (torch.randn(batch, kv_heads, size).to(cache.dtype) for _ in range(2))
        self._output = torch.empty_like(self._query)
        self._plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=size,
            seq_lens=self._lengths,
            dtype=cache.dtype,
            query_start_loc=self._starts,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=split_kv,
        )

    def step(self) -> None:
        """See `Baseline`."""
        self._ops.cpu_attn_reshape_and_cache(self._key, self._value, self._keys, self._values, self._slots, self._isa)
        self._ops.cpu_attention_with_kv_cache(
            query=self._query,
            key_cache=self._keys,
            value_cache=self._values,
            output=self._output,
            query_start_loc=self._starts,
            seq_lens=self._lengths,
            scale=self._query.shape[-1] ** -0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self._table,
            softcap=0.0,
            scheduler_metadata=self._plan,
            s_aux=None,
        )


def block_table(num_blocks: int, batch: int) -> Tensor:
    """Blocks that lie anywhere in the cache, int32 `[batch, blocks]`; block 0 is nobody's."""
    order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(2)) + 1
    return order.int().view(batch, -1)


def cpu_baselines(heads: int, kv_heads: int, size: int, context: int, batch: int, dtype: torch.dtype) -> list[Baseline]:
    """CPU_ATTN with its default block size, over one cache, with and without splits of the context."""
    block = 128
    blocks = 1 + batch * -(-context // block)
    cache = normal((blocks, kv_heads, 2 * block, size), dtype, torch.Generator().manual_seed(3))
    return [_Cpu(cache, heads, context, batch, split) for split in (True, False)]


class _Flash:
    """FLASH_ATTN as `vllm/v1/attention/backends/flash_attn.py` calls it."""

    def __init__(
        self, heads: int, kv_heads: int, size: int, context: int, batch: int, dtype: torch.dtype, fp8: bool
    ) -> None:
        from vllm.v1.attention.backends import fa_utils

        self.name = self.kind = "FLASH_ATTN fp8" if fp8 else "FLASH_ATTN"
        self._fa = fa_utils
        self._version = fa_utils.get_flash_attn_version(head_size=size)
        block = 16
        blocks = 1 + batch * -(-context // block)
        stored = FP8 if fp8 else dtype
        cache = normal((blocks, block, 2, kv_heads, size), stored, torch.Generator("cuda").manual_seed(3))
        self._keys, self._values = cache.unbind(2)
        self._cache_dtype = "fp8" if fp8 else "auto"
        self._starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self._lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self._table = block_table(blocks, batch).cuda()
        self._slots = self._table[:, -1].long() * block + (context - 1) % block
        self._query = torch.randn(batch, heads, size, device="cuda").to(FP8 if fp8 else dtype)
        self._key, self._value = (torch.randn(batch, kv_heads, size, device="cuda").to(dtype) for _ in range(2))
        self._output = torch.empty(batch, heads, size, dtype=dtype, device="cuda")
        self._one = torch.ones((), dtype=torch.float32, device="cuda")
        scales = self._one.expand(batch, kv_heads)
        self._scales = {"q_descale": scales, "k_descale": scales, "v_descale": scales} if fp8 else {}
        self._context = context

    def step(self) -> None:
        """See `Baseline`."""
        keys, values = self._keys, self._values
        stored = [x.view(torch.uint8) if x.dtype == FP8 else x for x in (keys, values)]
        self._fa.reshape_and_cache_flash(
            self._key, self._value, *stored, self._slots, self._cache_dtype, self._one, self._one
        )
        self._fa.flash_attn_varlen_func(
            q=self._query,
            k=keys,
            v=values,
            out=self._output,
            cu_seqlens_q=self._starts,
            max_seqlen_q=1,
            seqused_k=self._lengths,
            max_seqlen_k=self._context,
            softmax_scale=self._query.shape[-1] ** -0.5,
            causal=True,
            block_table=self._table,
            fa_version=self._version,
            **self._scales,
        )


def cuda_baselines(
    heads: int, kv_heads: int, size: int, context: int, batch: int, dtype: torch.dtype
) -> list[Baseline]:
    """FLASH_ATTN with a cache in the model's dtype and in fp8 (FlashAttention 3)."""
    return [_Flash(heads, kv_heads, size, context, batch, dtype, fp8) for fp8 in (False, True)]
