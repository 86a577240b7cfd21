"""Which blocks a step seals where blocks wait, by hand: what the scheduler's order of giving pages away hides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.integration.worker import sealing
from vllm_shadowkv.integration.worker.rows import Row
from vllm_shadowkv.integration.worker.sealing import Sealer, Tables
from vllm_shadowkv.metrics import StepCounts
from vllm_shadowkv.page import plan_page
from vllm_shadowkv.state.block_state import BlockState
from vllm_shadowkv.state.due import DueBlocks

LAYOUT = plan_page(ShadowKVConfig(block_size=64, compression=4), num_kv_heads=4, head_size=64, dtype=torch.float32)
BLOCK, PAGE = LAYOUT.block_size, LAYOUT.exact_tokens
SOURCES = {1: [11, 12, 13, 14], 2: [12, 13, 14, 15], 3: [31, 32, 33, 34]}
"""Blocks that are due; the second has pages of the first."""


def sealer(knows_pages: bool = True, **of_geometry: bool) -> Sealer:
    sizes = {"layout": LAYOUT, "max_drafts": 0, "has_resident_pages": True}
    geometry: Any = SimpleNamespace(**sizes | {"pages_are_zeroed": False, "saves_blocks": False} | of_geometry)
    return Sealer(geometry, StepCounts(), knows_pages)


class Step:
    """One row that goes on, and what its step seals."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bound: Any = SimpleNamespace(
            state=BlockState(100, BLOCK // PAGE, torch.device("cpu")),
            memories={},
            exact_start=torch.zeros(1),
            due=DueBlocks(),
            reading={},
        )
        for block, sources in SOURCES.items():
            self.bound.due.add(block, torch.tensor(sources, dtype=torch.int32), 0)
        self.sealed: list[int] = []
        monkeypatch.setattr(sealing, "seal_blocks", lambda _, blocks, *args: self.sealed.extend(blocks.tolist()))
        self._sealer = sealer()

    def run(self, blocks: list[int], exact: list[int], computed: int, new: int = 1, **row: Any) -> list[int]:
        """Blocks that are sealed before a row computes so many tokens more."""
        one = Row(0, slice(0, new), computed + new, prefilling=new > 1)
        one.exact_start = row.pop("exact_start", 0)
        slots = torch.tensor([row.pop("slots", [0])], dtype=torch.int32)
        tables = Tables(*(torch.tensor([ids], dtype=torch.int32) for ids in (blocks, exact)), slots)
        self._sealer.seal(self.bound, [one], tables)
        return self.sealed


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    return Step(monkeypatch)


def test_where_blocks_cannot_wait() -> None:
    assert not sealer().is_early
    assert sealer(knows_pages=False).is_early
    assert sealer(pages_are_zeroed=True).is_early
    assert sealer(saves_blocks=True).is_early


@pytest.mark.parametrize(("page", "sealed"), [(11, [1]), (13, [1, 2]), (15, [2]), (34, [3]), (50, [])])
def test_blocks_whose_pages_a_row_writes_to(step: Step, page: int, sealed: list[int]) -> None:
    assert step.run([40], [41, page], computed=PAGE + 2) == sealed
    assert {block for block in SOURCES if block in step.bound.due} == SOURCES.keys() - set(sealed)


def test_pages_that_a_row_only_holds_are_as_they_were(step: Step) -> None:
    assert step.run([40], [11, 12, 13, 50], computed=3 * PAGE) == []
    assert step.run([40], [50, 31, 32, 33], computed=0, new=PAGE) == []


def test_blocks_whose_pages_become_a_block_of_a_row(step: Step) -> None:
    step.bound.state.sealed[40] = True
    assert step.run([40, 31], [0] * 4 + [51], computed=BLOCK) == [3]


@pytest.mark.parametrize(("exact_start", "sealed"), [(0, []), (BLOCK, [3])])
def test_blocks_whose_pages_become_slots(step: Step, exact_start: int, sealed: list[int]) -> None:
    step.bound.state.sealed[40] = True
    assert step.run([40, 42], [0] * 4 + [51], BLOCK, exact_start=exact_start, slots=[32, 33]) == sealed


@pytest.mark.parametrize(("exact_start", "sealed"), [(0, []), (BLOCK, [1]), (2 * BLOCK, [1, 3])])
def test_blocks_that_a_row_reads_sealed(step: Step, exact_start: int, sealed: list[int]) -> None:
    assert step.run([1, 3, 42], SOURCES[1] + SOURCES[3] + [51], 2 * BLOCK, exact_start=exact_start) == sealed


def test_what_generated_tokens_have_completed_waits_too(step: Step) -> None:
    step.run([40, 42], [51, 52, 53, 54, 55], computed=BLOCK)
    assert not step.sealed
    assert step.bound.due[40].tolist() == [51, 52, 53, 54]


@pytest.mark.parametrize("place", ["block", "page"])
def test_a_block_that_is_given_away_is_forgotten(step: Step, place: str) -> None:
    """Else it would be sealed over what its new owner writes, once its pages are taken."""
    if place == "block":
        step.run([1], [51], computed=0)
    else:
        step.run([40], [1], computed=0)
    assert not step.sealed
    assert 1 not in step.bound.due
    assert step.run([40], [11], computed=0) == []


def test_a_block_without_pages_is_a_bug(step: Step) -> None:
    with pytest.raises(RuntimeError, match="block 40 is complete and not sealed, but its exact pages are gone"):
        step.run([40, 42], [0] * 4 + [51], computed=BLOCK)
