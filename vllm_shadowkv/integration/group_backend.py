"""What the backends of the three groups tell vLLM alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_shadowkv import extension
from vllm_shadowkv.page import DTYPES, HEAD_SIZES
from vllm_shadowkv.plugin import NAME

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType


class GroupBackend(AttentionBackend):
    """The backend of one of a layer's groups."""

    # Exact pages have another slot mapping than the layer's own group, so the layer writes them itself.
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = list(DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> Any:
        from vllm_shadowkv.integration.worker.impl import ShadowKVImpl

        return ShadowKVImpl

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any: a page is opaque, and is never split into kernel blocks."""
        return [MultipleOf(1)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Each layer's pages lie one after the other."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No: a connector would move device pages without their values in the host pool."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: the builder plans a step from host lengths."""
        return False

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Ampere and later."""
        return tuple(capability) >= extension.LEAST_CAPABILITY
