"""CUDA's exact attention computes what the CPU's does, up to the dtype, on stand-ins for the libraries' kernels."""

from __future__ import annotations

import sys

import emulated_cuda
import generators
import pytest
import torch
from torch import Tensor
from xformers.ops import fmha

pytest.importorskip("vllm")

from vllm_shadowkv.integration.attention import choice, cuda
from vllm_shadowkv.integration.attention.cpu import CpuAttention
from vllm_shadowkv.integration.attention.flash import FlashAttention
from vllm_shadowkv.integration.attention.library import DenseBatch
from vllm_shadowkv.integration.attention.xformers import XformersAttention
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.rotary import Rotary
from vllm_shadowkv.state.layer import LayerMemory

NUM_BLOCKS, HEADS, SCALE = 24, 4, 0.3
Sides = tuple[CpuAttention, FlashAttention | XformersAttention]


@pytest.fixture
def layout() -> PageLayout:
    return generators.make_layout(2, 64, torch.bfloat16)


@pytest.fixture(autouse=True)
def _as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `emulated_cuda` replaces is put back."""
    for name in ("get_flash_attn_version", "is_flash_attn_varlen_func_available", "flash_attn_varlen_func"):
        monkeypatch.setattr(emulated_cuda.fa_utils, name, getattr(emulated_cuda.fa_utils, name, None), raising=False)
    for module, name in (
        (cuda, "merge_attn_states"),
        (cuda.vllm_ops, "reshape_and_cache_flash"),
        (fmha, "_dispatch_fw"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture(params=["flash_attention", "xformers"])
def sides(request: pytest.FixtureRequest, layout: PageLayout, caplog: pytest.LogCaptureFixture) -> Sides:
    getattr(emulated_cuda, f"fake_{request.param}")()
    cuda = choice.of_cuda(layout, HEADS, torch.device("cpu"))
    assert isinstance(cuda, XformersAttention if request.param == "xformers" else FlashAttention)
    assert ("prefills with xformers, which is slower" in caplog.text) == (request.param == "xformers")
    return CpuAttention(layout, HEADS), cuda


def make_memory(layout: PageLayout, sinks: Tensor | None = None) -> LayerMemory:
    pages = torch.zeros(NUM_BLOCKS, layout.page_bytes, dtype=torch.uint8)
    empty = torch.empty(0, 0)
    return LayerMemory(layout, Rotary.identity(), empty, pages, pages, pages, empty, sinks)


each_sinks = pytest.mark.parametrize("sinks", [None, torch.tensor([8.0, 8.5, 9.0, 11.0])], ids=["plain", "sinks"])


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.float(), other.float(), atol=0.03, rtol=0.03)


@each_sinks
def test_rows_over_exact_pages(sides: Sides, layout: PageLayout, sinks: Tensor | None) -> None:
    """New tokens are written, then whole rows attend: a prompt's beginning, its end, and one decoded token."""
    generator, size = generators.make_generator("dense"), layout.exact_tokens
    lengths, counts = [130, 300, 77], [130, 44, 1]
    table = (torch.randperm(NUM_BLOCKS - 1, generator=generator)[:15] + 1).int().view(3, 5)
    outputs = []
    for attention in sides:
        memory, generator = make_memory(layout, sinks), generators.make_generator("tokens")
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


@each_sinks
@pytest.mark.parametrize("new", [60, 300 - 128, 1])
def test_parts_that_are_merged(sides: Sides, layout: PageLayout, new: int, sinks: Tensor | None) -> None:
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
        parts = attention.merge(exact, attention.attend_all(query, keys, values, SCALE))
        merged.append(attention.finish(parts, sinks))
        if sinks is not None:
            assert (merged[-1].norm(dim=-1).mean(dim=0) < 0.9 * parts[0].float().norm(dim=-1).mean(dim=0)).all()
    close(*merged)


@pytest.mark.parametrize(("num_kv_heads", "head_size"), [(4, 64), (1, 80), (2, 96), (4, 128), (1, 256)])
def test_xformers_takes_every_shape(num_kv_heads: int, head_size: int) -> None:
    """Groups of 1, 2 and 4 heads; `fake_xformers` refuses what xformers' kernels for CUDA would."""
    emulated_cuda.fake_xformers()
    layout = generators.make_layout(num_kv_heads, head_size, torch.bfloat16)
    generator = generators.make_generator("shapes")
    shapes = ((7, HEADS, head_size), (33, num_kv_heads, head_size), (33, num_kv_heads, head_size))
    query, keys, values = (generators.randn(generator, *shape, dtype=torch.bfloat16) for shape in shapes)
    ours = XformersAttention(layout, HEADS, torch.device("cpu")).attend_all(query, keys, values, SCALE)
    theirs = CpuAttention(layout, HEADS).attend_all(query, keys, values, SCALE)
    close(ours[0], theirs[0])
    close(ours[1], theirs[1].T)


class TestWhereNeitherRuns:
    """FlashAttention never does here; the words are for someone who has to choose."""

    def test_xformers_is_not_installed(self, layout: PageLayout, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "xformers.ops", None)
        with pytest.raises(RuntimeError, match=r"pip install 'vllm-shadowkv\[xformers\]', or use another"):
            choice.of_cuda(layout, HEADS, torch.device("cpu"))

    def test_xformers_has_no_kernel_for_the_device(self, layout: PageLayout) -> None:
        with pytest.raises(RuntimeError, match=r"neither does heads of 64 in torch.bfloat16 here .* use another"):
            choice.of_cuda(layout, HEADS, torch.device("cpu"))
