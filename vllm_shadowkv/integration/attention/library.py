"""What a library that attends over exact pages is to a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from vllm_shadowkv.state.layer import LayerMemory
from vllm_shadowkv.state.prefill import ExactAttention


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


class AttentionLibrary(ExactAttention, Protocol):
    """A library on a platform: it writes exact pages, and attends to them."""

    @property
    def decodes_densely(self) -> bool:
        """Whether a step of single tokens takes one way for all rows: the decode kernels read exact pages too."""

    @property
    def reads_unwritten_values(self) -> bool:
        """Whether it multiplies values behind a row's last token by a weight of 0, which makes NaN of NaN."""

    def write(self, memory: LayerMemory, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Writes new tokens' keys and values `[tokens, Hkv, D]` to exact pages; `slot_mapping` as `Step` has it."""

    def plan(self, batch: DenseBatch) -> Any:
        """What `attend_dense` wants planned, once for all layers."""

    def attend_dense(self, memory: LayerMemory, batch: DenseBatch, query: Tensor, scale: float, output: Tensor) -> None:
        """Causal attention of whole rows over their exact pages; query and output `[tokens, Hq, D]`."""
