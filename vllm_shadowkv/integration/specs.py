"""The three KV cache specs of a layer. One page has the same bytes in all three, so that vLLM sees one pool of pages.

They are registered with vLLM's `KVCacheSpecRegistry` on import, which also happens where a spec is unpickled
(`vllm/v1/kv_cache_spec_registry.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, CircularBufferSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_shadowkv.state.boundary import ExactBoundary

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _opaque_page(spec: AttentionSpec, page_bytes: int) -> None:
    """Makes the spec's page one cell of `page_bytes` bytes, whatever vLLM would compute from heads and head size."""
    object.__setattr__(spec, "num_head_slots", 1)
    object.__setattr__(spec, "tokens_per_state", spec.block_size)
    object.__setattr__(spec, "state_content_bytes", page_bytes)


def _same(specs: list[Any]) -> Any:
    """The spec of a group. vLLM tries to merge what it is not sure about, and takes an AssertionError for a no."""
    assert all(spec == specs[0] for spec in specs), "the layers' KV cache specs differ"
    return specs[0]


@dataclass(frozen=True, kw_only=True)
class ShadowSpec(FullAttentionSpec):
    """Sealed blocks: `block_size` tokens per page, kept and shared like full attention."""

    shadow_page_bytes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _opaque_page(self, self.shadow_page_bytes)

    @property
    def pages_are_zeroed(self) -> bool:
        """Whether vLLM zeroes the pages that it gives away: the dtype then says so (`other_layers.spec_dtype`)."""
        return self.dtype is torch.uint8

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One group of equal layers."""
        return _same(specs)


@dataclass(frozen=True, kw_only=True)
class ExactSpec(AttentionSpec):
    """Exact pages: `block_size / compression` tokens each, from the exact boundary on.

    `resident`: what is freed is of use until it is given away (`ShadowKVConfig.resident_pages`).
    """

    boundary: ExactBoundary
    exact_page_bytes: int
    resident: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        _opaque_page(self, self.exact_page_bytes)

    @property
    def pages_are_zeroed(self) -> bool:
        """As of `ShadowSpec`."""
        return self.dtype is torch.uint8

    @property
    def prefix_cacheable(self) -> bool:
        """Whether a hit may bring exact pages beside its sealed blocks."""
        return self.resident

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that the longest request may need at least; the prefill window grows into what is free."""
        # Of this length and not of the boundary's: vLLM tries several for --max-model-len auto.
        boundary = self.boundary.of_length(vllm_config.model_config.max_model_len)
        return boundary.max_exact_pages * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One group of equal layers."""
        return _same(specs)


@dataclass(frozen=True, kw_only=True)
class SlotSpec(CircularBufferSpec):
    """Slots: a fixed number of pages per request, from the step in which it may attend to sealed blocks."""

    boundary: ExactBoundary
    pages_per_request: int
    slot_page_bytes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _opaque_page(self, self.slot_page_bytes)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Width of the block table; vLLM's V1 runner also computes a slot mapping, and reads that far."""
        return max(self.pages_per_request, cdiv(max_len, self.block_size))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one request's slots."""
        return self.pages_per_request * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One group of equal layers."""
        return _same(specs)


def _register() -> None:
    from vllm_shadowkv.integration.scheduler.exact import ExactManager
    from vllm_shadowkv.integration.scheduler.managers import ShadowManager, SlotManager

    # The registry fills itself with vLLM's own specs only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ShadowSpec, ShadowManager, uniform_type_base_spec=ShadowSpec)
    KVCacheSpecRegistry.register(ExactSpec, ExactManager, uniform_type_base_spec=ExactSpec)
    KVCacheSpecRegistry.register(SlotSpec, SlotManager, uniform_type_base_spec=SlotSpec)


_register()
