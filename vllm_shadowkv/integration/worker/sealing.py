"""Where blocks are sealed: between steps, every block that an earlier step completed and that is not sealed yet.

Who may free the exact pages that it was sealed from, and when, is `scheduler/managers.py`'s.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from vllm_shadowkv.integration.worker.bound import Bound
from vllm_shadowkv.integration.worker.rows import Row
from vllm_shadowkv.metrics import StepCounts
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.state.completed import CompletedBlocks
from vllm_shadowkv.state.seal import seal_blocks

logger = logging.getLogger("vllm.shadowkv")


class Sealer:
    """Seals the blocks of a step's rows, and keeps in mind what this step completes."""

    def __init__(self, layout: PageLayout, max_drafts: int, counts: StepCounts) -> None:
        """Seals pages of this layout; adds to `counts`."""
        self._layout, self._max_drafts, self._counts = layout, max_drafts, counts
        self._completed = CompletedBlocks()

    def may_have_work(self, row: Row) -> bool:
        """Whether a row may have a block to seal, in a step of single tokens; told without reading its block table."""
        return self._completed.may_have(row.computed, self._max_drafts)

    def seal(self, bound: Bound, rows: list[Row], block_table: Tensor, exact_table: Tensor) -> None:
        """Seals every complete block of these rows that is not sealed, all layers.

        Args:
            bound: the worker's memory.
            rows: real ones.
            block_table: int32 `[rows of the step, max_blocks]`, on the host.
            exact_table: int32 `[rows of the step, max_pages]`, on the host.
        """
        layout = self._layout
        pages = layout.block_size // layout.exact_tokens
        found: dict[int, tuple[Tensor, int]] = {}
        for row in rows:
            blocks = block_table[row.index, : row.computed // layout.block_size].long()
            for place in bound.state.unsealed(blocks).nonzero().flatten().tolist():
                exact_ids = exact_table[row.index, place * pages : (place + 1) * pages]
                if not (exact_ids > 0).all():
                    raise RuntimeError(
                        f"shadowkv: block {int(blocks[place])} is complete and not sealed, but its exact pages are "
                        "gone; this is a bug, please report it."
                    )
                found[int(blocks[place])] = (exact_ids, place * layout.block_size)
        if not found:
            return
        device = bound.exact_start.device
        block_ids = torch.tensor(list(found), dtype=torch.int32, device=device)
        exact_ids = torch.stack([ids for ids, _ in found.values()]).to(device)
        first_positions = torch.tensor([first for _, first in found.values()], dtype=torch.int32)
        for memory in bound.memories.values():
            seal_blocks(memory, block_ids, exact_ids, first_positions)
        bound.state.seal(torch.tensor(list(found)))
        self._counts.sealed_blocks += len(found)
        self._completed.drop(found)
        logger.debug("shadowkv: sealed %d blocks, %d tokens.", len(found), len(found) * layout.block_size)

    def note_open(self, bound: Bound, rows: list[Row], block_table: Tensor) -> None:
        """Tells the block state into which blocks this step's forward pass will write; arguments as of `seal`."""
        size = self._layout.block_size
        for row in rows:
            first, last = row.computed // size, (row.seq_len - 1) // size
            blocks = block_table[row.index, first : last + 1].long()
            bound.state.write_open(blocks)
            self._completed.drop(blocks.tolist())
            if row.seq_len - row.computed > 1:
                self._completed.add(blocks[: row.seq_len // size - first].tolist(), row.seq_len)
