"""The whole algorithm in fp32 PyTorch: the oracle of every test, and the explanation. It is slow and obvious.

ShadowKV (arXiv 2410.21465, sections 3 and 4), with three changes that make it a serving system: keys are factorised per
KV-cache block instead of per prompt, factors and landmarks are codes of 8 and 4 bits, and the selected chunks stay in
least-recently-used slots; and three that make it more accurate: keys are weighed by how large queries are in each
channel (docs/adr/0016), a landmark is nearer to those keys of its chunk that are unlike the others (docs/adr/0010), and
the rest, the chunks that are not selected, are estimated from their landmarks and the mean of their block's values
(docs/adr/0008). A function after `seal` is the op of that name.

Read it in the order of a token's life: `factorise`, `landmarks_and_outliers`, `pack_block`, `store_values`; then, once
per decode step, `select_chunks`, `plan_slots`, `fill_slots`, `sparse_attention`; `expand_blocks` is for prefills.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_shadowkv.codes import coefficients_of, quantise, quantise_coefficients, quantise_landmarks, unpack_nibbles
from vllm_shadowkv.config import LOCAL_CHUNKS, SINK_CHUNKS
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.rotary import Rotary, apply

Three = tuple[Tensor, Tensor, Tensor]
COEFFICIENTS = ("coefficients", "tail_coefficients", "tail_steps", "coefficient_scales")
"""Sections of a page, as `quantise_coefficients` returns them."""

# Seal


def factorise(keys: Tensor, rank: int, leading: int, query_scales: Tensor | None = None) -> Three:
    """The best rank-`rank` factors of one block's centred and weighed keys, by a float64 SVD (Eckart-Young).

    Args:
        keys: `[block_size, width]`, pre-RoPE, all KV heads of a token side by side.
        rank: number of basis rows.
        leading: those of them, the strongest, whose coefficients get 8 bits.
        query_scales: `[width]`, how much an error matters in each channel (`query_scales.py`); None: alike.

    Returns:
        mean `[width]`, coefficients `[block_size, rank]` and basis `[rank, width]`, fp32;
        `keys ≈ mean + coefficients @ basis`. Orthogonal matrices have mixed the leading directions and the others, so
        that none stands out among its kind, and then the largest element of each basis row was scaled to 127: its codes
        need no scale.
    """
    mean = keys.double().mean(0)
    scales = torch.ones_like(mean) if query_scales is None else query_scales.double()
    left, singular, right = torch.linalg.svd((keys.double() - mean) * scales, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    random = (torch.randn(n, n, dtype=torch.float64, generator=generator) for n in (leading, rank - leading))
    mixing = torch.block_diag(*(torch.linalg.qr(square).Q for square in random))
    coefficients = left[:, :rank] * singular[:rank] @ mixing
    basis = mixing.mT @ right[:rank] / scales
    largest = basis.abs().amax(1, keepdim=True) / 127
    return mean.float(), (coefficients * largest.mT).float(), (basis / largest).float()


def landmarks_and_outliers(keys: Tensor, chunk_size: int, outliers: int, query_scales: Tensor | None = None) -> Three:
    """What selection needs to know of a block.

    Args:
        keys: `[block_size, num_kv_heads, head_size]`, post-RoPE.
        chunk_size: tokens per chunk.
        outliers: chunks per KV head to name.
        query_scales: `[num_kv_heads * head_size]`, as in `factorise`.

    Returns:
        Landmarks `[num_kv_heads, chunks, head_size]` fp32, halfway between the mean of a chunk's keys and their mean by
        the fourth power of their weighed distance from that; and the chunks that landmarks describe worst (lowest
        minimum cosine, ties to the lower chunk), worst first: their numbers in the block `[num_kv_heads, outliers]`
        int32 and minimum cosines, fp32.
    """
    chunks = keys.float().unflatten(0, (-1, chunk_size)).permute(2, 0, 1, 3)  # [heads, chunks, chunk_size, head_size]
    mean = chunks.mean(2, keepdim=True)
    scales = torch.ones(()) if query_scales is None else query_scales.view(keys.shape[1], 1, 1, -1)
    squares = ((chunks - mean) * scales).square().sum(-1, keepdim=True)
    largest = squares.amax(2, keepdim=True)
    weights = torch.where((largest > 0) & (largest < torch.inf), squares / largest, 1).square()
    landmarks = (mean.squeeze(2) + (weights * chunks).sum(2) / weights.sum(2)) / 2
    norms = chunks.norm(dim=-1) * landmarks.norm(dim=-1, keepdim=True)
    cosines = ((chunks * landmarks.unsqueeze(2)).sum(-1) / norms.clamp_min(1e-12)).amin(-1)
    worst, ids = cosines.sort(dim=-1, stable=True)
    return landmarks, ids[:, :outliers].int(), worst[:, :outliers]


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
    """Writes blocks' compressed keys to their shadow pages. Arguments: `ops.pack_block`."""
    for i, block in enumerate(block_ids.tolist()):
        if not 0 < block < len(pages):
            continue
        chunked = keys[i].unflatten(0, (-1, layout.chunk_size)).permute(2, 0, 1, 3)
        found = landmarks_and_outliers(keys[i], layout.chunk_size, layout.num_outliers, query_scales)
        landmarks, outlier_ids, cosines = found
        parts = {"outlier_ids": outlier_ids, "outlier_cosines": cosines}
        parts["landmark_mean"] = keys[i].float().where(keys[i].isfinite(), 0).mean(0)
        parts["landmarks"], parts["landmark_scales"] = quantise_landmarks(landmarks, parts["landmark_mean"])
        if layout.rank:
            codes = quantise_coefficients(coefficients[i], layout.leading_rank)
            parts |= dict(zip(COEFFICIENTS, codes, strict=True))
            rows = basis[i].nan_to_num(nan=0.0).clamp(-127, 127).round().to(torch.int8)
            parts["basis"] = rows.unflatten(1, (layout.num_kv_heads, layout.head_size)).transpose(0, 1)
            parts["mean"] = mean[i].view(layout.num_kv_heads, layout.head_size)
            index = outlier_ids.long()[:, :, None, None].expand(-1, -1, *chunked.shape[2:])
            parts["outlier_keys"] = chunked.gather(1, index)
        else:
            parts["exact_keys"] = keys[i].transpose(0, 1)
        for name, part in parts.items():
            layout.view(pages, name)[block] = part


