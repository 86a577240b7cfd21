"""Tiles that a side stream expands ahead are the right ones, in whatever order two streams get to run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import generators
import pytest
import torch
from fake_streams import Streams
from torch import Tensor

from vllm_shadowkv.rotary import Rotary
from vllm_shadowkv.state import prefill
from vllm_shadowkv.state.layer import LayerMemory

BLOCK = 128


class Attention(Streams):
    """Notes which tile was read when it ran."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, prefill)
        self.read: list[list[float]] = []
        patch.setattr(prefill.ops, "expand_blocks", self._expand)

    def _expand(self, blocks: Tensor, positions: Tensor, *rest: Any) -> None:
        keys, values = rest[-2:]

        def write() -> None:
            assert (positions == (blocks - 1) * BLOCK).all()
            keys.copy_(blocks.view(-1, 1, 1, 1).expand_as(keys))
            values.copy_(keys)

        self.active.work.append(write)

    def attend_exact(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(1), torch.zeros(1)

    def attend_all(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        def look() -> None:
            assert torch.equal(keys, values)
            self.read.append(keys[::BLOCK, 0, 0].tolist())

        self.active.work.append(look)
        return torch.zeros(1), torch.zeros(1)

    def merge(self, one: Any, other: Any) -> Any:
        return one


@pytest.fixture
def memory() -> LayerMemory:
    layout = generators.make_layout(2, 64, torch.bfloat16, block_size=BLOCK)
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    return LayerMemory(layout, Rotary.identity(), torch.empty(0, 0), pages, pages, pages, torch.empty(0, 0))


@pytest.mark.parametrize("num_blocks", [0, 1, 4, 5, 8, 23])
@pytest.mark.parametrize("first", ["current", "side"])
def test_every_tile_is_read_while_it_is_there(
    monkeypatch: pytest.MonkeyPatch, memory: LayerMemory, num_blocks: int, first: str
) -> None:
    streams = Attention(monkeypatch)
    row = torch.arange(1, 31, dtype=torch.int32)
    sealed: list[int] = []
    streams.current.work.append(lambda: sealed.append(1))  # what the step did before
    query = torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    attention: Any = SimpleNamespace(
        finish=lambda merged, sinks: merged[0],
        attend_exact=streams.attend_exact,
        attend_all=streams.attend_all,
        merge=streams.merge,
    )
    prefill.attend_prefill(
        memory, attention, query, row, row, num_blocks * BLOCK, num_blocks * BLOCK + 2, 1.0, torch.zeros(1)
    )
    if num_blocks:
        assert not streams.side.advance() or sealed, "it began before the blocks were sealed"
    streams.run(first)
    blocks = [float(block) for block in row[:num_blocks].tolist()]
    assert streams.read == [blocks[at : at + prefill.TILE_BLOCKS] for at in range(0, num_blocks, prefill.TILE_BLOCKS)]


def test_the_next_tile_is_expanded_meanwhile(monkeypatch: pytest.MonkeyPatch, memory: LayerMemory) -> None:
    """The side stream gets to the second tile before the current one has attended to anything."""
    streams = Attention(monkeypatch)
    row = torch.arange(1, 31, dtype=torch.int32)
    tiles = iter(prefill._SealedTiles(memory, row, 12 * BLOCK))
    next(tiles)
    while streams.current.advance() or streams.side.advance():
        pass
    assert len(streams.side.work) == streams.side.done == 4, "two waits, two tiles"
