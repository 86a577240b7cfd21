"""The only door to the compiled kernels, `torch.ops.shadowkv`.

Every op writes tensors that the caller passes in and returns nothing; `reference.py` defines what it writes. Shapes use
B rows (requests of a step), N blocks of the pool, P bytes of a page, Hq query heads, Hkv KV heads, D the head size, K
the chunks per row and KV head, C `layout.chunks`, T `layout.exact_tokens`. `float` is float32, float16 or bfloat16, the
layout's dtype; all tensors of a call are on one device. A block id outside (0, N) is invalid; id 0 is vLLM's null
block. An op raises RuntimeError naming the argument, what was expected and what came; empty input is a no-op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_shadowkv import extension
from vllm_shadowkv.page import PageLayout

_ops = extension.load()

ATTENTION_SPLITS = 8
"""Parts into which the CUDA kernel cuts a row's tokens (kSplits in csrc/cuda/include/attention_partials.cuh)."""


def pack_block(
    block_ids: Tensor,
    keys: Tensor,
    query_scales: Tensor,
    mean: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    pages: Tensor,
    layout: PageLayout,
) -> None:
    """Writes blocks' compressed keys to their shadow pages: factors in 8 and 4 bits, landmarks, outliers.

    Args:
        block_ids: int32 `[n]`, where to write; an invalid id is skipped.
        keys: float `[n, block_size, Hkv, D]`, post-RoPE.
        query_scales: fp32 `[Hkv * D]`, how much it matters in each channel that keys differ (`query_scales.py`).
        mean: fp32 `[n, Hkv * D]`, of the pre-RoPE keys.
        coefficients: fp32 `[n, block_size, rank]`.
        basis: fp32 `[n, rank, Hkv * D]`, values from -127 to 127, which are rounded to int8 as they are. These three
            are ignored (and may have no elements) at rank 0.
        pages: uint8 `[N, P]`, written.
        layout: of the pages.
    """
    _ops.pack_block(block_ids, keys, query_scales, mean, coefficients, basis, pages, layout.ints)


def store_values(
    block_ids: Tensor, exact_ids: Tensor, exact_values: Tensor, pages: Tensor, host_pool: Tensor, layout: PageLayout
) -> None:
    """Copies blocks' values from their exact pages to the host pool, and writes their mean to the shadow page.

    Args:
        block_ids: int32 `[n]`, rows of the host pool and pages.
        exact_ids: int32 `[n, block_size / T]`, the blocks' exact pages in token order; a block with an invalid id here
            or in `block_ids` is skipped.
        exact_values: float `[N, Hkv, T, D]`, a view of the pages (`PageLayout.exact_views`), any strides with the last
            1.
        pages: uint8 `[N, P]`; `mean_values` is written: a head's mean over the block's tokens.
        host_pool: uint8 `[N, layout.value_row_bytes]`, written.
        layout: of the pages.
    """
    _ops.store_values(block_ids, exact_ids, exact_values, pages, host_pool, layout.ints)


def select_chunks(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    exact_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    budget_chunks: int,
    layout: PageLayout,
    chunk_ids: Tensor,
    rest_values: Tensor,
    rest_lse: Tensor,
    workspace: Tensor | None = None,
) -> None:
    """Picks the chunks that a decode step attends to (paper, section 4.2), and estimates attention to the rest.

    A chunk's score is its landmark's share in the softmax over all sealed chunks, summed over the query heads of a GQA
    group. Always picked: the first `SINK_CHUNKS`, the chunks that overlap the newest `LOCAL_CHUNKS * chunk_size`
    tokens, and outliers, worst first, as far as `K - budget_chunks - SINK_CHUNKS - LOCAL_CHUNKS` allows; then the best
    `budget_chunks` of the others, ties to the lower id.

    The rest are the sealed chunks that are not in `chunk_ids`. One counts as `chunk_size` tokens whose key is its
    landmark and whose value is the mean of its block's values; one whose logit is not finite counts nothing. A chunk in
    `chunk_ids` for which `plan_slots` then finds no slot is in neither.

    Args:
        query: float `[B, Hq, D]`, post-RoPE; rows may be strided.
        pages: uint8 `[N, P]`, shadow pages.
        block_table: int32 `[B, max_blocks]`; chunks of an invalid block are never picked.
        exact_start: int32 `[B]`, tokens from here on are exact; the blocks below it are sealed. A multiple of
            `block_size`; 0 picks nothing.
        seq_lens: int32 `[B]`, the current token included; 0 picks nothing.
        scale: of the logits.
        budget_chunks: chunks picked by score.
        layout: of the pages.
        chunk_ids: int32 `[B, Hkv, K]`, written: position / chunk_size, ascending, then -1.
        rest_values: fp32 `[B, Hq, D]`, written: attention over the rest; zeros where there is none.
        rest_lse: fp32 `[B, Hq]`, written: log-sum-exp of its scaled logits, a chunk counted `chunk_size` times; -inf
            where there is none.
        workspace: fp32, for a CUDA kernel, overwritten; with fewer than `select_chunks_workspace` values it works on
            some rows at a time. None: allocated for this call.
    """
    if workspace is None:
        size = select_chunks_workspace(layout, query.shape[0], query.shape[1], block_table.shape[1])
        workspace = _workspace(query, size)
    _ops.select_chunks(
        query,
        pages,
        block_table,
        exact_start,
        seq_lens,
        scale,
        budget_chunks,
        layout.ints,
        workspace,
        chunk_ids,
        rest_values,
        rest_lse,
    )


