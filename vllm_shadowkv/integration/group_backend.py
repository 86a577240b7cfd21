"""What the backends of the three groups tell vLLM alike."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_shadowkv.integration.refusals import MLA
from vllm_shadowkv.plugin import NAME


class GroupBackend(AttentionBackend):
    """The backend of one of a layer's groups."""

    # Exact pages have another slot mapping than the layer's own group, so the layer writes them itself.
    forward_includes_kv_cache_update = True

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
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Each layer's pages lie one after the other."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def validate_configuration(cls, *, use_mla: bool, use_sparse: bool, **others: Any) -> list[str]:
        """What vLLM's selector asks before it takes a backend; on CUDA, for its CPU platform asks nobody.

        So only what never reaches a layer of ours is refused here. All else is refused by `check_process`,
        `check_engine` and `check_layer`, on every platform and in the same words.

        Raises:
            ValueError: an MLA model.
        """
        if use_mla or use_sparse:
            raise ValueError(MLA)
        return []
