"""The pseudo-layers that own the exact pages and the slots of an attention layer, and their backends.

vLLM gives a KV cache to whatever stands in `static_forward_context`; its own indexer caches stand there in the same way
(`vllm/model_executor/models/deepseek_v2.py`). They have no forward pass.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_shadowkv.integration.group_backend import GroupBackend
from vllm_shadowkv.integration.left_layers import give_back
from vllm_shadowkv.integration.refusals import check_module
from vllm_shadowkv.integration.specs import ExactSpec, SlotSpec
from vllm_shadowkv.integration.worker.builders import ExactBuilder, SlotBuilder
from vllm_shadowkv.integration.worker.impl import ShadowKVImpl
from vllm_shadowkv.integration.worker.layers import Layer
from vllm_shadowkv.integration.worker.runtime import Runtime

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ExactGroupBackend(GroupBackend):
    """Of the exact pages."""

    @staticmethod
    def get_builder_cls() -> Any:
        return ExactBuilder


class SlotGroupBackend(GroupBackend):
    """Of the slots."""

    @staticmethod
    def get_builder_cls() -> Any:
        return SlotBuilder


class _PseudoLayer(AttentionLayerBase):
    suffix: str
    backend: type[GroupBackend]

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
        self.runtime.memory.bind_early()

    def get_attn_backend(self) -> Any:
        """The backend of the group."""
        return self.backend

    def _spec_fields(self) -> dict[str, Any]:
        return self.runtime.layers.spec_fields(self._layer())


class ExactPages(_PseudoLayer):
    """Exact pages of one layer."""

    suffix = "exact"
    backend = ExactGroupBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ExactSpec:
        """The spec of the exact group."""
        geometry = self.runtime.geometry
        return ExactSpec(
            block_size=geometry.layout.exact_tokens,
            exact_page_bytes=geometry.layout.page_bytes,
            resident=geometry.has_resident_pages,
            **self._spec_fields(),
        )


class SlotPages(_PseudoLayer):
    """Slots of one layer."""

    suffix = "slots"
    backend = SlotGroupBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SlotSpec:
        """The spec of the slots group. Its block size divides the scheduler's, which is the least common multiple."""
        layout = self.runtime.geometry.layout
        return SlotSpec(
            block_size=layout.block_size,
            slot_page_bytes=layout.page_bytes,
            pages_per_request=self.runtime.geometry.slot_pages_per_request,
            **self._spec_fields(),
        )


@functools.cache
def attach_to_layers() -> None:
    """Gives every attention layer of ours its pseudo-layers, from now on, when it is attached to its parent module."""
    register_module_module_registration_hook(_attach)


def _attach(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Learns an attention layer's name and parent, which vLLM never tells its implementation.

    Raises:
        ValueError: a module that is not supported (`refusals.check_module`).
    """
    attention: Any = module
    give_back(attention)
    impl = getattr(attention, "impl", None)
    if isinstance(impl, ShadowKVImpl) and impl.layer_name is None:
        check_module(attention)
        attention.sliding_window = None  # if there is one, no request exceeds it (refusals.py): full attention's spec
        impl.layer_name = attention.layer_name
        impl.runtime.layers.add(parent, Layer(attention, ExactPages(attention), SlotPages(attention)))