def select_chunks_workspace(layout: PageLayout, rows: int, num_heads: int, max_blocks: int) -> int:
    """Values of fp32 that `select_chunks` needs on CUDA to work on so many rows at once (csrc/cuda/select_chunks.cu).

    Args:
        layout: of the pages.
        rows: rows.
        num_heads: query heads, all KV heads together.
        max_blocks: columns of the block table.
    """
    return rows * max_blocks * (num_heads * (layout.chunks + 2) + layout.num_kv_heads * layout.chunks)


def plan_slots(
    chunk_ids: Tensor,
    block_table: Tensor,
    epochs: Tensor,
    clock: Tensor,
    slot_table: Tensor,
    slot_pages: Tensor,
    layout: PageLayout,
    slot_ids: Tensor,
    misses: Tensor,
    num_misses: Tensor,
    counts: Tensor,
) -> None:
    """Gives every selected chunk a slot: the one that holds it, else the least recently used (ties to the lower slot).

    Args:
        chunk_ids: int32 `[B, Hkv, K]`, from `select_chunks`. A chunk of an invalid block gets no slot, nor does one
            beyond the slots that this step has not used: give a row at least K.
        block_table: int32 `[B, max_blocks]`.
        epochs: int64 `[N]`, positive, changes whenever a block's page is written or sealed; a slot page with another
            epoch than its own block's is empty.
        clock: int64 `[1]`, the step; it grows, and stamps the slots used.
        slot_table: int32 `[B, pages_per_row]`, the slot pages of each row; rows do not share pages. A row with an
            invalid id gets no slots.
        slot_pages: uint8 `[N, P]`; tags, stamps and epochs are written.
        layout: of the pages.
        slot_ids: int32 `[B, Hkv, K]`, written: slot / `slots_per_page` is the column of `slot_table`; -1 for a
            chunk without a slot.
        misses: int32 `[B, Hkv, K]`, written: the places in `chunk_ids` whose slots must be filled, ascending, then -1.
        num_misses: int32 `[B, Hkv]`, written.
        counts: int64 `[4]`, of which the first two are added to: chunks that want a slot, and that were found in one.
    """
    _ops.plan_slots(
        chunk_ids,
        block_table,
        epochs,
        clock,
        slot_table,
        slot_pages,
        layout.ints,
        slot_ids,
        misses,
        num_misses,
        counts,
    )


def fill_slots(
    chunk_ids: Tensor,
    slot_ids: Tensor,
    misses: Tensor,
    num_misses: Tensor,
    pages: Tensor,
    block_table: Tensor,
    host_pool: Tensor,
    cos_sin: Tensor,
    is_neox: bool,
    sources: Tensor,
    epochs: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    slot_table: Tensor,
    slot_pages: Tensor,
    layout: PageLayout,
    counts: Tensor,
) -> None:
    """Rebuilds the missing chunks' keys (low-rank product, mean, RoPE; outliers: copied) and fetches their values.

    Both are copied instead where the exact page that the chunk was sealed from was not written to since.

    Args:
        chunk_ids, slot_ids, misses, num_misses, block_table, slot_table: see `plan_slots`. A miss that names no place,
            chunk, valid block or slot page is skipped; on CUDA also one without rows in `cos_sin`, for which the CPU
            kernel raises.
        pages: uint8 `[N, P]`, shadow pages.
        host_pool: uint8 `[N, layout.value_row_bytes]`.
        cos_sin: fp32 `[max_position, rotary_dim]`, cosines then sines (`rotary.Rotary`); rotary_dim 0: no RoPE.
        is_neox: halves (True) or pairs are rotated.
        sources: int32 `[N, block_size / T]`, the exact pages that a block was sealed from; an invalid id: not known.
        epochs: int64 `[N]`; a source is as it was if its epoch is lower than its block's.
        exact_keys: float `[N, Hkv, T, D]`, a view of the pages (`PageLayout.exact_views`), any strides on the CPU; on
            CUDA the last is 1.
        exact_values: as `exact_keys`, the last stride 1.
        slot_pages: uint8 `[N, P]`; keys and values of the missing slots are written.
        layout: of the pages.
        counts: int64 `[4]`, of which the last two are added to: chunks that were copied from their sources, and others.
    """
    _ops.fill_slots(
        chunk_ids,
        slot_ids,
        misses,
        num_misses,
        pages,
        block_table,
        host_pool,
        cos_sin,
        is_neox,
        sources,
        epochs,
        exact_keys,
        exact_values,
        slot_table,
        slot_pages,
        layout.ints,
        counts,
    )


