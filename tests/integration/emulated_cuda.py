"""Everything that is CUDA's about the backend, run on the CPU: kernels on emulated threads, attention in PyTorch.

The CUDA planner, `FlashAttention` and `XformersAttention` run as they are; below them stand functions with the
signatures of vLLM's and xformers'.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import cuda_emulation
import torch
from torch import Tensor
from vllm.v1.attention.backends import fa_utils


def install(exact: str) -> None:
    """Makes this process's engines run the CUDA side, with `exact` for exact pages: `flash_attention`, `xformers`."""
    from vllm_shadowkv import ops, page

    page.KEYS_TRANSPOSED_ON = "nowhere"
    cuda_emulation.load()
    ops._ops = torch.ops.shadowkv_emulated
    ops.needs_workspace = lambda device: True
    from vllm_shadowkv.integration.attention import choice

    {"flash_attention": fake_flash_attention, "xformers": fake_xformers}[exact]()
    choice.of_platform = lambda layout, num_heads: choice.of_cuda(layout, num_heads, torch.device("cpu"))


def fake_xformers() -> None:
    """Puts functions where `XformersAttention` finds vLLM's and xformers' on CUDA; FlashAttention is missing here."""
    import fake_xformers

    fake_xformers.install()
    _fake_what_they_share()


def fake_flash_attention() -> None:
    """Puts functions where `FlashAttention` finds vLLM's on CUDA."""
    _fake_what_they_share()
    fa_utils.get_flash_attn_version = lambda head_size: 3
    fa_utils.is_flash_attn_varlen_func_available = lambda: True
    fa_utils.flash_attn_varlen_func = flash_attn_varlen_func


def _fake_what_they_share() -> None:
    from vllm_shadowkv.integration.attention import cuda

    cuda.vllm_ops.reshape_and_cache_flash = reshape_and_cache_flash
    cuda.merge_attn_states = merge_attn_states


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """`vllm/_custom_ops.py`; caches `[num_blocks, tokens, Hkv, D]`, any strides."""
    assert kv_cache_dtype == "auto"
    assert k_scale.item() == v_scale.item() == 1
    places = slot_mapping[slot_mapping >= 0]
    blocks, offsets = places // key_cache.shape[1], places % key_cache.shape[1]
    key_cache[blocks, offsets] = key[: len(slot_mapping)][slot_mapping >= 0]
    value_cache[blocks, offsets] = value[: len(slot_mapping)][slot_mapping >= 0]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    block_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    fa_version: int = 2,
) -> Any:
    """`vllm/vllm_flash_attn/flash_attn_interface.py`: keys of a sequence in pages, or one after the other.

    As version 3 on Hopper, it multiplies all values of a sequence's last page, by a weight of 0 beyond its length.
    """
    assert fa_version == 3
    assert softmax_scale is not None
    assert (block_table is None) == (seqused_k is None) == (cu_seqlens_k is not None)
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[1], len(q))
    starts = cu_seqlens_q.tolist()
    for row, (first, last) in enumerate(pairwise(starts)):
        if seqused_k is not None:
            length = int(seqused_k[row])
            pages = block_table[row, : -(-length // k.shape[1])].long()
            keys, values = (cache[pages].flatten(0, 1) for cache in (k, v))
        else:
            begin, end = cu_seqlens_k[row : row + 2].tolist()
            length, keys, values = end - begin, k[begin:end], v[begin:end]
        assert last - first <= max_seqlen_q
        assert length <= max_seqlen_k
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
        logits = q[first:last].float().transpose(0, 1) @ keys.mT * softmax_scale
        ends = torch.arange(length - (last - first), length) + 1 if causal else torch.tensor(length)
        seen = torch.arange(logits.shape[-1]) < ends.view(-1, 1)
        logits = logits.masked_fill(~seen, -torch.inf)
        out[first:last] = (logits.softmax(-1) @ values).transpose(0, 1).to(out.dtype)
        lse[:, first:last] = logits.logsumexp(-1)
    return (out, lse) if return_softmax_lse else out


def merge_attn_states(
    output: Tensor,
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    output_lse: Tensor | None = None,
) -> None:
    """`vllm/v1/attention/ops/merge_attn_states.py`."""
    lse = torch.logaddexp(prefix_lse, suffix_lse)
    weights = ((part - lse).exp().T.unsqueeze(-1) for part in (prefix_lse, suffix_lse))
    merged = sum(part.float() * weight for part, weight in zip((prefix_output, suffix_output), weights, strict=True))
    output.copy_(merged)
    if output_lse is not None:
        output_lse.copy_(lse)
