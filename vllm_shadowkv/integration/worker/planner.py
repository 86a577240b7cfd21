"""Plans a step: vLLM builds the metadata of our three groups one after the other, and the last one completes the plan.

Between steps is also when blocks are sealed (`sealing.py`).

On CUDA a step in which every row decodes one token is planned without reading the device, unless drafts may have
completed a block or a row begins one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_shadowkv.integration.attention.library import AttentionLibrary, DenseBatch
from vllm_shadowkv.integration.worker.bound import Bound
from vllm_shadowkv.integration.worker.geometry import Geometry
from vllm_shadowkv.integration.worker.memory import Memory
from vllm_shadowkv.integration.worker.rows import Row, read_rows
from vllm_shadowkv.integration.worker.sealing import Sealer, Tables
from vllm_shadowkv.integration.worker.step import DecodeBatch, PrefillRow, Step
from vllm_shadowkv.metrics import StepCounts
from vllm_shadowkv.state.decode import DecodeRows


class Planner:
    """Makes steps out of the three groups' metadata."""

    def __init__(self, geometry: Geometry, memory: Memory, attention: AttentionLibrary, counts: StepCounts) -> None:
        """Plans for the layers of a worker.

        Args:
            geometry: with the layers' layout.
            memory: of the layers.
            attention: the library that attends over their exact pages.
            counts: added to.
        """
        self.counts = counts
        self._geometry, self._memory, self._attention = geometry, memory, attention
        self._sealer = Sealer(geometry, counts, knows_pages=not attention.decodes_densely)
        self._step = Step()
        self._parts: dict[str, CommonAttentionMetadata] = {}

    def seal_due(self) -> None:
        """Seals what is due, where no step follows that would."""
        self._sealer.seal_due(self._memory.bind())

    def add(self, group: str, metadata: CommonAttentionMetadata, capturing: bool) -> Step:
        """Takes one group's metadata.

        Returns:
            The step, which the third group's call completes.
        """
        if group in self._parts:  # a step that was given up half way
            self._parts.clear()
        if not self._parts:
            self._step = Step()
        self._parts[group] = metadata
        if len(self._parts) == 3:
            self._complete(self._step, capturing=capturing, **self._parts)
            self._parts.clear()
        return self._step

    def _complete(
        self,
        step: Step,
        shadow: CommonAttentionMetadata,
        exact: CommonAttentionMetadata,
        slots: CommonAttentionMetadata,
        capturing: bool,
    ) -> None:
        bound, count = self._memory.bind(), shadow.num_reqs
        step.num_tokens = exact.num_actual_tokens
        step.slot_mapping = exact.slot_mapping[: step.num_tokens]
        everything = DecodeRows(
            block_table=shadow.block_table_tensor[:count, : self._geometry.boundary.max_sealed_blocks],  # no padding
            exact_table=exact.block_table_tensor[:count],
            slot_table=slots.block_table_tensor[:count, : self._geometry.slot_pages_per_request],
            exact_start=bound.exact_start[:count],
            seq_lens=shadow.seq_lens[:count],
        )
        bound.exact_start.zero_()
        rows = [] if capturing else read_rows(shadow, self._geometry.max_drafts)
        if not capturing:
            opened = self._find_boundary(bound, rows, everything, shadow.query_start_loc[: count + 1])
            self.counts.steps += 1
            bound.slots.step()
            if self._sealer.is_early:
                self._sealer.seal_due(bound)
            # Afterwards, for what was due may have been given away. A row may begin within a block, in a step that does
            # not read its table.
            bound.state.write_open(opened)
        # One way of attending for all rows, and persistent tensors only: what a graph replays.
        attention = self._attention
        uniform = capturing or (attention.decodes_densely and all(row.seq_len - row.computed == 1 for row in rows))
        if not uniform or self._may_seal_or_begin(rows):
            tables = Tables(everything.block_table.cpu(), everything.exact_table.cpu(), everything.slot_table)
            self.counts.table_reads += 1
            rows = self._drop_dummies(rows, tables.exact)
            for row, start in zip(rows, everything.exact_start[[row.index for row in rows]].tolist(), strict=True):
                row.exact_start = start
            self._sealer.seal(bound, rows, tables)
            if attention.reads_unwritten_values and not uniform:
                self._clear_unwritten(bound, rows, tables.exact)
            self._sealer.note_open(bound, rows, tables)
            if self.counts.wants_used_blocks:
                self._count_used(bound, rows, tables.blocks)
        bound.state.start_step()
        written = step.slot_mapping.clamp_min(0) // self._geometry.layout.exact_tokens
        bound.state.write_exact(written.where(step.slot_mapping >= 0, 0))
        step.decode = [DecodeBatch(None, everything)] if uniform else self._decode_batches(rows, everything)
        if step.decode and not capturing:
            reading = step.decode[0].rows
            bound.state.write_slots(reading.slot_table.where(reading.exact_start[:, None] > 0, 0).long())
        if not uniform:
            self._use_resident(bound, rows, everything, tables.blocks)
            self._sort(step, rows, everything, shadow.query_start_loc)

    def _may_seal_or_begin(self, rows: list[Row]) -> bool:
        """Whether a row may have a block to seal, or begins one, in a step of single tokens."""
        size = self._geometry.layout.block_size
        return any(row.computed % size == 0 or self._sealer.may_have_work(row) for row in rows)

    def _find_boundary(self, bound: Bound, rows: list[Row], everything: DecodeRows, starts: Tensor) -> Tensor:
        """Writes every row's exact boundary, 0 for dummy rows, whose table is null.

        Returns:
            The block that each row ends in: int64 `[rows]`, on the device, 0 for dummy rows.
        """
        device, size = starts.device, self._geometry.layout.exact_tokens
        flags = torch.zeros(len(everything.seq_lens), dtype=torch.bool)
        flags[[row.index for row in rows if row.prefilling]] = True
        counts = starts.diff()
        held = everything.exact_table > 0
        last = ((everything.seq_lens - 1) // size).clamp_min(0).long()
        real = (counts > 0) & (everything.seq_lens >= counts) & held.gather(1, last[:, None])[:, 0]
        # The manager pads what a prefix hit brought with null pages.
        hit = held.int().argmax(1) * size
        start = bound.boundary.exact_starts(
            everything.seq_lens - counts, flags.to(device, non_blocking=True), hit.int()
        )
        everything.exact_start.copy_(start.where(real, 0))
        opened = (last * size // self._geometry.layout.block_size).clamp_max(everything.block_table.shape[1] - 1)
        return everything.block_table.gather(1, opened[:, None])[:, 0].where(real, 0).long()

    def _drop_dummies(self, rows: list[Row], exact_table: Tensor) -> list[Row]:
        """The rows without those whose newest token has no page."""
        size = self._geometry.layout.exact_tokens
        return [row for row in rows if exact_table[row.index, (row.seq_len - 1) // size] > 0]

    def _clear_unwritten(self, bound: Bound, rows: list[Row], exact_table: Tensor) -> None:
        """Zeroes the values behind rows' last tokens, in those tokens' pages.

        What an earlier owner left there, read as floats, may be NaN: codes of a sealed block easily are. A page is
        cleared by the step that begins it; or, where it may have been begun by a step that was planned without reading
        its number, by every step in which the library attends for the row.
        """
        size = self._geometry.layout.exact_tokens
        if self._attention.decodes_densely:
            rows = [row for row in rows if row.prefilling or not row.exact_start]
        else:
            rows = [row for row in rows if row.seq_len // size * size >= row.computed]
        rows = [row for row in rows if row.seq_len % size]
        if not rows:
            return
        lengths = torch.tensor([row.seq_len for row in rows])
        pages = exact_table[torch.tensor([row.index for row in rows]), lengths // size].long()
        which, offsets = (torch.arange(size) >= (lengths % size)[:, None]).nonzero().unbind(1)
        device = bound.exact_start.device
        pages, offsets = pages[which].to(device), offsets.to(device)
        for memory in bound.memories.values():
            memory.exact_views[1].transpose(1, 2)[pages, offsets] = 0

    def _use_resident(self, bound: Bound, rows: list[Row], everything: DecodeRows, block_table: Tensor) -> None:
        """Lets prefills begin to read exactly as far before their boundary as exact pages are resident.

        What this step writes was noted before, so that such a page stays as it is during the step.
        """
        rows = [row for row in rows if row.prefilling and row.exact_start]
        size = self._geometry.layout.block_size
        if not rows or not self._geometry.has_resident_pages:
            return
        per_block = size // self._geometry.layout.exact_tokens
        counts = [row.exact_start // size for row in rows]
        blocks = torch.cat([block_table[row.index, :count] for row, count in zip(rows, counts, strict=True)])
        pages = bound.state.resident(blocks.long().to(bound.exact_start.device))
        whole = (pages > 0).all(1).cpu()
        for row, count, of_row, intact in zip(rows, counts, pages.split(counts), whole.split(counts), strict=True):
            lost = (~intact).nonzero().flatten().tolist()
            first = lost[-1] + 1 if lost else 0
            if first < count:
                self.counts.resident_tokens += row.exact_start - first * size
                row.exact_row = everything.exact_table[row.index].clone()
                row.exact_row[first * per_block : count * per_block] = of_row[first:].flatten()
                row.exact_start = first * size

    def _count_used(self, bound: Bound, rows: list[Row], block_table: Tensor) -> None:
        """Counts the sealed blocks of the step's requests."""
        size = self._geometry.layout.block_size
        blocks = [block_table[row.index, : row.computed // size] for row in rows]
        self.counts.used_blocks = int(bound.state.sealed[torch.cat(blocks).unique().long()].sum()) if blocks else 0
        self.counts.wants_used_blocks = False

    def _sort(self, step: Step, rows: list[Row], everything: DecodeRows, query_start_loc: Tensor) -> None:
        """Puts each row that does not decode over sealed blocks where it attends."""
        dense = [row for row in rows if not row.exact_start]
        if dense:
            step.dense = self._dense_batch(
                dense, all_rows=len(dense) == len(everything.seq_lens), of=everything, starts=query_start_loc
            )
        step.prefills = [
            PrefillRow(
                row.tokens,
                everything.block_table[row.index],
                everything.exact_table[row.index] if row.exact_row is None else row.exact_row,
                row.exact_start,
                row.seq_len,
            )
            for row in rows
            if row.exact_start and row.prefilling
        ]
        self.counts.sealed_prefills += len(step.prefills)
        self.counts.expanded_tokens += sum(row.exact_start for row in step.prefills)

    def _decode_batches(self, rows: list[Row], everything: DecodeRows) -> list[DecodeBatch]:
        """The rows that decode over sealed blocks, token by token."""
        rows = [row for row in rows if row.exact_start and not row.prefilling]
        most = max((row.seq_len - row.computed for row in rows), default=0)
        return [self._decode_batch(rows, number, everything) for number in range(most)]

    def _decode_batch(self, rows: list[Row], number: int, everything: DecodeRows) -> DecodeBatch:
        """Token `number` of those rows that have so many: the first is certain, the others are drafts to verify."""
        rows = [row for row in rows if row.seq_len - row.computed > number]
        device = everything.seq_lens.device
        index = torch.tensor([row.index for row in rows], device=device)
        tokens = torch.tensor([row.tokens.start + number for row in rows], device=device)
        lengths = torch.tensor([row.computed + number + 1 for row in rows], dtype=torch.int32, device=device)
        batch = DecodeRows(
            block_table=everything.block_table[index],
            exact_table=everything.exact_table[index],
            slot_table=everything.slot_table[index],
            exact_start=everything.exact_start[index],
            seq_lens=lengths,
        )
        if not (batch.slot_table > 0).all():
            raise RuntimeError(
                "shadowkv: a row attends to sealed blocks but has no slots; this is a bug, please report it."
            )
        return DecodeBatch(tokens, batch)

    def _dense_batch(self, rows: list[Row], all_rows: bool, of: DecodeRows, starts: Tensor) -> DenseBatch:
        device = starts.device
        extended = [(place, row.exact_row) for place, row in enumerate(rows) if row.exact_row is not None]
        if all_rows:
            tokens, seq_lens = None, of.seq_lens
            table = of.exact_table.clone() if extended else of.exact_table
        else:
            index = torch.tensor([row.index for row in rows], device=device)
            tokens = torch.cat([torch.arange(row.tokens.start, row.tokens.stop) for row in rows]).to(device)
            lengths = torch.tensor([0] + [row.tokens.stop - row.tokens.start for row in rows])
            starts = lengths.cumsum(0).to(device, starts.dtype)
            seq_lens, table = of.seq_lens[index], of.exact_table[index]
        for place, exact_row in extended:
            table[place] = exact_row
        batch = DenseBatch(
            tokens,
            starts[: len(seq_lens) + 1],
            seq_lens,
            table,
            max_query_len=max(row.tokens.stop - row.tokens.start for row in rows),
            max_seq_len=max(row.seq_len for row in rows),
        )
        batch.plan = self._attention.plan(batch)
        return batch
