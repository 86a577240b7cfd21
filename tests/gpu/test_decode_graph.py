"""Decode steps on a device: eager, captured in a graph and replayed, and on another stream, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import generators
import pytest
import torch

from vllm_shadowkv import ops, reference
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.rotary import Rotary
from vllm_shadowkv.state.block_state import BlockState
from vllm_shadowkv.state.decode import DecodeRows, DecodeWorkspace
from vllm_shadowkv.state.layer import LayerMemory

GROUP, SCALE, STEPS = 4, 0.125, 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIG = ShadowKVConfig(block_size=256, sparse_budget=64, slot_chunks=32, num_outlier_chunks=1)


class Decode:
    """A layer with three requests: two with sealed blocks, one without."""

    def __init__(self, layout: PageLayout, device: str) -> None:
        generator = generators.make_generator("decode graph", layout.head_size)
        sealed = generators.make_sealed(generator, layout, (3, 1, 0), spare_ids=40)
        slot_pages = layout.slot_pages(CONFIG.slot_chunks)
        slots = generators.make_slot_table(generator, sealed.free, 3, slot_pages)
        generators.fill_slot_pages(generator, layout, sealed.pages, slots)
        exact_table = torch.zeros(3, 5 * layout.block_size // layout.exact_tokens, dtype=torch.int32)
        seq_lens = torch.tensor([900, 256 + 40, 77], dtype=torch.int32)
        for row, (start, end) in enumerate(zip(sealed.exact_start.tolist(), seq_lens.tolist(), strict=True)):
            columns = range(start // layout.exact_tokens, -(-(end + STEPS) // layout.exact_tokens))
            ids = [sealed.free.pop() for _ in columns]
            exact_table[row, columns.start : columns.stop] = torch.tensor(ids, dtype=torch.int32)
        pages = sealed.pages.to(device)
        keys, values = layout.exact_views(pages)
        used = exact_table[exact_table > 0].long().to(device)
        shape = keys[used].shape
        keys[used] = generators.randn(generator, *shape, dtype=layout.dtype).to(device)
        values[used] = generators.randn(generator, *shape, dtype=layout.dtype).to(device)
        pool = sealed.host_pool.pin_memory() if device == "cuda" else sealed.host_pool
        table = generators.rope_table(2048, layout.head_size).to(device)
        self.memory = LayerMemory(layout, Rotary.identity(), table, pages, pages, pages, pool)
        self.state = BlockState(len(pages), layout.block_size // layout.exact_tokens, torch.device(device))
        self.rows = DecodeRows(
            *(x.to(device) for x in (sealed.block_table, exact_table, slots, sealed.exact_start, seq_lens))
        )
        heads = layout.num_kv_heads * GROUP
        self.workspace = DecodeWorkspace(CONFIG, layout, heads, 3, sealed.block_table.shape[1], torch.device(device))
        self.query = torch.zeros(3, heads, layout.head_size, dtype=layout.dtype, device=device)
        self.output = torch.zeros_like(self.query)
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.queries = [
            generators.randn(generator, *self.query.shape, dtype=layout.dtype).to(device) for _ in range(STEPS)
        ]

    def attend(self) -> None:
        """What a graph holds."""
        self.workspace.attend(self.memory, self.state, self.rows, self.query, SCALE, self.output, self.counts)

    def run(self, attend: Any) -> list[torch.Tensor]:
        """Some steps of one token each."""
        outputs = []
        for query in self.queries:
            self.state.start_step()
            self.query.copy_(query)
            attend()
            outputs.append(self.output.cpu().float())
            self.rows.seq_lens.add_(1)
        return outputs


def layout_of(head_size: int) -> PageLayout:
    return generators.make_layout(2, head_size, torch.bfloat16, compression=4)


@pytest.fixture
def expected(request: pytest.FixtureRequest, head_size: int) -> list[torch.Tensor]:
    """The reference's outputs of the same steps."""
    decode = Decode(layout_of(head_size), "cpu")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("select_chunks", "sparse_attention"):
            function = getattr(reference, name)
            patch.setattr(ops, name, lambda *args, function=function: function(*args[:-1]))
        for name in ("plan_slots", "fill_slots"):
            patch.setattr(ops, name, getattr(reference, name))
        return decode.run(decode.attend)


def check(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        # A chunk on the edge of the budget may be another one: its weight is next to nothing.
        error = (one - other).norm(dim=-1) / other.norm(dim=-1)
        assert error.max() < 0.03


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("device", DEVICES)
def test_eager(device: str, head_size: int, expected: list[torch.Tensor]) -> None:
    decode = Decode(layout_of(head_size), device)
    check(decode.run(decode.attend), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128])
def test_replayed(head_size: int, expected: list[torch.Tensor]) -> None:
    """Captured on rows without tokens, as vLLM captures; lengths and queries change between replays."""
    decode = Decode(layout_of(head_size), "cuda")
    lengths = decode.rows.seq_lens.clone()
    decode.rows.seq_lens.zero_()
    decode.attend()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.attend()
    decode.rows.seq_lens.copy_(lengths)
    check(decode.run(graph.replay), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [128])
def test_on_another_stream(head_size: int, expected: list[torch.Tensor]) -> None:
    decode = Decode(layout_of(head_size), "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check(decode.run(decode.attend), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64])
def test_padding_rows_change_nothing(head_size: int, expected: list[torch.Tensor]) -> None:
    """A graph for more rows than there are requests: lengths of 0, tables of nulls."""
    decode = Decode(layout_of(head_size), "cuda")
    wide = Decode(layout_of(head_size), "cuda")
    padded = {name: torch.cat((value, torch.zeros_like(value))) for name, value in vars(wide.rows).items()}
    wide.rows = replace(wide.rows, **padded)
    wide.query, wide.output = (torch.cat((x, torch.zeros_like(x))) for x in (wide.query, wide.output))
    wide.queries = [torch.cat((x, torch.zeros_like(x))) for x in wide.queries]
    layout = decode.memory.layout
    wide.workspace = DecodeWorkspace(
        CONFIG, layout, layout.num_kv_heads * GROUP, 6, decode.rows.block_table.shape[1], torch.device("cuda")
    )
    outputs = wide.run(wide.attend)
    check([output[:3] for output in outputs], expected)
    assert not any(output[3:].any() for output in outputs)
