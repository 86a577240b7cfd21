"""The pseudo-layers that own the exact pages and the slots of an attention layer.

vLLM gives a KV cache to whatever stands in `static_forward_context`; its own indexer caches stand there in the same way
(`vllm/model_executor/models/deepseek_v2.py`). They have no forward pass.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_shadowkv.integration.backend import ExactBackend, SlotBackend
from vllm_shadowkv.integration.specs import ExactSpec, SlotSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_shadowkv.integration.runtime import Runtime


class _PseudoLayer(AttentionLayerBase):
    suffix: str
    backend: Any

    def __init__(self, layer: Any) -> None:
        """Stands beside `layer`, a vLLM `Attention` module with our implementation."""
        self.layer_name = f"{layer.layer_name}.{self.suffix}"
        self.num_heads = layer.num_heads
        self.impl = layer.impl
        self.kv_cache = torch.tensor([])
        self._layer = weakref.ref(layer)

    @property
    def runtime(self) -> Runtime:
        """The worker's runtime."""
        runtime: Runtime = self.impl.runtime
        return runtime

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Takes the layer's cache, which may be the last one to come."""
        super().bind_kv_cache(kv_cache)
        self.runtime.bind_early()

    def get_attn_backend(self) -> Any:
        """The backend of the group."""
        return self.backend

    def _spec_fields(self) -> dict[str, Any]:
        return self.runtime.spec_fields(self._layer())


class ExactPages(_PseudoLayer):
    """Exact pages of one layer."""

    suffix = "exact"
    backend = ExactBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ExactSpec:
        """The spec of the exact group."""
        layout = self.runtime.layout
        return ExactSpec(block_size=layout.exact_tokens, exact_page_bytes=layout.page_bytes, **self._spec_fields())


class SlotPages(_PseudoLayer):
    """Slots of one layer."""

    suffix = "slots"
    backend = SlotBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SlotSpec:
        """The spec of the slots group. Its block size divides the scheduler's, which is the least common multiple."""
        layout = self.runtime.layout
        return SlotSpec(
            block_size=layout.block_size,
            slot_page_bytes=layout.page_bytes,
            pages_per_request=self.runtime.slot_pages_per_request,
            **self._spec_fields(),
        )
