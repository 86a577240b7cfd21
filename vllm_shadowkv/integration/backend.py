"""The backend that `--attention-backend shadowkv` names: what vLLM asks about an attention layer's own group."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_shadowkv.integration.group_backend import GroupBackend
from vllm_shadowkv.integration.refusals import check_process
from vllm_shadowkv.integration.specs import ShadowSpec

# Resolving this module is the first thing that happens once the backend is selected.
check_process()


class ShadowKVBackend(GroupBackend):
    """The layer itself: sealed blocks."""

    @classmethod
    def get_impl_cls(cls) -> Any:
        """What makes the layer's forward pass: ours, whose pseudo-layers come with it, or another backend's."""
        from vllm_shadowkv.integration import left_layers, pseudo_layers

        pseudo_layers.attach_to_layers()
        # `vllm/model_executor/layers/attention/chunked_local_attention.py` derives a class of this name.
        return functools.partial(left_layers.make_impl, cls.__name__.startswith("ChunkedLocalAttention_"))

    @staticmethod
    def get_builder_cls() -> Any:
        from vllm_shadowkv.integration.worker.builders import ShadowBuilder

        return ShadowBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Turns vLLM's full-attention spec into the shadow spec; vLLM calls this several times.

        With a spec of one token it asks what a token takes, to pad states beside ours to our pages
        (`vllm/platforms/interface.py`, `_align_hybrid_block_size`).
        """
        if isinstance(spec, ShadowSpec) or not isinstance(spec, FullAttentionSpec):
            return spec
        from vllm_shadowkv.integration.worker.runtime import Runtime

        layers = Runtime.latest().layers
        return layers.token_spec(spec) if spec.block_size == 1 else layers.shadow_spec(spec)
