"""Where blocks are sealed: between steps, every block that an earlier step completed and that is not sealed yet.

What a step completes of prompts is noted with its exact pages, and sealed before the next forward pass whoever is in
that step: the owner may have finished, or been aborted or preempted. Its pages may have been given away by then, but
nothing is written to them before that pass. Other blocks are sealed when their owner goes on.

Who may free the exact pages that it was sealed from, and when, is `scheduler/managers.py`'s.
"""

from __future__ import annotations

import logging
from concurrent.futures import wait

import torch
from torch import Tensor

from vllm_shadowkv.integration.worker.bound import Bound
from vllm_shadowkv.integration.worker.geometry import Geometry
from vllm_shadowkv.integration.worker.rows import Row
from vllm_shadowkv.metrics import StepCounts
from vllm_shadowkv.state.completed import CompletedBlocks
from vllm_shadowkv.state.seal import seal_blocks

logger = logging.getLogger("vllm.shadowkv")


class Sealer:
    """Seals the blocks of a step's rows, and keeps in mind what this step completes."""

    def __init__(self, geometry: Geometry, counts: StepCounts) -> None:
        """Seals blocks of the layers of a worker; `counts` is added to."""
        self._layout, self._max_drafts, self._counts = geometry.layout, geometry.max_drafts, counts
        self._zeroed = geometry.pages_are_zeroed  # before a step is planned, so pages that are given away are lost
        self._keep_sources = geometry.has_resident_pages
        self._completed = CompletedBlocks()

    def may_have_work(self, row: Row) -> bool:
        """Whether a row may have a block to seal, in a step of single tokens; told without reading its block table."""
        return self._completed.may_have(row.computed, self._max_drafts)

    def seal_due(self, bound: Bound) -> None:
        """Seals what the step before has completed of prompts, all layers, without reading a table."""
        self._seal(bound, bound.due)
        bound.due.clear()

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
        missing: set[int] = set()
        # A row may have hit what another one computes only in this step.
        open_blocks = {block for row in rows for block in self._open_blocks(row, block_table).tolist()}
        sealed = bound.state.sealed.cpu()
        for row in rows:
            blocks = block_table[row.index, : row.computed // layout.block_size].long()
            for place in (~sealed[blocks] & (blocks > 0)).nonzero().flatten().tolist():
                block = int(blocks[place])
                exact_ids = exact_table[row.index, place * pages : (place + 1) * pages]
                if block not in open_blocks and (exact_ids > 0).all():
                    found[block] = (exact_ids, place * layout.block_size)
                else:
                    missing.add(block)
        # A row may have hit what another one, which has the pages, seals in this step.
        for block in missing - open_blocks - found.keys():
            raise RuntimeError(
                f"shadowkv: block {block} is complete and not sealed, but its exact pages are gone; this is a bug, "
                "please report it."
            )
        self._seal(bound, found)

    def _seal(self, bound: Bound, found: dict[int, tuple[Tensor, int]]) -> None:
        """Seals blocks, each with its exact pages and its first position."""
        if not found:
            return
        layout = self._layout
        device = bound.exact_start.device
        for reading in [bound.reading.pop(block) for block in found.keys() & bound.reading.keys()]:
            if not reading.cancel():  # it has begun
                wait([reading])
        block_ids = torch.tensor(list(found), dtype=torch.int32, device=device)
        exact_ids = torch.stack([ids for ids, _ in found.values()]).to(device)
        first_positions = torch.tensor([first for _, first in found.values()], dtype=torch.int32)
        seal_blocks(list(bound.memories.values()), block_ids, exact_ids, first_positions)
        bound.state.seal(torch.tensor(list(found)), exact_ids if self._keep_sources else None)
        self._counts.sealed_blocks += len(found)
        self._completed.drop(found)
        logger.debug("shadowkv: sealed %d blocks, %d tokens.", len(found), len(found) * layout.block_size)

    def note_open(self, bound: Bound, rows: list[Row], block_table: Tensor, exact_table: Tensor) -> None:
        """Tells the block state into which blocks this step's forward pass will write; arguments as of `seal`."""
        size = self._layout.block_size
        pages = size // self._layout.exact_tokens
        for row in rows:
            first, blocks = row.computed // size, self._open_blocks(row, block_table)
            bound.state.write_open(blocks)
            self._completed.drop(blocks.tolist())
            if row.seq_len - row.computed == 1:
                continue
            completed = blocks[: row.seq_len // size - first].tolist()
            if self._zeroed or not row.prefilling:  # lost if its owner does not go on; drafts, or not certain yet
                self._completed.add(completed, row.seq_len)
                continue
            for place, block in enumerate(completed, first):
                # A copy: on a CPU the table is vLLM's own, which is another step's by then.
                exact_ids = exact_table[row.index, place * pages : (place + 1) * pages].clone()
                bound.due[block] = (exact_ids, place * size)

    def _open_blocks(self, row: Row, block_table: Tensor) -> Tensor:
        """The blocks into which a row writes in this step: int64, on the host."""
        size = self._layout.block_size
        return block_table[row.index, row.computed // size : (row.seq_len - 1) // size + 1].long()
