"""The metadata builders through which vLLM asks for a step's plan, one per group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

from vllm_shadowkv.integration.model.other_layers import check_group
from vllm_shadowkv.integration.worker.runtime import Runtime
from vllm_shadowkv.integration.worker.step import Step

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


class _Builder(AttentionMetadataBuilder[Step]):
    """One of the three groups' builders."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    group: str

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer: Any = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.runtime: Runtime = layer.impl.runtime
        check_group(layer_names, len(self.runtime.layers))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """The step's plan, complete once the other groups were built too."""
        return self.runtime.planner.add(self.group, common_attn_metadata, capturing=False)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Step:
        """A plan that a graph can replay: one way of attending for all rows, and persistent tensors only."""
        return self.runtime.planner.add(self.group, common_attn_metadata, capturing=True)


class ShadowBuilder(_Builder):
    """Of the layer's own group."""

    group = "shadow"


class ExactBuilder(_Builder):
    """Of the exact pages."""

    group = "exact"


class SlotBuilder(_Builder):
    """Of the slots."""

    group = "slots"
