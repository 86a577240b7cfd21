"""Requests come, are computed, preempted, aborted and hit in any order; a model says what every block must be.

The scheduler, the three managers, the planner, the block state and the slots' tags are real; `simulation.py` stands for
the model's layers, and checks what is read. The rules here check what the blocks are between the steps.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulation import Engine, Files, Row
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request, RequestStatus

from vllm_shadowkv.integration.scheduler.exact import ExactManager
from vllm_shadowkv.integration.scheduler.managers import ShadowManager, SlotManager
from vllm_shadowkv.integration.worker.sealing import Sealer
from vllm_shadowkv.state.block_state import BlockState
from vllm_shadowkv.state.boundary import ExactBoundary
from vllm_shadowkv.state.due import DueBlocks

BLOCK = 64
LONGEST = 640
HEADS = [[random.Random(seed).randrange(3, 500) for _ in range(400)] for seed in range(2)]

ENGINES = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([60, 90, 150]),
        "asynchronous": st.booleans(),
        "runner": st.sampled_from(["v1", "v2", "v2-cuda"]),
        "max_step": st.sampled_from([33, 96, 300]),
        "policy": st.sampled_from(["fcfs", "priority"]),
        "caching": st.sampled_from([True, True, True, False]),
        "dense_threshold": st.sampled_from([0, 0, 128, 200]),
        "decode_exact_tokens": st.sampled_from([0, 0, 70]),
        "prefill_exact_tokens": st.sampled_from([None, 0, 128]),
        "compression": st.sampled_from([1, 2, 4]),
        "resident_pages": st.sampled_from([True, True, False]),
        "bad_files": st.sampled_from([None, None, 0.0, 0.3]),
    }
)


class Lives(RuleBasedStateMachine):
    """One engine; after every step all of it is held against what the requests' tokens say."""

    def __init__(self) -> None:
        super().__init__()
        self.engine: Engine | None = None
        self.finished: list[Request] = []

    @initialize(options=ENGINES)
    def start(self, options: dict[str, Any]) -> None:
        bad = options["bad_files"] if options["caching"] else None
        options = {name: value for name, value in options.items() if name != "bad_files"}
        self.engine = Engine(max_model_len=LONGEST, files=None if bad is None else Files(bad), **options)

    # -- What happens ------------------------------------------------------------------------------------------------

    @rule(
        head=st.integers(0, 1),
        shared=st.sampled_from([0, 63, 64, 128, 200, 384, 400]),
        own=st.integers(1, 100),
        seed=st.integers(0, 3),
        tokens=st.sampled_from([1, 2, 5, 70, 130]),
        priority=st.integers(0, 2),
    )
    def ask(self, head: int, shared: int, own: int, seed: int, tokens: int, priority: int) -> None:
        draw = random.Random(seed)
        self.engine.add(HEADS[head][:shared] + [draw.randrange(3, 500) for _ in range(own)], tokens, priority=priority)

    @precondition(lambda self: self.finished)
    @rule(data=st.data(), cut=st.integers(0, 70))
    def ask_on(self, data: st.DataObject, cut: int) -> None:
        """The next turn: generated tokens are part of the prompt."""
        tokens = list(data.draw(st.sampled_from(self.finished)).all_token_ids)
        self.engine.add([*tokens[: max(len(tokens) - cut, 1)], 7][: LONGEST - 10], max_tokens=10)

    @rule(count=st.sampled_from([1, 2, 5, 15]))
    def compute(self, count: int) -> None:
        for _ in range(count):
            computed = {name: row.computed for name, row in self.engine.worker.rows.items()}
            output = self.engine.step()
            self._check_step(output, computed)
            self._check_published()
        self.finished = [request for request in self.engine.requests.values() if self._is_done(request)]

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.engine.scheduler.running))
        self.engine.scheduler.running.remove(request)
        self.engine.scheduler._preempt_request(request, 0.0)

    @precondition(lambda self: any(not request.is_finished() for request in self.engine.requests.values()))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        alive = [request for request in self.engine.requests.values() if not request.is_finished()]
        self.engine.abort(data.draw(st.sampled_from(alive)))

    @rule()
    def forget_prefixes(self) -> None:
        scheduler = self.engine.scheduler
        held = scheduler.running or scheduler.deferred_frees or self._loading()
        assert scheduler.reset_prefix_cache() == (not held)

    def teardown(self) -> None:
        if self.engine is not None:
            for _ in range(1000):
                if not self.engine.scheduler.has_unfinished_requests():
                    break
                self.compute(1)
            self.engine.finish()

    # -- What must be so ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.engine is not None)
    @invariant()
    def every_block_has_the_owners_that_it_counts(self) -> None:
        held: Counter[int] = Counter()
        for manager in self.engine.managers:
            of_group: Counter[int] = Counter()
            for blocks in manager.req_to_blocks.values():
                of_group.update(block.block_id for block in blocks if not block.is_null)
            assert not held.keys() & of_group.keys(), "a block is in two groups"
            held |= of_group
        for _, blocks in self.engine.scheduler.deferred_frees:
            held.update(block.block_id for block in blocks)
        for block in self.engine.manager.block_pool.blocks[1:]:
            assert block.ref_cnt == held[block.block_id]
        assert self.engine.free_blocks + len(held) == len(self.engine.worker.content) - 1

    def _check_step(self, output: Any, computed: dict[str, int]) -> None:
        """Of every row that the step computed: what is sealed, what is open, what is exact."""
        worker, config = self.engine.worker, self.engine.config
        names = [name for name in worker.names if name in output.num_scheduled_tokens]
        open_blocks = set()
        for name in names:
            end = worker.rows[name].computed
            begin = end - output.num_scheduled_tokens[name]
            open_blocks |= set(worker.rows[name].blocks[0][begin // BLOCK : -(-end // BLOCK)])
        for index, name in enumerate(names):
            row, hit = worker.rows[name], self.engine.hits[name]
            end = row.computed
            begin = end - output.num_scheduled_tokens[name]
            assert name not in computed or begin in (computed[name], hit), "neither goes on nor begins anew"
            for place, block in enumerate(row.blocks[0][: -(-end // BLOCK)]):
                # What is hit may be computed only in this step, by another request.
                complete = place < begin // BLOCK and block not in open_blocks
                sealed = bool(worker.bound.state.sealed[block])
                assert sealed == (complete and block not in worker.bound.due)
                if sealed:
                    assert worker.content[block] == ("shadow", row.marks[place * BLOCK : (place + 1) * BLOCK])
            start = int(worker.bound.exact_start[index])
            window = config.decode_exact_tokens
            assert begin - start >= min(window, begin - hit), "less is exact than was asked for"
            if begin < config.dense_threshold:
                assert start <= hit, "a short request reads sealed blocks that it need not"

    def _check_published(self) -> None:
        """Whatever can be hit is sealed, or due before the next step, from the tokens that its hash stands for."""
        worker = self.engine.worker
        marks: tuple[dict[bytes, list[int]], ...] = {}, {}
        for request in self.engine.requests.values():
            # What a request has read from files may be published before it runs.
            row = worker.known.get(request.request_id) or Row(list(request.all_token_ids), ([], [], []), 0)
            for place, block_hash in enumerate(request.block_hashes):
                end = (place + 1) * self.engine.hash_size
                if end <= len(row.tokens):
                    row.mark(end - 1)
                    for of_group, size in zip(marks, (BLOCK, worker.page), strict=True):
                        of_group[block_hash] = row.marks[max(end - size, 0) : end]
        for block in self.engine.manager.block_pool.blocks:
            if block.block_hash is not None:
                group = get_group_id(block.block_hash)
                assert group < 1 + self.engine.config.resident_pages, "an exact page or a slot was published"
                expected = marks[group][get_block_hash(block.block_hash)]
                if group == 1:
                    assert worker.content[block.block_id] == ("exact", expected)
                    assert block.block_id not in worker.gone
                elif block.block_id in worker.bound.due:
                    contents = [worker.content[page] for page in worker.bound.due[block.block_id].tolist()]
                    assert {kind for kind, _ in contents} == {"exact"}, "due, but its exact pages are gone"
                    assert [mark for _, held in contents for mark in held] == expected
                else:
                    assert worker.bound.state.sealed[block.block_id], "published, but not sealed"
                    assert worker.content[block.block_id] == ("shadow", expected)

    def _loading(self) -> bool:
        return any(request.status == RequestStatus.WAITING_FOR_REMOTE_KVS for request in self.engine.requests.values())

    def _is_done(self, request: Request) -> bool:
        return request.status == RequestStatus.FINISHED_LENGTH_CAPPED


TestLives = Lives.TestCase
# Shrinking a failure takes minutes: add Phase.shrink to look for the smallest one.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
TestLives = Lives.TestCase
TestLives.settings = settings(deadline=None, max_examples=30, stateful_step_count=25, phases=PHASES)


# -- Errors, planted -------------------------------------------------------------------------------------------------


def published_when_computed(self: ShadowManager, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
    """As stock vLLM: a step too early."""
    FullAttentionManager.cache_blocks(self, request, num_tokens, *args, **kwargs)


def sealed_only_for_its_owner(self: Sealer, bound: Any) -> None:
    bound.due.drop(bound.due.take())


def sealed_after_it_is_read(self: Sealer, bound: Any, rows: list[Any], tables: Any) -> None:
    starts = [row.exact_start for row in rows]
    for row in rows:
        row.exact_start = 0
    seal(self, bound, rows, tables)
    for row, start in zip(rows, starts, strict=True):
        row.exact_start = start


seal = Sealer.seal


def sealed_from_what_others_have_written(self: DueBlocks, pages: Any) -> set[int]:
    return set()


def leaked(self: SlotManager, request_id: str) -> list[Any]:
    """Slots are forgotten, and not given back."""
    self.req_to_blocks.pop(request_id, None)
    self._with_hit.discard(request_id)
    return []


def sealed_in_the_old_epoch(self: BlockState, block_ids: Any, sources: Any) -> None:
    self.sealed[block_ids] = True


def written_in_the_old_epoch(self: BlockState, block_ids: Any) -> None:
    pass


def never_opened(self: BlockState, block_ids: Any) -> None:
    pass


def read_a_block_late(self: ExactBoundary, computed: Any, prefilling: Any, hit: Any) -> Any:
    """The worker reads sealed blocks one block further than they go."""
    return exact_starts(self, computed, prefilling, hit) + self.block_size


exact_starts = ExactBoundary.exact_starts


def taken_for_slots_in_the_old_epoch(self: BlockState, block_ids: Any) -> None:
    pass


def every_source_is_resident(self: BlockState, block_ids: Any) -> Any:
    return self.sources[block_ids]


def hit_without_its_exact_pages(cls: type[ExactManager], **kwargs: Any) -> Any:
    """All pages of a hit are null, though some of its blocks are not sealed yet."""
    (pages,), length = find_exact_hit(**kwargs)
    return ([kwargs["block_pool"].null_block] * len(pages),), length


find_exact_hit = ExactManager.find_longest_cache_hit


class LivesInASmallPool(Lives):
    """Block ids are soon handed out again, which most errors need to show."""

    @initialize(options=ENGINES)
    def start(self, options: dict[str, Any]) -> None:
        super().start(options | {"num_blocks": 60, "compression": 2, "max_step": 300})


@pytest.mark.parametrize(
    ("owner", "name", "planted"),
    [
        (ShadowManager, "cache_blocks", published_when_computed),
        (Sealer, "seal_due", sealed_only_for_its_owner),
        (Sealer, "seal", sealed_after_it_is_read),
        (DueBlocks, "of_pages", sealed_from_what_others_have_written),
        (SlotManager, "pop_blocks_for_free", leaked),
        (BlockState, "seal", sealed_in_the_old_epoch),
        (BlockState, "write_exact", written_in_the_old_epoch),
        (BlockState, "write_open", never_opened),
        (ExactBoundary, "exact_starts", read_a_block_late),
        (BlockState, "write_slots", taken_for_slots_in_the_old_epoch),
        (BlockState, "resident", every_source_is_resident),
        (ExactManager, "find_longest_cache_hit", classmethod(hit_without_its_exact_pages)),
    ],
    ids=lambda value: getattr(value, "__name__", "") if not isinstance(value, type) else "",
)
def test_a_planted_error_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, planted: Callable[..., Any]
) -> None:
    monkeypatch.setattr(owner, name, planted)
    search = settings(TestLives.settings, max_examples=200, derandomize=True, database=None, phases=[Phase.generate])
    with pytest.raises((AssertionError, RuntimeError)):
        run_state_machine_as_test(LivesInASmallPool, settings=search)