def sparse_attention(
    query: Tensor,
    slot_ids: Tensor,
    slot_table: Tensor,
    slot_pages: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    exact_table: Tensor,
    exact_start: Tensor,
    seq_lens: Tensor,
    rest_values: Tensor,
    rest_lse: Tensor,
    scale: float,
    layout: PageLayout,
    output: Tensor,
    lse: Tensor,
    workspace: Tensor | None = None,
) -> None:
    """Attention of one token per row over its slots and its exact tokens `[exact_start, seq_len)`, and over the rest.

    Args:
        query: float `[B, Hq, D]`, post-RoPE; rows may be strided.
        slot_ids, slot_table: see `plan_slots`; -1 and invalid ids are skipped.
        slot_pages: uint8 `[N, P]`.
        exact_keys, exact_values: float `[N, Hkv, T, D]`, views of the pages (`PageLayout.exact_views`), any strides.
        exact_table: int32 `[B, max_pages]`, page of token t in column t / T; tokens of an invalid page are skipped.
        exact_start: int32 `[B]`.
        seq_lens: int32 `[B]`, the current token included.
        rest_values: fp32 `[B, Hq, D]`, from `select_chunks`; not read where `rest_lse` is -inf.
        rest_lse: fp32 `[B, Hq]`, from `select_chunks`; -inf: there is no rest, and none is merged.
        scale: of the logits.
        layout: of the pages.
        output: float `[B, Hq, D]`, written; zeros for a row that attends to nothing. Rows may be strided.
        lse: fp32 `[B, Hq]`, written: log-sum-exp of the scaled logits, the rest included; -inf for such a row.
        workspace: as for `select_chunks`; see `sparse_attention_workspace`.
    """
    if workspace is None:
        workspace = _workspace(query, sparse_attention_workspace(layout, query.shape[0], query.shape[1]))
    _ops.sparse_attention(
        query,
        slot_ids,
        slot_table,
        slot_pages,
        exact_keys,
        exact_values,
        exact_table,
        exact_start,
        seq_lens,
        rest_values,
        rest_lse,
        scale,
        layout.ints,
        workspace,
        output,
        lse,
    )


def sparse_attention_workspace(layout: PageLayout, rows: int, num_heads: int) -> int:
    """Values of fp32 that `sparse_attention` needs on CUDA to work on so many rows at once.

    Args:
        layout: of the pages.
        rows: rows.
        num_heads: query heads, all KV heads together.
    """
    return rows * num_heads * ATTENTION_SPLITS * (layout.head_size + 2)


def expand_blocks(
    block_ids: Tensor,
    first_positions: Tensor,
    pages: Tensor,
    host_pool: Tensor,
    cos_sin: Tensor,
    is_neox: bool,
    layout: PageLayout,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Rebuilds K and reads V of whole sealed blocks, for a prefill over sealed context.

    Args:
        block_ids: int32 `[n]`; an invalid id gives zeros.
        first_positions: int32 `[n]`, position of each block's first token; on CUDA a block without rows in `cos_sin`
            gets zeros for keys, for which the CPU kernel raises.
        pages: uint8 `[N, P]`, shadow pages.
        host_pool: uint8 `[N, layout.value_row_bytes]`.
        cos_sin: fp32 `[max_position, rotary_dim]`; see `fill_slots`.
        is_neox: see `fill_slots`.
        layout: of the pages.
        keys: float `[n, block_size, Hkv, D]`, written.
        values: float `[n, block_size, Hkv, D]`, written.
    """
    _ops.expand_blocks(block_ids, first_positions, pages, host_pool, cos_sin, is_neox, layout.ints, keys, values)


def needs_workspace(device: torch.device) -> bool:
    """Whether the device's kernels use a workspace; CPU kernels have scratch memory of their own."""
    return device.type != "cpu"


def _workspace(like: Tensor, size: int) -> Tensor:
    return torch.empty(size if needs_workspace(like.device) else 0, dtype=torch.float32, device=like.device)


def _register_fakes() -> None:
    """Ops write their arguments and return nothing, so a fake has nothing to do."""
    for name in (
        "pack_block",
        "store_values",
        "select_chunks",
        "plan_slots",
        "fill_slots",
        "sparse_attention",
        "expand_blocks",
    ):
        torch.library.register_fake(f"shadowkv::{name}", lambda *args: None)


_register_fakes()
