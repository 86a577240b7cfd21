"""Sealing lets values go to the host beside the factorisation, in whatever order two streams get to run."""

from __future__ import annotations

from typing import Any

import generators
import pytest
import torch
from fake_streams import Streams

from vllm_shadowkv.rotary import Rotary
from vllm_shadowkv.state import seal
from vllm_shadowkv.state.layer import LayerMemory


class Sealing(Streams):
    """Notes in which order things happen."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, seal)
        self.happened: list[str] = []
        patch.setattr(seal.ops, "store_values", lambda *arguments: self.then("stored"))
        patch.setattr(seal.ops, "pack_block", lambda *arguments: self.then("packed"))

    def then(self, what: str) -> None:
        self.active.work.append(lambda: self.happened.append(what))


@pytest.fixture
def memory() -> LayerMemory:
    layout = generators.make_layout(2, 64, torch.bfloat16, block_size=128)
    pages = torch.zeros(40, layout.page_bytes, dtype=torch.uint8)
    return LayerMemory(layout, Rotary.identity(), torch.empty(0, 0), pages, pages, pages, torch.empty(0, 0))


@pytest.mark.parametrize(
    ("num_blocks", "layers", "batches"),
    [(1, 1, [1]), (2, 3, [3]), (3, 5, [2, 2, 1]), (seal.BLOCKS_AT_ONCE + 1, 2, [1, 1, 2])],
)
@pytest.mark.parametrize("first", ["current", "side"])
def test_values_are_stored_between_the_writing_and_the_next_use_of_their_pages(
    monkeypatch: pytest.MonkeyPatch, memory: LayerMemory, num_blocks: int, layers: int, batches: list[int], first: str
) -> None:
    """As many layers at once as their blocks together may be factorised."""
    streams = Sealing(monkeypatch)
    streams.then("written")
    pages = memory.layout.block_size // memory.layout.exact_tokens
    ids: Any = torch.arange(1, 1 + num_blocks, dtype=torch.int32)
    exact = (10 + torch.arange(num_blocks * pages, dtype=torch.int32) % 30).view(num_blocks, pages)
    seal.seal_blocks([memory] * layers, ids, exact, 128 * (ids - 1))
    streams.then("used again")
    streams.run(first)
    assert streams.happened[0] == "written"
    assert streams.happened[-1] == "used again"
    order = ("packed", "stored") if first == "current" else ("stored", "packed")
    assert streams.happened[1:-1] == [what for count in batches for what in order for _ in range(count)]
