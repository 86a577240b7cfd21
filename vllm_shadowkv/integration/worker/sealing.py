"""Where blocks are sealed: between steps, of what earlier steps have completed.

What a step completes of prompts is noted with its exact pages, and may be sealed whoever is in later steps: the owner
may have finished, or been aborted or preempted. Its pages may have been given away by then, but hold what they did
until a step writes to them. What generated tokens complete is noted when their owner goes on.

On CUDA all of it is sealed before the next step. Where every step reads the block tables, and so knows which pages it
takes, a block waits until a row reads it sealed or one of its exact pages is taken: while the pool has room, requests
below the dense threshold never wait for a seal.

Who may free the exact pages that it was sealed from, and when, is `scheduler/managers.py`'s.
"""

from __future__ import annotations

import logging
from concurrent.futures import wait
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_shadowkv.integration.worker.bound import Bound
from vllm_shadowkv.integration.worker.geometry import Geometry
from vllm_shadowkv.integration.worker.rows import Row
from vllm_shadowkv.metrics import StepCounts
from vllm_shadowkv.state.completed import CompletedBlocks
from vllm_shadowkv.state.seal import seal_blocks

logger = logging.getLogger("vllm.shadowkv")


class Tables(NamedTuple):
    """Block tables of a step: int32 `[rows of the step, ...]` of each group.

    Those of blocks and exact pages are on the host, those of slots where vLLM has them.
    """

    blocks: Tensor
    exact: Tensor
    slots: Tensor


class Sealer:
    """Seals the blocks of a step's rows, and keeps in mind what this step completes.

    Attributes:
        is_early: every block is sealed as soon as it can be, needed or not.
    """

    def __init__(self, geometry: Geometry, counts: StepCounts, knows_pages: bool) -> None:
        """Seals blocks of the layers of a worker.

        Args:
            geometry: of the layers.
            counts: added to.
            knows_pages: every step reads the block tables, and so knows which pages it takes.
        """
        self._layout, self._max_drafts, self._counts = geometry.layout, geometry.max_drafts, counts
        self._zeroed = geometry.pages_are_zeroed  # before a step is planned, so pages that are given away are lost
        self._keep_sources = geometry.has_resident_pages
        self.is_early = not knows_pages or self._zeroed or geometry.saves_blocks
        self._completed = CompletedBlocks()

    def may_have_work(self, row: Row) -> bool:
        """Whether a row may have a block to seal, in a step of single tokens; told without reading its block table."""
        return self._completed.may_have(row.computed, self._max_drafts)

    def seal_due(self, bound: Bound) -> None:
        """Seals all that is due, all layers, without reading a table."""
        self._seal(bound, bound.due.take())

    def seal(self, bound: Bound, rows: list[Row], tables: Tables) -> None:
        """Seals what must be before this step's forward pass, all layers.

        Args:
            bound: the worker's memory.
            rows: real ones, all of the step, with their exact boundaries.
            tables: of the step.
        """
        size, due = self._layout.block_size, bound.due
        pages = size // self._layout.exact_tokens
        # A row may have hit what another one computes only in this step.
        open_blocks = {block for row in rows for block in self._open_blocks(row, tables.blocks).tolist()}
        needed, unsealed = set[int](), set[int]()
        if due and not self.is_early:
            taken = open_blocks | {page for row in rows for page in self._written_pages(row, tables)}
            due.drop(taken)
            needed = due.of_pages(taken)
        sealed = bound.state.sealed.cpu()
        for row in rows:
            blocks = tables.blocks[row.index, : row.computed // size].long()
            for place in (~sealed[blocks] & (blocks > 0)).nonzero().flatten().tolist():
                block = int(blocks[place])
                if block in open_blocks:
                    continue
                exact_ids = tables.exact[row.index, place * pages : (place + 1) * pages]
                if block not in due and (exact_ids > 0).all():
                    due.add(block, exact_ids, place * size)
                unsealed.add(block)
                if place * size < row.exact_start:
                    needed.add(block)
        # A row may have hit what another one has the pages of.
        for block in (block for block in unsealed if block not in due):
            raise RuntimeError(
                f"shadowkv: block {block} is complete and not sealed, but its exact pages are gone; this is a bug, "
                "please report it."
            )
        self._seal(bound, due.take(None if self.is_early else needed))

    def _written_pages(self, row: Row, tables: Tables) -> list[int]:
        """Exact pages that a row writes to in this step, and its slots, if it reads sealed blocks."""
        size = self._layout.exact_tokens
        pages: list[int] = tables.exact[row.index, row.computed // size : -(-row.seq_len // size)].tolist()
        return pages + (tables.slots[row.index].tolist() if row.exact_start else [])

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

    def note_open(self, bound: Bound, rows: list[Row], tables: Tables) -> None:
        """Tells the block state into which blocks this step's forward pass will write; arguments as of `seal`."""
        size = self._layout.block_size
        pages = size // self._layout.exact_tokens
        for row in rows:
            first, blocks = row.computed // size, self._open_blocks(row, tables.blocks)
            bound.state.write_open(blocks)
            self._completed.drop(blocks.tolist())
            if row.seq_len - row.computed == 1:
                continue
            completed = blocks[: row.seq_len // size - first].tolist()
            if self._zeroed or not row.prefilling:  # lost if its owner does not go on; drafts, or not certain yet
                self._completed.add(completed, row.seq_len)
                continue
            for place, block in enumerate(completed, first):
                bound.due.add(block, tables.exact[row.index, place * pages : (place + 1) * pages], place * size)

    def _open_blocks(self, row: Row, block_table: Tensor) -> Tensor:
        """The blocks into which a row writes in this step: int64, on the host."""
        size = self._layout.block_size
        return block_table[row.index, row.computed // size : (row.seq_len - 1) // size + 1].long()
