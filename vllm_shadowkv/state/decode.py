"""One decode step of one layer: select, plan, fill, attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_shadowkv import ops
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.state.block_state import BlockState
from vllm_shadowkv.state.layer import LayerMemory

MOST_SCRATCH = 64 * 2**20
"""Values of fp32 that the kernels' scratch memory takes at most, unless one row needs more: they work on some rows at a
time."""


@dataclass(frozen=True)
class DecodeRows:
    """The rows of a step that decode one token each. B is their number.

    Attributes:
        block_table: int32 `[B, max_blocks]`, shadow blocks.
        exact_table: int32 `[B, max_pages]`.
        slot_table: int32 `[B, pages_per_request]`.
        exact_start: int32 `[B]`.
        seq_lens: int32 `[B]`, the current token included; 0 for a padding row.
    """

    block_table: Tensor
    exact_table: Tensor
    slot_table: Tensor
    exact_start: Tensor
    seq_lens: Tensor


class DecodeWorkspace:
    """What the decode kernels pass to one another, for the widest step. One layer after the other uses it.

    Attributes:
        budget_chunks: chunks picked by score per KV head.
        columns: most chunks of a KV head, the forced ones included.
    """

    def __init__(
        self,
        config: ShadowKVConfig,
        layout: PageLayout,
        num_heads: int,
        max_rows: int,
        max_blocks: int,
        device: torch.device,
    ):
        """Allocates.

        Args:
            config: the settings.
            layout: of the pages.
            num_heads: query heads.
            max_rows: most rows of a step.
            max_blocks: most sealed blocks of a request.
            device: of the kernels.
        """
        self.budget_chunks = config.budget_chunks
        wanted = config.budget_chunks + config.forced_chunks + config.num_outlier_chunks * max_blocks
        self.columns = min(wanted, config.slot_chunks)
        shape = (max_rows, layout.num_kv_heads, self.columns)
        self._chunk_ids = torch.empty(shape, dtype=torch.int32, device=device)
        self._slot_ids = torch.empty(shape, dtype=torch.int32, device=device)
        self._misses = torch.empty(shape, dtype=torch.int32, device=device)
        self._num_misses = torch.empty(shape[:2], dtype=torch.int32, device=device)
        self._rest_values = torch.empty(max_rows, num_heads, layout.head_size, dtype=torch.float32, device=device)
        self._rest_lse = torch.empty(max_rows, num_heads, dtype=torch.float32, device=device)
        self._lse = torch.empty(max_rows, num_heads, dtype=torch.float32, device=device)
        per_row = (
            ops.select_chunks_workspace(layout, 1, num_heads, max_blocks),
            ops.sparse_attention_workspace(layout, 1, num_heads),
        )
        values = max(min(max(per_row) * max_rows, MOST_SCRATCH), *per_row)
        self._scratch = torch.empty(values if ops.needs_workspace(device) else 0, dtype=torch.float32, device=device)

    def attend(
        self,
        memory: LayerMemory,
        state: BlockState,
        rows: DecodeRows,
        query: Tensor,
        scale: float,
        output: Tensor,
        slot_counts: Tensor,
    ) -> None:
        """Attention of one token per row over its selected chunks, its exact tokens, and the rest as estimated.

        Args:
            memory: the layer.
            state: of the blocks.
            rows: B rows.
            query: float `[B, Hq, D]`, post-RoPE.
            scale: of the logits.
            output: float `[B, Hq, D]`, written.
            slot_counts: int64 `[4]`, added to; see `ops.plan_slots` and `ops.fill_slots`.
        """
        self.select(memory, rows, query, scale)
        self.plan(memory, state, rows, slot_counts)
        self.fill(memory, state, rows, slot_counts)
        self.attend_tokens(memory, rows, query, scale, output)

    def select(self, memory: LayerMemory, rows: DecodeRows, query: Tensor, scale: float) -> None:
        """Picks every row's chunks, and estimates attention to the rest.

        The first of the four parts of `attend`, with the same arguments.
        """
        count = len(query)
        ops.select_chunks(
            query,
            memory.pages,
            rows.block_table,
            rows.exact_start,
            rows.seq_lens,
            scale,
            self.budget_chunks,
            memory.layout,
            self._chunk_ids[:count],
            self._rest_values[:count],
            self._rest_lse[:count],
            self._scratch,
        )

    def plan(self, memory: LayerMemory, state: BlockState, rows: DecodeRows, slot_counts: Tensor) -> None:
        """Finds the picked chunks in the rows' slots, and slots for those that are not there."""
        count = len(rows.seq_lens)
        ops.plan_slots(
            self._chunk_ids[:count],
            rows.block_table,
            state.epochs,
            state.clock,
            rows.slot_table,
            memory.slot_pages,
            memory.layout,
            self._slot_ids[:count],
            self._misses[:count],
            self._num_misses[:count],
            slot_counts,
        )

    def fill(self, memory: LayerMemory, state: BlockState, rows: DecodeRows, slot_counts: Tensor) -> None:
        """Rebuilds keys and fetches values of the chunks that were not in the slots; resident ones it copies."""
        count = len(rows.seq_lens)
        exact_keys, exact_values = memory.exact_views
        ops.fill_slots(
            self._chunk_ids[:count],
            self._slot_ids[:count],
            self._misses[:count],
            self._num_misses[:count],
            memory.pages,
            rows.block_table,
            memory.host_pool,
            memory.cos_sin,
            memory.rotary.is_neox,
            state.sources,
            state.epochs,
            exact_keys,
            exact_values,
            rows.slot_table,
            memory.slot_pages,
            memory.layout,
            slot_counts,
        )

    def attend_tokens(self, memory: LayerMemory, rows: DecodeRows, query: Tensor, scale: float, output: Tensor) -> None:
        """Attends to the picked chunks and the exact tokens, and merges the rest; sinks take their share."""
        count = len(query)
        exact_keys, exact_values = memory.exact_views
        ops.sparse_attention(
            query,
            self._slot_ids[:count],
            rows.slot_table,
            memory.slot_pages,
            exact_keys,
            exact_values,
            rows.exact_table,
            rows.exact_start,
            rows.seq_lens,
            self._rest_values[:count],
            self._rest_lse[:count],
            scale,
            memory.layout,
            output,
            self._lse[:count],
            self._scratch,
        )
        if memory.sinks is not None:
            output.mul_((self._lse[:count] - memory.sinks).sigmoid().unsqueeze(-1))

    def misses(self, count: int) -> int:
        """Chunks that the last plan of `count` rows did not find in the slots. It waits for the device."""
        return int(self._num_misses[:count].sum())
