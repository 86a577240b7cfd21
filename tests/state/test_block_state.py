from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_shadowkv.state.block_state import BlockState

NUM_BLOCKS = 8
BLOCKS = st.lists(st.integers(1, NUM_BLOCKS - 1), unique=True)


def ids(blocks: list[int]) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.int64)


class Lives(RuleBasedStateMachine):
    """Blocks are written, sealed and written again in any order; a model keeps every block's story."""

    def __init__(self) -> None:
        super().__init__()
        self.state = BlockState(NUM_BLOCKS, 2, torch.device("cpu"))
        self.sealed: set[int] = set()
        self.sources: dict[int, list[int]] = {}
        self.written: dict[int, int] = {}
        """When bytes of a page last changed; `now` counts what happened."""
        self.sealed_at: dict[int, int] = {}
        self.has_slots: set[int] = set()
        self.now = 0
        self.seen: dict[int, set[int]] = {block: {1} for block in range(NUM_BLOCKS)}

    def changed(self, blocks: list[int]) -> None:
        for block in blocks:
            epoch = int(self.state.epochs[block])
            assert epoch not in self.seen[block], "a slot of an earlier life would pass for a fresh one"
            self.seen[block].add(epoch)
            self.now += 1
            self.written[block] = self.now

    @rule()
    def start_step(self) -> None:
        before = int(self.state.clock)
        self.state.start_step()
        assert self.state.clock > before

    @rule(blocks=BLOCKS)
    def write_open(self, blocks: list[int]) -> None:
        self.state.write_open(ids(blocks))
        self.sealed -= set(blocks)

    @rule(blocks=BLOCKS)
    def write_exact(self, blocks: list[int]) -> None:
        # As the planner does: at most once in a step.
        self.state.start_step()
        self.state.write_open(ids(blocks))
        self.state.write_exact(ids(blocks))
        self.sealed -= set(blocks)
        self.has_slots -= set(blocks)
        self.changed(blocks)

    @rule(blocks=BLOCKS)
    def write_slots(self, blocks: list[int]) -> None:
        self.state.start_step()
        self.state.write_open(ids(blocks))  # nobody has them as sealed blocks any more
        self.sealed -= set(blocks)
        before = self.state.epochs.clone()
        self.state.write_slots(ids(blocks)[None])
        for block in blocks:
            if block in self.has_slots:
                assert before[block] == self.state.epochs[block], "its slots are lost"
                self.written[block] = self.now
            else:
                self.changed([block])
        self.has_slots |= set(blocks)

    @rule(data=st.data(), blocks=BLOCKS, kept=st.booleans())
    def seal(self, data: st.DataObject, blocks: list[int], kept: bool) -> None:
        others = sorted(set(range(1, NUM_BLOCKS)) - set(blocks))
        if kept and not others:
            return
        sources = {block: [data.draw(st.sampled_from(others)) for _ in range(2)] for block in blocks} if kept else {}
        # What a block is sealed from was written as exact pages.
        pages = sorted({page for of_block in sources.values() for page in of_block})
        self.state.start_step()
        self.state.write_open(ids(pages))
        self.sealed -= set(pages)
        self.state.write_exact(ids(pages))
        self.changed(pages)
        self.has_slots -= set(pages) | set(blocks)
        given = torch.tensor([sources[block] for block in blocks], dtype=torch.int32).view(-1, 2) if kept else None
        self.state.seal(ids(blocks), given)
        self.sealed |= set(blocks)
        self.changed(blocks)
        for block in blocks:
            self.sources[block] = sources.get(block, [0, 0])
            self.sealed_at[block] = self.written[block]

    @invariant()
    def knows_what_is_resident(self) -> None:
        blocks = sorted(self.sealed)
        expected = [
            [page if page and self.written[page] < self.sealed_at[block] else 0 for page in self.sources[block]]
            for block in blocks
        ]
        assert self.state.resident(ids(blocks)).tolist() == expected

    @precondition(lambda self: self.sealed)
    @rule()
    def nothing_but_time(self) -> None:
        epochs = self.state.epochs.clone()
        self.state.start_step()
        assert torch.equal(self.state.epochs, epochs), "time alone makes no slot stale"

    @invariant()
    def keeps_its_word(self) -> None:
        self.state.check_integrity(torch.arange(NUM_BLOCKS))
        assert self.state.sealed.nonzero().flatten().tolist() == sorted(self.sealed)


TestLives = Lives.TestCase
TestLives.settings = settings(deadline=None, max_examples=50, stateful_step_count=20)


def test_sealing_nothing_changes_nothing_but_the_clock() -> None:
    state = BlockState(4, 2, torch.device("cpu"))
    state.seal(ids([]), None)
    assert not state.sealed.any()
    assert state.epochs.tolist() == [1] * 4
    state.check_integrity(torch.arange(4))


def future(state: BlockState) -> None:
    state.epochs[2] = state.clock + 1


def zero(state: BlockState) -> None:
    state.epochs[3] = 0


def twins(state: BlockState) -> None:
    state.epochs[1] = state.epochs[2]


@pytest.mark.parametrize(
    ("damage", "what"),
    [(future, "lies in the future"), (zero, "is not positive"), (twins, "two sealed blocks share an epoch")],
)
def test_check_integrity_finds_damage(damage: Callable[[BlockState], None], what: str) -> None:
    state = BlockState(4, 2, torch.device("cpu"))
    state.seal(ids([1, 2]), None)
    state.check_integrity(torch.arange(4))
    damage(state)
    with pytest.raises(AssertionError, match=what):
        state.check_integrity(torch.arange(4))
