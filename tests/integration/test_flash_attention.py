"""The CUDA side's exact attention computes what the CPU side's does, up to the dtype, on functions like vLLM's."""

from __future__ import annotations

import emulated_cuda
import generators
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm_shadowkv.integration import flash_attention
from vllm_shadowkv.integration.cpu_attention import CpuAttention
from vllm_shadowkv.integration.flash_attention import FlashAttention
from vllm_shadowkv.integration.metadata import DenseBatch
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.rotary import Rotary
from vllm_shadowkv.state.layer import LayerMemory

NUM_BLOCKS, HEADS, SCALE = 24, 4, 0.3
Sides = tuple[CpuAttention, FlashAttention]


@pytest.fixture
def layout() -> PageLayout:
    return generators.make_layout(2, 64, torch.bfloat16)


@pytest.fixture
def sides(layout: PageLayout, monkeypatch: pytest.MonkeyPatch) -> Sides:
    for name in (
        "get_flash_attn_version", "is_flash_attn_varlen_func_available", "flash_attn_varlen_func",
        "reshape_and_cache_flash",
    ):  # fmt: skip
        monkeypatch.setattr(emulated_cuda.fa_utils, name, None, raising=False)
    emulated_cuda.fake_flash_attention()
    monkeypatch.setattr(flash_attention, "merge_attn_states", emulated_cuda.merge_attn_states)
    return CpuAttention(layout, HEADS), FlashAttention(layout, torch.device("cpu"))


def make_memory(layout: PageLayout) -> LayerMemory:
    pages = torch.zeros(NUM_BLOCKS, layout.page_bytes, dtype=torch.uint8)
    empty = torch.empty(0, 0)
    return LayerMemory(layout, Rotary.identity(), empty, pages, pages, pages, empty)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.float(), other.float(), atol=0.03, rtol=0.03)


def test_rows_over_exact_pages(sides: Sides, layout: PageLayout) -> None:
    """New tokens are written, then whole rows attend: a prompt's beginning, its end, and one decoded token."""
    generator, size = generators.make_generator("dense"), layout.exact_tokens
    lengths, counts = [130, 300, 77], [130, 44, 1]
    table = (torch.randperm(NUM_BLOCKS - 1, generator=generator)[:15] + 1).int().view(3, 5)
    outputs = []
    for attention in sides:
        memory, generator = make_memory(layout), generators.make_generator("tokens")
        for row, length in enumerate(lengths):
            key, value = (generators.randn(generator, length, 2, 64, dtype=torch.bfloat16) for _ in range(2))
            at = torch.arange(length)
            slots = table[row, at // size].long() * size + at % size
            slots[5] = -1  # a padded place
            attention.write(memory, key, value, slots)
        query = generators.randn(generator, sum(counts), HEADS, 64, dtype=torch.bfloat16)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        batch = DenseBatch(None, starts, torch.tensor(lengths).int(), table, max(counts), max(lengths))
        batch.plan = attention.plan(batch)
        outputs.append(torch.full_like(query, torch.nan))
        attention.attend_dense(memory, batch, query, SCALE, outputs[-1])
    close(*outputs)


@pytest.mark.parametrize("new", [60, 300 - 128, 1])
def test_parts_that_are_merged(sides: Sides, layout: PageLayout, new: int) -> None:
    """Exact tokens [128, 300), the newest of them queries; then a tile of others."""
    generator, size = generators.make_generator("parts"), layout.exact_tokens
    exact_row = (torch.randperm(NUM_BLOCKS - 1, generator=generator)[:6] + 1).int()
    at = torch.arange(128, 300)
    slots = exact_row[at // size].long() * size + at % size
    key, value = (generators.randn(generator, len(at), 2, 64, dtype=torch.bfloat16) for _ in range(2))
    keys, values = (generators.randn(generator, 96, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    query = generators.randn(generator, new, HEADS, 64, dtype=torch.bfloat16)
    merged = []
    for attention in sides:
        memory = make_memory(layout)
        attention.write(memory, key, value, slots)
        exact = attention.attend_exact(memory, query, exact_row, 128, 300, SCALE)
        merged.append(attention.merge(exact, attention.attend_all(query, keys, values, SCALE))[0])
    close(*merged)


def test_a_device_without_flash_attention_is_refused(sides: Sides, layout: PageLayout) -> None:
    emulated_cuda.fa_utils.get_flash_attn_version = lambda head_size: None
    with pytest.raises(RuntimeError, match="FlashAttention, which does not run on this device; use another"):
        FlashAttention(layout, torch.device("cpu"))