def store_values(
    block_ids: Tensor, exact_ids: Tensor, exact_values: Tensor, pages: Tensor, host_pool: Tensor, layout: PageLayout
) -> None:
    """Copies values from exact pages to the host pool, their mean to the page. Arguments: `ops.store_values`."""
    pool, scales = layout.value_views(host_pool)
    for block, exact in zip(block_ids.tolist(), exact_ids.long(), strict=True):
        usable = 0 < block < min(len(host_pool), len(pages)) and ((exact > 0) & (exact < len(exact_values))).all()
        if not usable:
            continue
        values = exact_values[exact].transpose(0, 1).flatten(1, 2)  # [heads, block_size, head_size]
        layout.view(pages, "mean_values")[block] = values.float().mean(1)
        values = values.unflatten(1, (-1, layout.chunk_size))
        if scales is None:
            pool[block] = values
        else:
            pool[block], scales[block] = quantise(values)


# Rebuild


def rebuild_keys(
    pages: Tensor, block: int, first_position: int, cos_sin: Tensor, is_neox: bool, layout: PageLayout
) -> Tensor:
    """Keys of a sealed block, post-RoPE, `[block_size, num_kv_heads, head_size]` fp32."""
    if not layout.rank:
        return layout.view(pages, "exact_keys")[block].transpose(0, 1).float()
    coefficients = coefficients_of(*(layout.view(pages, name)[block] for name in COEFFICIENTS))
    basis = layout.view(pages, "basis")[block].float()
    keys = torch.einsum("tr,hrd->thd", coefficients, basis) + layout.view(pages, "mean")[block]
    positions = first_position + torch.arange(layout.block_size)
    keys = apply(Rotary(cos_sin if cos_sin.shape[-1] else None, cos_sin.shape[-1], is_neox), keys, positions)
    by_chunk = keys.unflatten(0, (-1, layout.chunk_size)).permute(2, 0, 1, 3)  # a view: writes reach `keys`
    outlier_keys = layout.view(pages, "outlier_keys")[block].float()
    by_chunk[torch.arange(layout.num_kv_heads)[:, None], layout.view(pages, "outlier_ids")[block].long()] = outlier_keys
    return keys


def fetch_values(host_pool: Tensor, block: int, layout: PageLayout) -> Tensor:
    """Values of a sealed block, `[block_size, num_kv_heads, head_size]` fp32."""
    pool, scales = layout.value_views(host_pool)
    values = pool[block].float() if scales is None else pool[block] * scales[block].unsqueeze(-1)
    return values.flatten(1, 2).transpose(0, 1)


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
    """Rebuilds K and reads V of whole blocks. Arguments: `ops.expand_blocks`."""
    for i, (block, first) in enumerate(zip(block_ids.tolist(), first_positions.tolist(), strict=True)):
        if not 0 < block < len(pages):
            keys[i], values[i] = 0, 0
            continue
        keys[i] = rebuild_keys(pages, block, first, cos_sin, is_neox, layout)
        values[i] = fetch_values(host_pool, block, layout)


