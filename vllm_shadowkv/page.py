"""The byte layout of a page and of a host pool row: the one place that knows offsets.

A page is one layer's bytes of one block on the device. It has one size and three encodings:

* exact:  K and V of `block_size / compression` tokens, in the layout of vLLM's own attention kernel;
* shadow: the compressed keys of `block_size` tokens, and the mean of their values;
* slots:  rebuilt K and fetched V of selected chunks, with the tags that say which chunks they are.

Kernels receive the layout as the integers of `PageLayout.ints` (`csrc/layout.h` reads them in the same order).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from vllm_shadowkv.config import ShadowKVConfig

ALIGNMENT = 64
"""Bytes; every section of a page starts at a multiple of it."""

ROW_ALIGNMENT = 128
"""Bytes; rows of the host pool are a multiple of it, so that none begins within a line of a GPU."""

HEAD_SIZES = (64, 80, 96, 128, 256)
RANK_STEP = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Model dtypes; a layout stores the index."""

KEYS_TRANSPOSED_ON = "cpu"
"""The device whose exact pages hold a head's keys transposed, as vLLM's kernel there wants them."""

_Section = tuple[int, tuple[int, ...], torch.dtype]  # offset in bytes, shape without the block dimension, dtype


@dataclass(frozen=True)
class PageLayout:
    """Sizes and offsets of one layer's pages. Make it with `plan_page`.

    The fields, in this order, are what kernels read (`ints`). `rank` 0 means `key_codec` none: keys are exact.
    """

    num_kv_heads: int
    head_size: int
    block_size: int
    chunk_size: int
    exact_tokens: int
    """Tokens of an exact page."""
    dtype_index: int
    """Index in `DTYPES` of keys and values."""
    rank: int
    leading_rank: int
    """Directions, of the `rank`, whose coefficients have 8 bits; those of the others have 4."""
    num_outliers: int
    """Outlier chunks per block and KV head."""
    slots_per_page: int
    """Chunks per KV head in a slot page."""
    value_int8: int
    """1: values in the host pool are int8 with one fp32 scale per token; 0: they have the model's dtype."""
    page_bytes: int
    value_record_bytes: int
    """Bytes of one chunk of one KV head in the host pool, its scales not counted, which stand apart: 1,024 of int8 are
    then eight whole lines of 128 bytes, as a GPU's warps read them."""
    # Byte offsets in a shadow page.
    coefficients: int
    tail_coefficients: int
    tail_steps: int
    coefficient_scales: int
    basis: int
    mean: int
    exact_keys: int
    landmarks: int
    landmark_scales: int
    landmark_mean: int
    outlier_ids: int
    outlier_cosines: int
    outlier_keys: int
    mean_values: int
    # Byte offsets in a slot page.
    slot_keys: int
    slot_values: int
    slot_tags: int
    slot_used: int
    slot_epoch: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return DTYPES[self.dtype_index]

    @property
    def chunks(self) -> int:
        """Chunks in a block."""
        return self.block_size // self.chunk_size

    @property
    def width(self) -> int:
        """Key values of one token: `num_kv_heads * head_size`."""
        return self.num_kv_heads * self.head_size

    @property
    def tail_bytes(self) -> int:
        """Bytes of a token's coefficients of 4 bits."""
        return (self.rank - self.leading_rank) // 2

    @property
    def landmark_bytes(self) -> int:
        """Bytes of a landmark, its scale not counted."""
        return self.head_size // 2

    @property
    def value_row_bytes(self) -> int:
        """Bytes of one block's values in the host pool, one layer; a multiple of `ROW_ALIGNMENT`."""
        return self._value_scales + (4 * self.num_kv_heads * self.block_size if self.value_int8 else 0)

    @property
    def value_chunk_bytes(self) -> int:
        """Bytes of one chunk of one KV head that cross the link: its record, and its scales."""
        return self.value_record_bytes + (4 * self.chunk_size if self.value_int8 else 0)

    @property
    def _value_scales(self) -> int:
        """Byte offset in a row of the host pool of what follows the values: their scales, where they are int8."""
        return self.num_kv_heads * self.chunks * self.value_record_bytes

    def slot_pages(self, slot_chunks: int) -> int:
        """Slot pages of a request that keeps `slot_chunks` chunks per KV head."""
        return -(-slot_chunks // self.slots_per_page)

    @cached_property
    def ints(self) -> list[int]:
        """The layout as kernels take it: the fields in their order."""
        return [getattr(self, field.name) for field in fields(self)]

    @cached_property
    def _sections(self) -> dict[str, _Section]:
        sections = {
            name: (getattr(self, name), shape, dtype)
            for name, shape, dtype in (*_shadow_sections(self), *_slot_sections(self, self.slots_per_page))
        }
        sections["slot_epoch"] = (self.slot_epoch, (), torch.int64)
        return sections

    def view(self, pages: Tensor, section: str) -> Tensor:
        """One section of every page.

        Args:
            pages: uint8 `[num_blocks, page_bytes]`, contiguous.
            section: name of an offset field, e.g. `"landmarks"`.

        Returns:
            A view `[num_blocks, *section shape]` in the section's dtype, sharing memory with `pages`.

        Raises:
            KeyError: the layout has no such section.
        """
        offset, shape, dtype = self._sections[section]
        return _strided_view(pages, offset, shape, dtype)

    def has(self, section: str) -> bool:
        """Whether this layout stores the section (`coefficients` and its kin need a rank, `exact_keys` rank 0)."""
        return section in self._sections

    def exact_views(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of every exact page, in the layout of vLLM's attention kernel on the pages' device.

        Args:
            pages: uint8 `[num_blocks, page_bytes]`, contiguous.

        Returns:
            Two views `[num_blocks, num_kv_heads, exact_tokens, head_size]`, sharing memory with `pages`.
            On the CPU a head's keys lie transposed (`cpu_attn_vec` of vLLM: `[head_size, tokens]`, then V row-major);
            on CUDA a token's K and V are adjacent (`FLASH_ATTN`).
        """
        heads, tokens, size = self.num_kv_heads, self.exact_tokens, self.head_size
        if pages.device.type == KEYS_TRANSPOSED_ON:
            split = _strided_view(pages, 0, (heads, 2, tokens * size), self.dtype)
            keys = split[:, :, 0].unflatten(-1, (size, tokens)).transpose(-1, -2)
            return keys, split[:, :, 1].unflatten(-1, (tokens, size))
        both = _strided_view(pages, 0, (heads, tokens, 2 * size), self.dtype)
        return both[..., :size], both[..., size:]

    def value_views(self, host_pool: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (and their scales) of every block in the host pool.

        Args:
            host_pool: uint8 `[num_blocks, value_row_bytes]`, contiguous.

        Returns:
            Values `[num_blocks, num_kv_heads, chunks, chunk_size, head_size]` in the pool's dtype, and for int8 values
            the fp32 scales `[num_blocks, num_kv_heads, chunks, chunk_size]`, else None. Both share memory.
        """
        chunks = (self.num_kv_heads, self.chunks, self.chunk_size)
        values = (*chunks, self.head_size)
        if not self.value_int8:
            return _strided_view(host_pool, 0, values, self.dtype), None
        return (
            _strided_view(host_pool, 0, values, torch.int8),
            _strided_view(host_pool, self._value_scales, chunks, torch.float32),
        )


def plan_page(config: ShadowKVConfig, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> PageLayout:
    """Lays out a page: the rank is what fits, and then as many of its directions as fit have 8 bits, the others 4.

    Args:
        config: the settings.
        num_kv_heads: KV heads of this rank's shard of the layer.
        head_size: one of `HEAD_SIZES`.
        dtype: of keys and values, one of `DTYPES`.

    Returns:
        The layout.

    Raises:
        ValueError: head size or dtype not supported, or nothing fits the page; the sentence names the way out.
    """
    if head_size not in HEAD_SIZES:
        raise ValueError(
            f"shadowkv supports head sizes {', '.join(map(str, HEAD_SIZES))}, got {head_size}; "
            "use another --attention-backend."
        )
    if dtype not in DTYPES:
        raise ValueError(f"shadowkv supports float32, float16 and bfloat16, got {dtype}; use another --dtype.")
    if num_kv_heads < 1:
        raise ValueError(f"shadowkv needs at least one KV head, got {num_kv_heads}.")
    page_bytes = config.exact_tokens_per_page * 2 * num_kv_heads * head_size * dtype.itemsize
    exact = config.key_codec == "none"
    widest = min(config.rank or 2**31, config.block_size, num_kv_heads * head_size)
    ranks = [0] if exact else range(widest // RANK_STEP * RANK_STEP, 0, -RANK_STEP)
    for rank in ranks:
        layout = lay_out(config, num_kv_heads, head_size, dtype, rank, min(rank, RANK_STEP), page_bytes)
        if layout is None:
            continue
        for leading in range(2 * RANK_STEP, rank + 1, RANK_STEP):
            finer = lay_out(config, num_kv_heads, head_size, dtype, rank, leading, page_bytes)
            layout = finer or layout
        return layout
    what = "exact keys (key_codec none)" if exact else f"keys of rank {RANK_STEP}"
    raise ValueError(
        f"shadowkv: {what}, landmarks and outliers of a block of {config.block_size} tokens do not fit a page of "
        f"{page_bytes} bytes ({num_kv_heads} KV heads of {head_size}); lower compression ({config.compression}) or "
        f"num_outlier_chunks ({config.num_outlier_chunks})."
    )


def lay_out(
    config: ShadowKVConfig,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    rank: int,
    leading_rank: int,
    page_bytes: int,
) -> PageLayout | None:
    """The layout at a rank, or None where it does not fit."""
    names = [field.name for field in fields(PageLayout)]
    values: dict[str, int] = dict.fromkeys(names, 0)
    value_int8 = config.value_dtype == "int8"
    value_bytes = config.chunk_size * head_size * (1 if value_int8 else dtype.itemsize)
    values.update(
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=config.block_size,
        chunk_size=config.chunk_size,
        exact_tokens=config.exact_tokens_per_page,
        dtype_index=DTYPES.index(dtype),
        rank=rank,
        leading_rank=leading_rank,
        num_outliers=config.num_outlier_chunks,
        value_int8=int(value_int8),
        page_bytes=page_bytes,
        value_record_bytes=value_bytes,
    )
    sizes = PageLayout(**values)
    end = 0
    for name, shape, section_dtype in _shadow_sections(sizes):
        values[name] = end
        end += _aligned(prod(shape) * section_dtype.itemsize)
    if end > page_bytes:
        return None
    # Tags take room, so a slot page holds a little fewer chunks than an exact page of the same bytes.
    for slots in range(config.exact_tokens_per_page // config.chunk_size, 0, -1):
        end = 0
        for name, shape, section_dtype in _slot_sections(sizes, slots):
            values[name] = end
            end += _aligned(prod(shape) * section_dtype.itemsize)
        values.update(slot_epoch=end, slots_per_page=slots)
        if end + 8 <= page_bytes:
            return PageLayout(**values)
    return None


def _shadow_sections(layout: PageLayout) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of the parts of a shadow page, in their order."""
    heads, size, block, rank = layout.num_kv_heads, layout.head_size, layout.block_size, layout.rank
    outliers = layout.num_outliers
    keys: list[tuple[str, tuple[int, ...], torch.dtype]]
    if rank:
        keys = [
            ("coefficients", (block, layout.leading_rank), torch.int8),
            ("tail_coefficients", (block, layout.tail_bytes), torch.uint8),
            ("basis", (heads, rank, size), torch.int8),
            ("tail_steps", (block,), torch.uint8),
            ("coefficient_scales", (block,), torch.bfloat16),
            ("mean", (heads, size), torch.float32),
            ("outlier_keys", (heads, outliers, layout.chunk_size, size), layout.dtype),
        ]
    else:
        keys = [("exact_keys", (heads, block, size), layout.dtype)]
    return [
        *keys,
        ("landmarks", (heads, layout.chunks, layout.landmark_bytes), torch.uint8),
        ("landmark_scales", (heads, layout.chunks), torch.float32),
        ("landmark_mean", (heads, size), torch.float32),
        ("outlier_ids", (heads, outliers), torch.int32),
        ("outlier_cosines", (heads, outliers), torch.float32),
        ("mean_values", (heads, size), layout.dtype),
    ]


def _slot_sections(layout: PageLayout, slots: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of the parts of a slot page, in their order; `slot_epoch` follows them."""
    chunk = (layout.num_kv_heads, slots, layout.chunk_size, layout.head_size)
    return [
        ("slot_keys", chunk, layout.dtype),
        ("slot_values", chunk, layout.dtype),
        ("slot_tags", chunk[:2], torch.int64),
        ("slot_used", chunk[:2], torch.int64),
    ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _strided_view(pages: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`[num_blocks, *shape]` at a byte offset of every page."""
    num_bytes = prod(shape) * dtype.itemsize
    return (
        pages[:, offset : offset + num_bytes].view(dtype).view(pages.shape[0], *shape)
        if shape
        else (pages[:, offset : offset + num_bytes].view(dtype)[:, 0])
    )
