"""Random but realistic inputs for op tests: pages, host pool, slots and block tables of a layout.

Sealed content is written by the reference (`vllm_shadowkv.reference`), so a test of one kernel does not
lean on another kernel. Everything is on the CPU; seeds come from the caller's generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from vllm_shadowkv import reference
from vllm_shadowkv.config import LOCAL_CHUNKS, SINK_CHUNKS, ShadowKVConfig
from vllm_shadowkv.page import PageLayout, lay_out, plan_page


def make_generator(*seed: Any) -> Generator:
    """A generator whose seed depends on the arguments (their repr), so that every test case differs."""
    text = repr(seed).encode()
    return Generator().manual_seed(int.from_bytes(text, "little") % (2**63 - 25))


DEFAULT_DTYPE = torch.float32


def default_dtype_name() -> str:
    """`DEFAULT_DTYPE` as the ops' messages name it."""
    return {torch.float32: "Float", torch.bfloat16: "BFloat16"}[DEFAULT_DTYPE]


def make_layout(
    num_kv_heads: int = 2,
    head_size: int = 64,
    dtype: torch.dtype | None = None,
    *,
    block_size: int = 256,
    chunk_size: int = 8,
    compression: int = 4,
    rank: int | None = 32,
    leading_rank: int | None = None,
    num_outliers: int = 1,
    exact_keys: bool = False,
    value_int8: bool = False,
) -> PageLayout:
    """A small layout. `exact_keys` is `key_codec` none (rank 0), which needs a low compression.

    In so small a page all coefficients that `rank` caps have 8 bits; `leading_rank` gives the others 4.
    """
    config = ShadowKVConfig(
        block_size=block_size,
        chunk_size=chunk_size,  # type: ignore[arg-type]
        compression=1 if exact_keys else compression,  # type: ignore[arg-type]
        rank=rank,
        num_outlier_chunks=num_outliers,
        key_codec="none" if exact_keys else "int8",
        value_dtype="int8" if value_int8 else "auto",
        sparse_budget=chunk_size,
    )
    layout = plan_page(config, num_kv_heads, head_size, dtype or DEFAULT_DTYPE)
    if leading_rank is None:
        return layout
    finer = lay_out(config, num_kv_heads, head_size, layout.dtype, layout.rank, leading_rank, layout.page_bytes)
    assert finer is not None
    return finer


def exact_keys_layout(*args: Any, **kwargs: Any) -> PageLayout:
    """A layout of rank 0: a page holds the keys as they are, so it needs room for them and the landmarks."""
    return make_layout(*args, exact_keys=True, **kwargs)


def randn(generator: Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=generator).to(dtype)


def randint(generator: Generator, low: int, high: int, *shape: int) -> Tensor:
    """int32 in [low, high)."""
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


def structured_keys(generator: Generator, tokens: int, width: int, directions: int = 12) -> Tensor:
    """fp32 `[tokens, width]` that look like keys: a mean, a few strong directions that drift, noise, outliers."""
    drift = randn(generator, tokens, directions).cumsum(0)
    drift = drift / (torch.arange(1, tokens + 1)[:, None].sqrt() * torch.arange(1, directions + 1).sqrt())
    keys = drift @ randn(generator, directions, width) + randn(generator, width)
    keys = keys + 0.2 * randn(generator, tokens, width)
    strange = torch.rand(tokens, generator=generator) < 0.01
    keys[strange] += 4 * randn(generator, int(strange.sum()), width)
    return keys


def rope_table(positions: int, rotary_dim: int, base: float = 10000.0) -> Tensor:
    """fp32 `[positions, rotary_dim]`: cosines, then sines."""
    frequencies = base ** (-torch.arange(0, rotary_dim, 2) / max(rotary_dim, 1))
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


def garbage_pages(generator: Generator, num_blocks: int, num_bytes: int) -> Tensor:
    """uint8 `[num_blocks, num_bytes]` of random bytes: what nothing has written must not matter."""
    return torch.randint(0, 256, (num_blocks, num_bytes), generator=generator, dtype=torch.uint8)


@dataclass
class Sealed:
    """Blocks that the reference has sealed, at shuffled physical ids, in pages full of garbage otherwise."""

    layout: PageLayout
    pages: Tensor
    """uint8 `[N, P]`."""
    host_pool: Tensor
    """uint8 `[N, value_row_bytes]`."""
    block_table: Tensor
    """int32 `[rows, max_blocks]`; columns beyond a row's blocks hold garbage ids, valid and not."""
    num_blocks: list[int]
    """Sealed blocks of each row."""
    keys: list[Tensor]
    """Per row fp32 `[tokens, Hkv, D]` in the layout's precision: the keys that were packed (post-RoPE)."""
    values: list[Tensor]
    """Per row fp32 `[tokens, Hkv, D]`."""
    free: list[int]
    """Physical ids that nothing uses yet, shuffled."""

    @property
    def exact_start(self) -> Tensor:
        """int32 `[rows]`."""
        return torch.tensor(self.num_blocks, dtype=torch.int32) * self.layout.block_size


