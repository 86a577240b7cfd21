"""What exact attention on CUDA is whatever the library: how exact pages are written, and how parts are merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

if TYPE_CHECKING:
    from vllm_shadowkv.state.layer import LayerMemory
    from vllm_shadowkv.state.prefill import Partial


class CudaAttention:
    """The half of an `AttentionLibrary` that the libraries on CUDA have in common."""

    decodes_densely = True
    """A step of single tokens takes one way for all rows, as a graph does: the decode kernels read exact pages too."""
    reads_unwritten_values = False
    """Multiplies the values behind a row's last token by a weight of 0, which makes NaN of NaN."""

    def __init__(self, device: torch.device) -> None:
        """For layers on a device."""
        self._one = torch.ones((), dtype=torch.float32, device=device)

    def write(self, memory: LayerMemory, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Writes new tokens' keys and values `[tokens, Hkv, D]` to exact pages."""
        keys, values = caches(memory)
        vllm_ops.reshape_and_cache_flash(key, value, keys, values, slot_mapping, "auto", self._one, self._one)

    def merge(self, one: Partial, other: Partial) -> Partial:
        """See `state.prefill.ExactAttention`; a log-sum-exp is `[Hq, T]` here."""
        out, lse = torch.empty_like(one[0]), torch.empty_like(one[1])
        merge_attn_states(out, one[0], one[1], other[0], other[1], lse)
        return out, lse

    def finish(self, merged: Partial, sinks: Tensor | None) -> Tensor:
        """See `state.prefill.ExactAttention`."""
        out, lse = merged
        return out if sinks is None else out * (lse.T - sinks).sigmoid().unsqueeze(-1)


def caches(memory: LayerMemory) -> tuple[Tensor, Tensor]:
    """Exact pages as vLLM's CUDA kernels take them: K and V `[num_blocks, tokens, Hkv, D]`."""
    keys, values = (view.transpose(1, 2) for view in memory.exact_views)
    # One KV head leaves a stride that TMA does not take.
    return canonicalize_singleton_dim_strides(keys), canonicalize_singleton_dim_strides(values)
