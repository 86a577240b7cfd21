"""One layer's memory with synthetic content, as if requests of a given length had been prefilled and sealed."""

from __future__ import annotations

from argparse import ArgumentTypeError

import torch
from torch import Tensor

from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import PageLayout, plan_page
from vllm_shadowkv.rotary import Rotary
from vllm_shadowkv.state import host_pool
from vllm_shadowkv.state.block_state import BlockState
from vllm_shadowkv.state.decode import DecodeRows, DecodeWorkspace
from vllm_shadowkv.state.huge_pages import copy_in_huge_pages, use_huge_pages
from vllm_shadowkv.state.layer import LayerMemory

SHAPES = {
    "llama-3.1-8b": (32, 8, 128),
    "qwen2.5-7b": (28, 4, 128),
    "glm-4-9b": (32, 2, 128),
    "phi-3-mini": (32, 32, 96),
}
"""Query heads, KV heads, head size."""


class Workload:
    """`batch` requests of `sealed + open_tokens` tokens each, in blocks that lie anywhere in the pool.

    Factors and landmarks are random bytes; exact pages and the host pool repeat a few megabytes of normal values.
    """

    def __init__(
        self,
        shape: str,
        sealed: int,
        open_tokens: int,
        batch: int,
        device: str,
        dtype: torch.dtype,
        with_sources: bool = False,
    ) -> None:
        """Allocates and fills.

        Args:
            shape: of `SHAPES`.
            sealed: tokens per request in sealed blocks, a multiple of the block size; 0: exact pages only.
            open_tokens: tokens per request in exact pages.
            batch: requests.
            device: "cpu" or "cuda".
            dtype: of keys and values.
            with_sources: the exact pages that blocks were sealed from are there, too, for `set_resident`.
        """
        self.heads, kv_heads, size = SHAPES[shape]
        self.config = ShadowKVConfig()
        self.layout = layout = plan_page(self.config, kv_heads, size, dtype)
        self.scale = size**-0.5
        blocks = sealed // layout.block_size
        slot_pages = layout.slot_pages(self.config.slot_chunks)
        exact_pages = -(-open_tokens // layout.exact_tokens)
        per_block = layout.block_size // layout.exact_tokens
        counts = [batch * blocks, batch * slot_pages, batch * exact_pages, batch * blocks * per_block * with_sources]
        order = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1).int()
        sealed_ids, slot_ids, exact_ids, source_ids = order.split(counts)
        generator = torch.Generator(device).manual_seed(0)
        pages = torch.empty(1 + sum(counts), layout.page_bytes // 8, dtype=torch.int64, device=device)
        if device == "cpu":
            use_huge_pages(pages)
        pages = pages.random_(generator=generator).view(torch.uint8)
        _set_what_is_read_as_floats(layout, pages, generator)
        (pool,) = host_pool.allocate(1, len(pages), layout.value_row_bytes, gpu=0 if device == "cuda" else None)
        fill(pool, dtype, generator)
        for name in ("slot_tags", "slot_used", "slot_epoch"):
            layout.view(pages, name)[slot_ids.long().to(device)] = 0
        for view in layout.exact_views(pages):
            for chosen in torch.cat((exact_ids, source_ids)).long().to(device).split(256):
                view[chosen] = normal(view[chosen].shape, dtype, generator)

        positions = torch.arange(sealed + open_tokens)[:, None] * 500_000.0 ** (-torch.arange(0, size, 2) / size)
        table = copy_in_huge_pages(torch.cat((positions.cos(), positions.sin()), -1), torch.float32).to(device)
        self.memory = LayerMemory(
            layout=layout,
            rotary=Rotary(table, size, is_neox=True),
            cos_sin=table,
            pages=pages,
            exact_pages=pages,
            slot_pages=pages,
            host_pool=pool,
        )
        self.state = BlockState(len(pages), per_block, torch.device(device))
        sources = source_ids.view(-1, per_block).to(device) if with_sources else None
        self.state.seal(sealed_ids.long(), sources)
        self._sources = self.state.sources.clone()
        first_exact = sealed // layout.exact_tokens
        exact_table = torch.zeros(batch, first_exact + exact_pages, dtype=torch.int32)
        exact_table[:, first_exact:] = exact_ids.view(batch, exact_pages)
        start = torch.full((batch,), sealed, dtype=torch.int32, device=device)
        self.rows = DecodeRows(
            block_table=sealed_ids.view(batch, blocks).to(device),
            exact_table=exact_table.to(device),
            slot_table=slot_ids.view(batch, slot_pages).to(device),
            exact_start=start,
            seq_lens=start + open_tokens,
        )
        self.workspace = DecodeWorkspace(self.config, layout, self.heads, batch, blocks, torch.device(device))
        self.query = torch.randn(batch, self.heads, size, generator=generator, device=device).to(dtype)
        self.output = torch.empty_like(self.query)
        self.slot_counts = torch.zeros(4, dtype=torch.int64, device=device)
        self._generator = torch.Generator(device=device).manual_seed(1)

    def attend(self) -> None:
        """One decode step over sealed blocks and open tokens."""
        self.workspace.attend(self.memory, self.state, self.rows, self.query, self.scale, self.output, self.slot_counts)

    def set_resident(self, resident: bool) -> None:
        """Whether what a step misses is in the pages that it was sealed from; that is how a workload begins."""
        self.state.sources.copy_(self._sources if resident else torch.zeros_like(self._sources))

    def force_hits(self, rate: float) -> None:
        """Makes a step hit this share of its chunks: of those in the slots, it forgets others at random.

        The step before must have been one with the same query, so that all its chunks are in the slots.
        """
        self.state.start_step()
        tags = self.layout.view(self.memory.slot_pages, "slot_tags")
        pages = self.rows.slot_table.long()
        per_request = tags[pages]  # [batch, pages, heads, slots]
        order = torch.rand(per_request.shape, generator=self._generator, device=per_request.device)
        order = order.masked_fill(per_request == 0, 2.0).transpose(1, 2).flatten(2)
        ranks = order.argsort(-1).argsort(-1)
        forgotten = ((1 - rate) * (order < 2).sum(-1, keepdim=True)).round()
        keep = (ranks >= forgotten).unflatten(-1, per_request.shape[1::2]).transpose(1, 2)
        tags[pages] = per_request * keep


def hit_rate(text: str) -> float:
    """A share of chunks on a command line."""
    rate = float(text)
    if not 0 <= rate <= 1:
        raise ArgumentTypeError(f"a hit rate is a share from 0 to 1, got {text}")
    return rate


def normal(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A tensor of normal values on the generator's device; see `fill`."""
    return fill(torch.empty(shape, dtype=dtype, device=generator.device), dtype, generator)


def fill(target: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Fills a contiguous tensor with the bytes of normal values; returns it.

    They are the same few megabytes over and over: a pool of gigabytes takes no minutes to make, and no second copy.
    """
    flat = target.view(-1).view(torch.uint8)
    count = min(flat.numel() // dtype.itemsize, 1 << 21)
    pattern = torch.randn(count, generator=generator, device=generator.device).to(target.device, dtype)
    pattern = pattern.view(torch.uint8)
    whole = flat.numel() // len(pattern) * len(pattern) if count else 0
    flat[:whole].view(-1, max(len(pattern), 1)).copy_(pattern)
    flat[whole:] = pattern[: len(flat) - whole]
    return target


def _set_what_is_read_as_floats(layout: PageLayout, pages: Tensor, generator: torch.Generator) -> None:
    for section in ("coefficient_scales", "landmark_scales"):
        layout.view(pages, section).fill_(0.01)
    layout.view(pages, "tail_steps").fill_(3)
    for section in ("mean", "landmark_mean"):
        layout.view(pages, section).zero_()
    for section in ("outlier_keys", "mean_values"):
        view = layout.view(pages, section)
        view.copy_(normal(view.shape, layout.dtype, generator))
    ids = layout.view(pages, "outlier_ids")
    order = torch.rand(*ids.shape[:2], layout.chunks, generator=generator, device=pages.device).argsort(-1)
    ids.copy_(order[..., : ids.shape[-1]])
    layout.view(pages, "outlier_cosines").uniform_(-1, 1, generator=generator)
