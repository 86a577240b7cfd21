"""Sealing of several layers at once: each gets its own keys, turned back by its own rotation, and its own values."""

from __future__ import annotations

import generators
import pytest
import torch
from torch import Tensor

from vllm_shadowkv import ops, reference
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.rotary import Rotary, apply
from vllm_shadowkv.state import seal
from vllm_shadowkv.state.layer import LayerMemory

BASES = (10_000.0, None, 1e6, 500.0, 100.0)
"""Of the layers' rotations; None: there is none."""
BLOCKS = (3, 2)
FIRST = (256, 0)
PAGES, POSITIONS = 24, 512


def make_layer(layout: PageLayout, base: float | None, seed: int) -> tuple[LayerMemory, Tensor, Tensor]:
    """A layer, with K and V, `[blocks, block_size, Hkv, D]`, in the exact pages from page 4 on."""
    generator = generators.make_generator("seal", seed)
    size, shape = layout.block_size, (layout.num_kv_heads, layout.head_size)
    table = generators.rope_table(POSITIONS, layout.head_size if base else 0, base or 1.0)
    rotary = Rotary(table, layout.head_size, is_neox=seed % 2 == 0) if base else Rotary.identity()
    flat = generators.randn(generator, len(BLOCKS) * size, 12) @ generators.randn(generator, 12, layout.width)
    positions = torch.cat([first + torch.arange(size) for first in FIRST])
    keys = apply(rotary, flat.unflatten(-1, shape), positions).to(layout.dtype)
    values = generators.randn(generator, len(keys), *shape, dtype=layout.dtype)
    pages = generators.garbage_pages(generator, PAGES, layout.page_bytes)
    ids = torch.arange(4, 4 + len(keys) // layout.exact_tokens)
    generators.fill_exact_pages(layout, pages, ids.tolist(), keys, values)
    pool = generators.garbage_pages(generator, PAGES, layout.value_row_bytes)
    memory = LayerMemory(layout, rotary, table, pages, pages, pages, pool)
    return memory, keys.unflatten(0, (-1, size)), values.unflatten(0, (-1, size))


@pytest.mark.parametrize("codec", ["lowrank", "none"])
def test_layers_that_are_sealed_together(codec: str) -> None:
    layout = generators.make_layout(2, 64, torch.float32, block_size=128, exact_keys=codec == "none")
    layers = [make_layer(layout, base, seed) for seed, base in enumerate(BASES)]
    blocks, first = torch.tensor(BLOCKS, dtype=torch.int32), torch.tensor(FIRST, dtype=torch.int32)
    exact = torch.arange(4, 4 + len(BLOCKS) * (128 // layout.exact_tokens), dtype=torch.int32).view(len(BLOCKS), -1)
    seal.seal_blocks([memory for memory, _, _ in layers], blocks, exact, first)
    for memory, keys, values in layers:
        found = torch.empty_like(keys), torch.empty_like(values)
        neox, table = memory.rotary.is_neox, memory.cos_sin
        ops.expand_blocks(blocks, first, memory.pages, memory.host_pool, table, neox, layout, *found)
        assert torch.equal(found[1], values)
        error = (found[0] - keys).norm() / keys.norm()
        assert error <= (0 if codec == "none" else 0.03)


def test_keys_are_weighed_by_their_queries() -> None:
    """Of keys with more directions than a page has, those that queries look at are kept, as by the reference."""
    layout = generators.make_layout(2, 64, torch.float32, block_size=128)
    generator = generators.make_generator("weighed")
    keys = generators.randn(generator, 2 * 128, layout.num_kv_heads, layout.head_size)
    scales = torch.where(torch.arange(layout.width) % 4 == 0, 1.0, 0.1)
    pages = generators.garbage_pages(generator, PAGES, layout.page_bytes)
    exact = torch.arange(4, 4 + len(keys) // layout.exact_tokens, dtype=torch.int32).view(2, -1)
    table = generators.rope_table(POSITIONS, 0, 1.0)
    blocks, first = torch.tensor(BLOCKS, dtype=torch.int32), torch.tensor(FIRST, dtype=torch.int32)

    def errors(of_queries: Tensor | None) -> tuple[float, float]:
        """Of keys as queries see them, of ours and of the reference's."""
        generators.fill_exact_pages(layout, pages, exact.flatten().tolist(), keys, keys)
        pool = generators.garbage_pages(generator, PAGES, layout.value_row_bytes)
        memory = LayerMemory(layout, Rotary.identity(), table, pages, pages, pages, pool, of_queries)
        seal.seal_blocks([memory], blocks, exact, first)
        found = torch.empty(2, 128, layout.num_kv_heads, layout.head_size)
        ops.expand_blocks(blocks, first, pages, pool, table, True, layout, found, torch.empty_like(found))
        of_blocks = keys.flatten(1).split(128)
        factors = [reference.factorise(block, layout.rank, layout.leading_rank, of_queries) for block in of_blocks]
        expected = torch.stack([mean + coefficients @ basis for mean, coefficients, basis in factors])
        exactly = torch.stack(of_blocks)
        return tuple(((one.flatten(2) - exactly) * scales).norm().item() for one in (found, expected))  # type: ignore[return-value]

    (ours, best), (alike, _) = errors(scales), errors(None)
    assert 0.9 * best < ours < 1.1 * best  # by exact outliers and by codes
    assert ours < 0.6 * alike