# Decode


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
) -> None:
    """Picks a decode step's chunks, and estimates attention to the rest. Arguments: `ops.select_chunks`."""
    chunk_ids.fill_(-1)
    rest_values.fill_(0)
    rest_lse.fill_(-torch.inf)
    mean_keys, mean_values = layout.view(pages, "landmark_mean"), layout.view(pages, "mean_values")
    codes, scales = unpack_nibbles(layout.view(pages, "landmarks")), layout.view(pages, "landmark_scales")
    query_codes, query_scales = quantise(query)  # for products with codes; the mean key meets the query as it is
    rounded = query_codes * query_scales.unsqueeze(-1)
    outlier_ids, outlier_cosines = layout.view(pages, "outlier_ids"), layout.view(pages, "outlier_cosines")
    most_outliers = chunk_ids.shape[2] - budget_chunks - SINK_CHUNKS - LOCAL_CHUNKS
    group = query.shape[1] // layout.num_kv_heads
    for row in range(len(query)):
        num_blocks = min(int(exact_start[row]) // layout.block_size, block_table.shape[1])
        if num_blocks <= 0 or int(seq_lens[row]) <= 0:
            continue
        blocks = block_table[row, :num_blocks].long()
        valid = (blocks > 0) & (blocks < len(pages))
        blocks = blocks.where(valid, 0)
        ids = torch.arange(num_blocks * layout.chunks)
        usable = valid.repeat_interleave(layout.chunks)
        newest = (ids + 1) * layout.chunk_size > int(seq_lens[row]) - LOCAL_CHUNKS * layout.chunk_size
        for head in range(layout.num_kv_heads):
            heads = slice(head * group, (head + 1) * group)
            apart = (codes[blocks, head] * scales[blocks, head].unsqueeze(-1)).flatten(0, 1)
            of_means = (query[row, heads].float() @ mean_keys[blocks, head].T).repeat_interleave(layout.chunks, 1)
            logits = scale * (rounded[row, heads] @ apart.T + of_means)
            logits[:, ~usable] = -torch.inf
            scores = logits.softmax(-1).sum(0)
            forced = (ids < SINK_CHUNKS) | newest
            named = (outlier_ids[blocks, head] + torch.arange(num_blocks)[:, None] * layout.chunks)[valid].flatten()
            cosines = outlier_cosines[blocks, head][valid].flatten()
            worst = [chunk for _, chunk in sorted(zip(cosines.tolist(), named.tolist(), strict=True))]
            forced[[chunk for chunk in worst if not forced[chunk]][:most_outliers]] = True
            forced &= usable
            rest = ids[usable & ~forced]
            best = rest[scores[rest].argsort(descending=True, stable=True)[:budget_chunks]]
            chosen = torch.cat((ids[forced], best)).sort().values[: chunk_ids.shape[2]]
            chunk_ids[row, head, : len(chosen)] = chosen.int()
            # The rest: a chunk counts as chunk_size tokens with its landmark as key, its block's mean as value.
            usable_rest = usable.index_fill(0, chosen, False)
            means = mean_values[blocks, head].float().repeat_interleave(layout.chunks, 0)
            for member, of_head in enumerate(logits, head * group):
                left = usable_rest & of_head.isfinite()
                if left.any():
                    rest_lse[row, member] = of_head[left].logsumexp(0) + math.log(layout.chunk_size)
                    rest_values[row, member] = of_head[left].softmax(0) @ means[left]


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
    """Gives every selected chunk a slot: its own, or the least recently used. Arguments: `ops.plan_slots`."""
    slot_ids.fill_(-1)
    misses.fill_(-1)
    num_misses.fill_(0)
    tags, used = layout.view(slot_pages, "slot_tags"), layout.view(slot_pages, "slot_used")
    page_epochs = layout.view(slot_pages, "slot_epoch")
    for row in range(len(chunk_ids)):
        pages = slot_table[row].long()
        if not (chunk_ids[row] >= 0).any() or not ((pages > 0) & (pages < len(slot_pages))).all():
            continue
        for page in pages.tolist():
            if int(page_epochs[page]) != int(epochs[page]):  # the page was something else in between
                tags[page], used[page], page_epochs[page] = 0, 0, int(epochs[page])
        for head in range(layout.num_kv_heads):
            row_tags, row_used = tags[pages, head].flatten(), used[pages, head].flatten()
            missed = []
            for i, chunk in enumerate(chunk_ids[row, head].tolist()):
                tag = _tag(chunk, block_table[row], epochs, layout)
                if tag == 0:
                    continue
                hit = (row_tags == tag).nonzero()
                if len(hit):
                    slot_ids[row, head, i] = hit[0].int()
                    row_used[hit[0]] = int(clock)
                else:
                    missed.append(i)
            hits = int((slot_ids[row, head] >= 0).sum())
            wanted = hits + len(missed)
            oldest = row_used.argsort(stable=True)
            victims = oldest[row_used[oldest] != int(clock)]
            missed = missed[: len(victims)]  # a chunk beyond the slots is left out
            for i, slot in zip(missed, victims.tolist(), strict=False):
                slot_ids[row, head, i] = slot
                row_tags[slot] = _tag(int(chunk_ids[row, head, i]), block_table[row], epochs, layout)
                row_used[slot] = int(clock)
            misses[row, head, : len(missed)] = torch.tensor(missed, dtype=torch.int32)
            num_misses[row, head] = len(missed)
            counts[:2] += torch.tensor([wanted, hits])
            tags[pages, head] = row_tags.unflatten(0, (len(pages), layout.slots_per_page))
            used[pages, head] = row_used.unflatten(0, (len(pages), layout.slots_per_page))


def _tag(chunk: int, block_row: Tensor, epochs: Tensor, layout: PageLayout) -> int:
    """Names a chunk's content for ever, as a block's epoch changes whenever it is sealed anew; 0: no such chunk."""
    column = chunk // layout.chunks
    block = int(block_row[column]) if 0 <= column < len(block_row) else 0
    return int(epochs[block]) * layout.chunks + chunk % layout.chunks if 0 < block < len(epochs) else 0


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
    """Copies, or rebuilds and fetches, the missing chunks' keys and values. Arguments: `ops.fill_slots`."""
    slot_keys, slot_values = layout.view(slot_pages, "slot_keys"), layout.view(slot_pages, "slot_values")
    for row, head in num_misses.nonzero().tolist():
        for i in misses[row, head, : int(num_misses[row, head])].tolist():
            if not 0 <= i < chunk_ids.shape[2]:
                continue
            chunk, slot = int(chunk_ids[row, head, i]), int(slot_ids[row, head, i])
            (index, inside), (column, place) = divmod(chunk, layout.chunks), divmod(slot, layout.slots_per_page)
            if not (0 <= index < block_table.shape[1] and 0 <= column < slot_table.shape[1]):
                continue
            block, page = int(block_table[row, index]), int(slot_table[row, column])
            if not (0 < block < len(pages) and 0 <= page < len(slot_pages)):
                continue
            tokens = slice(inside * layout.chunk_size, (inside + 1) * layout.chunk_size)
            source = int(sources[block, tokens.start // layout.exact_tokens])
            is_resident = 0 < source < len(exact_keys) and bool(epochs[source] < epochs[block])
            if is_resident:
                at = source, head, torch.arange(tokens.start, tokens.stop) % layout.exact_tokens
                keys, values = exact_keys[at], exact_values[at]
            else:
                keys = rebuild_keys(pages, block, index * layout.block_size, cos_sin, is_neox, layout)[tokens, head]
                values = fetch_values(host_pool, block, layout)[tokens, head]
            counts[2 + (not is_resident)] += 1
            slot_keys[page, head, place] = keys.to(layout.dtype)
            slot_values[page, head, place] = values.to(layout.dtype)


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
) -> None:
    """Attends to slots and open tokens, and merges the estimate of the rest. Arguments: `ops.sparse_attention`."""
    slot_keys, slot_values = layout.view(slot_pages, "slot_keys"), layout.view(slot_pages, "slot_values")
    group = query.shape[1] // layout.num_kv_heads
    for row in range(len(query)):
        start, end = max(int(exact_start[row]), 0), min(int(seq_lens[row]), exact_table.shape[1] * layout.exact_tokens)
        tokens = torch.arange(start, max(end, start))
        exact = exact_table[row, tokens // layout.exact_tokens].long()
        tokens, exact = (x[(exact > 0) & (exact < len(exact_keys))] for x in (tokens, exact))
        for head in range(layout.num_kv_heads):
            slots = slot_ids[row, head]
            slots = slots[(slots >= 0) & (slots < slot_table.shape[1] * layout.slots_per_page)].long()
            slot_page, place = slot_table[row, slots // layout.slots_per_page].long(), slots % layout.slots_per_page
            valid = (slot_page > 0) & (slot_page < len(slot_pages))
            in_slots = slot_page[valid], head, place[valid]
            in_pages = exact, head, tokens % layout.exact_tokens
            keys = torch.cat((slot_keys[in_slots].flatten(0, 1), exact_keys[in_pages]))
            values = torch.cat((slot_values[in_slots].flatten(0, 1), exact_values[in_pages]))
            heads = slice(head * group, (head + 1) * group)
            logits = scale * (query[row, heads].float() @ keys.float().T)
            rest = rest_lse[row, heads]
            lse[row, heads] = logits.logsumexp(-1).logaddexp(rest)
            attended = (logits - lse[row, heads, None]).exp() @ values.float()
            estimated = (rest - lse[row, heads]).exp()[:, None] * rest_values[row, heads]
            output[row, heads] = (attended + estimated.where(rest[:, None] > -torch.inf, 0)).to(output.dtype)
