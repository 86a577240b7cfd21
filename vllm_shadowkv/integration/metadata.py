"""Plans a step: vLLM builds the metadata of our three groups one after the other, and the last one completes the plan.

Between steps is also when blocks are sealed: every block that an earlier step completed and that is not sealed yet.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

from vllm_shadowkv.state.decode import DecodeRows
from vllm_shadowkv.state.seal import seal_blocks

logger = logging.getLogger("vllm.shadowkv")

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_shadowkv.integration.runtime import Bound, Runtime


@dataclass
class DenseBatch:
    """Rows that attend to exact pages only: vLLM's own kernel takes them.

    `tokens` are their places among the step's tokens, int64; None: all of them.
    """

    tokens: Tensor | None
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    scheduler_metadata: Tensor


@dataclass
class DecodeBatch:
    """Rows that decode one token over sealed blocks. `tokens` as in `DenseBatch`."""

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
        dense, decode, prefills: the rows, by how they attend.
    """

    num_tokens: int = 0
    slot_mapping: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    dense: DenseBatch | None = None
    decode: DecodeBatch | None = None
    prefills: list[PrefillRow] = field(default_factory=list)


class _Row:
    """One row of the step, on the host."""

    __slots__ = ("computed", "exact_start", "index", "prefilling", "seq_len", "tokens")

    def __init__(self, index: int, tokens: slice, seq_len: int, prefilling: bool) -> None:
        self.index, self.tokens, self.seq_len, self.prefilling = index, tokens, seq_len, prefilling
        self.computed = seq_len - (tokens.stop - tokens.start)
        self.exact_start = 0


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


