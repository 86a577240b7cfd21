"""The plan of a step, and the metadata builders through which vLLM asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

from vllm_shadowkv.integration.other_layers import check_group
from vllm_shadowkv.state.decode import DecodeRows

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_shadowkv.integration.runtime import Runtime


@dataclass
class DenseBatch:
    """Rows that attend to exact pages only: vLLM's own kernel takes them.

    Attributes:
        tokens: their places among the step's tokens, int64; None: all of them.
        query_start_loc: int32 `[rows + 1]`.
        seq_lens: int32 `[rows]`.
        block_table: int32 `[rows, max_pages]`, exact pages.
        max_query_len: most tokens of a row.
        max_seq_len: the longest row, or a bound.
        plan: what the kernel wants planned once per step for all layers.
    """

    tokens: Tensor | None
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    max_query_len: int
    max_seq_len: int
    plan: Any = None


@dataclass
class DecodeBatch:
    """One token each of rows that decode over sealed blocks. `tokens` as in `DenseBatch`."""

    tokens: Tensor | None
    rows: DecodeRows


@dataclass
class PrefillRow:
    """A row that computes several tokens over sealed blocks."""

    tokens: slice
    block_row: Tensor
    exact_row: Tensor
    exact_start: int
    seq_len: int


@dataclass
class Step:
    """The plan of one step: the metadata object of all three groups.

    Attributes:
        num_tokens: tokens of the step, padding included where a graph pads.
        slot_mapping: int64 `[num_tokens]`, place of each token in the exact pages; -1: none.
        dense, decode, prefills: the rows, by how they attend; `decode` in the order of tokens, where a row has several
            that were drafted.
    """

    num_tokens: int = 0
    slot_mapping: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    dense: DenseBatch | None = None
    decode: list[DecodeBatch] = field(default_factory=list)
    prefills: list[PrefillRow] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether no row attends."""
        return self.dense is None and not self.decode and not self.prefills


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
        check_group(layer_names, self.runtime.num_layers)

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