def make_sealed(
    generator: Generator,
    layout: PageLayout,
    num_blocks: Sequence[int],
    *,
    spare_ids: int = 8,
    spare_columns: int = 2,
    structured: bool = True,
    exact_factors: bool | None = None,
) -> Sealed:
    """Seals random blocks with the reference.

    Keys are packed without RoPE: `rope_table` and rotation are the caller's business where they matter.

    Args:
        generator: of the random numbers.
        layout: of the pages.
        num_blocks: sealed blocks of each row.
        spare_ids: physical ids left free, e.g. for slot pages and exact pages.
        spare_columns: columns of the block table beyond the longest row.
        structured: keys that look like keys, else white noise.
        exact_factors: the factors are those of the keys (an SVD, slow), else random; default: as `structured`.

    Returns:
        Pages, host pool and block table.
    """
    total = sum(num_blocks) + spare_ids + 1
    pages = garbage_pages(generator, total, layout.page_bytes)
    host_pool = garbage_pages(generator, total, layout.value_row_bytes)
    ids = (torch.randperm(total - 1, generator=generator) + 1).tolist()
    table = randint(generator, -3, total + 3, len(num_blocks), max(num_blocks, default=0) + spare_columns)
    all_keys, all_values = [], []
    exact = structured if exact_factors is None else exact_factors
    for row, count in enumerate(num_blocks):
        mine, ids = ids[:count], ids[count:]
        table[row, :count] = torch.tensor(mine, dtype=torch.int32)
        tokens = count * layout.block_size
        make = structured_keys if structured else randn
        flat = make(generator, tokens, layout.width)
        keys = flat.to(layout.dtype).unflatten(-1, (layout.num_kv_heads, layout.head_size))
        values = randn(generator, tokens, layout.num_kv_heads, layout.head_size, dtype=layout.dtype)
        for i, block in enumerate(mine):
            span = slice(i * layout.block_size, (i + 1) * layout.block_size)
            seal_block(generator, layout, pages, host_pool, block, keys[span], values[span], exact_factors=exact)
        all_keys.append(keys.float())
        all_values.append(values.float())
    return Sealed(layout, pages, host_pool, table, list(num_blocks), all_keys, all_values, ids)


def seal_block(
    generator: Generator,
    layout: PageLayout,
    pages: Tensor,
    host_pool: Tensor,
    block: int,
    keys: Tensor,
    values: Tensor,
    *,
    exact_factors: bool = True,
) -> None:
    """Writes one block with the reference: its shadow page, and its values in the host pool.

    Args:
        generator: of the random factors.
        layout: of the pages.
        pages, host_pool: written.
        block: physical id.
        keys, values: layout's dtype, `[block_size, Hkv, D]`; the factors are those of the keys as given.
        exact_factors: the SVD's factors, else random ones (the op under test does not look at their quality).
    """
    if not layout.rank:
        mean, coefficients, basis = torch.empty(0), torch.empty(1, 0), torch.empty(1, 0)
    elif exact_factors:
        mean, coefficients, basis = reference.factorise(keys.float().flatten(1), layout.rank, layout.leading_rank)
    else:
        mean = randn(generator, layout.width)
        coefficients = randn(generator, layout.block_size, layout.rank)
        basis = 40 * randn(generator, layout.rank, layout.width)
        coefficients = coefficients / (40 * layout.rank**0.5)
    reference.pack_block(
        torch.tensor([block], dtype=torch.int32),
        keys[None],
        torch.ones(layout.width),
        mean[None],
        coefficients[None],
        basis[None],
        pages,
        layout,
    )
    layout.view(pages, "mean_values")[block] = values.float().mean(0)
    pool, scales = layout.value_views(host_pool)
    by_chunk = values.transpose(0, 1).unflatten(1, (-1, layout.chunk_size))
    if scales is None:
        pool[block] = by_chunk
    else:
        pool[block], scales[block] = reference.quantise(by_chunk)


def fill_exact_pages(
    layout: PageLayout,
    pages: Tensor,
    page_ids: Sequence[int],
    keys: Tensor,
    values: Tensor,
    first_token: int = 0,
) -> None:
    """Writes tokens to exact pages through `PageLayout.exact_views`.

    Args:
        layout: of the pages.
        pages: uint8 `[N, P]`, written.
        page_ids: physical id of the page of tokens `[i * T, (i + 1) * T)`; an id outside (0, N) is skipped.
        keys, values: `[tokens, Hkv, D]`.
        first_token: position of the first of them.
    """
    exact_keys, exact_values = layout.exact_views(pages)
    positions = first_token + torch.arange(len(keys))
    page, place = torch.tensor(page_ids)[positions // layout.exact_tokens], positions % layout.exact_tokens
    valid = (page > 0) & (page < len(pages))
    exact_keys[page[valid], :, place[valid]] = keys[valid].to(layout.dtype)
    exact_values[page[valid], :, place[valid]] = values[valid].to(layout.dtype)


def make_slot_table(generator: Generator, free: list[int], rows: int, pages_per_row: int) -> Tensor:
    """int32 `[rows, pages_per_row]`: takes physical ids from the end of `free`, and shuffles them."""
    taken = [free.pop() for _ in range(rows * pages_per_row)]
    order = torch.randperm(len(taken), generator=generator)
    return torch.tensor(taken, dtype=torch.int32)[order].view(rows, pages_per_row)


def fill_slot_pages(generator: Generator, layout: PageLayout, pages: Tensor, slot_table: Tensor) -> None:
    """Writes random keys and values to every slot of the table's pages, and empty tags."""
    ids = slot_table.flatten().long()
    for section in ("slot_keys", "slot_values"):
        view = layout.view(pages, section)
        view[ids] = randn(generator, *view[ids].shape, dtype=layout.dtype)
    for section in ("slot_tags", "slot_used", "slot_epoch"):
        layout.view(pages, section)[ids] = 0


def num_columns(layout: PageLayout, num_blocks: int, budget_chunks: int, outliers: int | None = None) -> int:
    """K of `chunk_ids`: room for the budget, the sink, the local chunks and outliers (default: all of them)."""
    room = num_blocks * layout.num_outliers if outliers is None else outliers
    return budget_chunks + SINK_CHUNKS + LOCAL_CHUNKS + room
