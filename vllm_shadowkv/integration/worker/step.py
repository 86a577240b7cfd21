"""The plan of a step: what vLLM calls attention metadata, one object for all three groups and all layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_shadowkv.integration.attention.library import DenseBatch
from vllm_shadowkv.state.decode import DecodeRows


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
    """The plan of one step.

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