class Planner:
    """Makes steps out of the three groups' metadata."""

    def __init__(self, runtime: Runtime) -> None:
        """Plans for the layers of `runtime`."""
        self.runtime = runtime
        self._step = Step()
        self._parts: dict[str, CommonAttentionMetadata] = {}

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
        bound = self.runtime.bind()
        step.num_tokens = exact.num_actual_tokens
        step.slot_mapping = exact.slot_mapping[: step.num_tokens]
        rows = [] if capturing else self._read_rows(bound, shadow, exact)
        bound.exact_start.zero_()
        for row in rows:
            bound.exact_start[row.index] = row.exact_start
        self._seal(bound, rows, shadow.block_table_tensor, exact.block_table_tensor)
        self._clear_new_pages(bound, rows, exact.block_table_tensor)
        self._note_writes(bound, rows, shadow.block_table_tensor, step.slot_mapping)
        count = shadow.num_reqs
        everything = DecodeRows(
            block_table=shadow.block_table_tensor[:count],
            exact_table=exact.block_table_tensor[:count],
            slot_table=slots.block_table_tensor[:count, : self.runtime.slot_pages_per_request],
            exact_start=bound.exact_start[:count],
            seq_lens=shadow.seq_lens[:count],
        )
        if capturing:
            step.decode = DecodeBatch(None, everything)
        else:
            self._sort(step, rows, everything, shadow.query_start_loc)

    def _read_rows(self, bound: Bound, shadow: CommonAttentionMetadata, exact: CommonAttentionMetadata) -> list[_Row]:
        """The rows that compute tokens, with their exact boundary; dummy rows, whose table is null, are left out."""
        starts = shadow.query_start_loc_cpu[: shadow.num_reqs + 1].tolist()
        seq_lens = shadow.seq_lens[: shadow.num_reqs].tolist()
        flags = shadow.is_prefilling
        prefilling = [] if flags is None else flags.tolist()
        rows = []
        size = self.runtime.layout.exact_tokens
        for index, seq_len in enumerate(seq_lens):
            tokens = slice(starts[index], starts[index + 1])
            count = tokens.stop - tokens.start
            if count <= 0 or seq_len < count:
                continue
            held = exact.block_table_tensor[index, : -(-seq_len // size)] > 0
            if not held[-1]:
                continue
            # Several tokens of one request are a prompt's, or those of a resumed request being computed again.
            row = _Row(index, tokens, seq_len, prefilling=count > 1 or (index < len(prefilling) and prefilling[index]))
            hit = int(held.int().argmax()) * size
            row.exact_start = bound.boundary.exact_start(row.computed, row.prefilling, hit)
            rows.append(row)
        return rows

    def _seal(self, bound: Bound, rows: list[_Row], block_table: Tensor, exact_table: Tensor) -> None:
        """Seals every complete block that is not sealed, all layers."""
        layout = self.runtime.layout
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
        block_ids = torch.tensor(list(found), dtype=torch.int32)
        exact_ids = torch.stack([ids for ids, _ in found.values()])
        first_positions = torch.tensor([first for _, first in found.values()], dtype=torch.int32)
        for memory in bound.memories.values():
            seal_blocks(memory, block_ids, exact_ids, first_positions)
        bound.state.seal(block_ids.long())
        logger.debug("shadowkv: sealed %d blocks, %d tokens.", len(found), len(found) * layout.block_size)

    def _clear_new_pages(self, bound: Bound, rows: list[_Row], exact_table: Tensor) -> None:
        """Zeroes the values of pages that this step starts and does not fill.

        vLLM's kernel multiplies the values of a page's unwritten tokens by a weight of 0, and what an earlier owner
        left, read as floats, may be NaN: codes of a sealed block easily are.
        """
        size = self.runtime.layout.exact_tokens
        new = [row for row in rows if row.seq_len % size and row.seq_len // size * size >= row.computed]
        if not new:
            return
        columns = torch.tensor([row.seq_len // size for row in new])
        pages = exact_table[torch.tensor([row.index for row in new]), columns].long()
        for memory in bound.memories.values():
            memory.layout.exact_views(memory.exact_pages)[1][pages] = 0

    def _note_writes(self, bound: Bound, rows: list[_Row], block_table: Tensor, slot_mapping: Tensor) -> None:
        """Tells the block state what this step's forward pass will write."""
        layout, state = self.runtime.layout, bound.state
        state.start_step()
        for row in rows:
            first, last = row.computed // layout.block_size, (row.seq_len - 1) // layout.block_size
            state.write_open(block_table[row.index, first : last + 1].long())
        written = slot_mapping[slot_mapping >= 0] // layout.exact_tokens
        state.write_exact(written.unique())

    def _sort(self, step: Step, rows: list[_Row], everything: DecodeRows, query_start_loc: Tensor) -> None:
        """Puts each row where it attends."""
        dense = [row for row in rows if not row.exact_start]
        decode = [row for row in rows if row.exact_start and not row.prefilling]
        if dense:
            step.dense = self._dense_batch(
                dense, all_rows=len(dense) == len(everything.seq_lens), of=everything, starts=query_start_loc
            )
        if decode:
            index = torch.tensor([row.index for row in decode])
            tokens = torch.tensor([row.tokens.start for row in decode])
            step.decode = DecodeBatch(
                tokens,
                DecodeRows(
                    block_table=everything.block_table[index],
                    exact_table=everything.exact_table[index],
                    slot_table=everything.slot_table[index],
                    exact_start=everything.exact_start[index],
                    seq_lens=everything.seq_lens[index],
                ),
            )
            if not (step.decode.rows.slot_table > 0).all():
                raise RuntimeError(
                    "shadowkv: a row attends to sealed blocks but has no slots; this is a bug, please report it."
                )
        step.prefills = [
            PrefillRow(
                row.tokens,
                everything.block_table[row.index],
                everything.exact_table[row.index],
                row.exact_start,
                row.seq_len,
            )
            for row in rows
            if row.exact_start and row.prefilling
        ]

    def _dense_batch(self, rows: list[_Row], all_rows: bool, of: DecodeRows, starts: Tensor) -> DenseBatch:
        if all_rows:
            tokens, seq_lens, table = None, of.seq_lens, of.exact_table
        else:
            index = torch.tensor([row.index for row in rows])
            tokens = torch.cat([torch.arange(row.tokens.start, row.tokens.stop) for row in rows])
            lengths = torch.tensor([0] + [row.tokens.stop - row.tokens.start for row in rows])
            starts = lengths.cumsum(0).to(starts.dtype)
            seq_lens, table = of.seq_lens[index], of.exact_table[index]
        layout = self.runtime.layout
        metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.runtime.num_heads,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_size,
            seq_lens=seq_lens,
            dtype=layout.dtype,
            query_start_loc=starts[: len(seq_lens) + 1],
            causal=True,
            sliding_window_size=-1,
            isa=cpu_attention_isa(layout.head_size, layout.exact_tokens),
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        return DenseBatch(tokens, starts[: len(seq_lens) + 1], seq_lens, table, metadata)


def cpu_attention_isa(head_size: int, exact_tokens: int) -> str:
    """The variant of vLLM's CPU attention that stores a head's keys as `[head_size, tokens]`, which sealing reads.

    `vllm/v1/attention/backends/cpu_attn.py` would pick AMX where it can, whose layout of keys is private to it.
    """
    return "vec" if head_size % 32 == 0 and exact_tokens % 32 == 0 else "vec16"
