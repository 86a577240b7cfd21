"""The block managers under vLLM's own scheduler; `simulation.py` checks every read of every step."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterable
from itertools import pairwise, takewhile
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulation import Engine, Files, exact_boundary
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_group_id, resolve_block_hashes
from vllm.v1.request import Request

from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.integration.scheduler.exact import ExactManager

BLOCK = 64
PAGE = 16
BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
EARLY = pytest.mark.parametrize("runner", ["v2-cuda", "v1"], ids=["early", "late"])
"""Blocks are sealed as soon as they are complete, or when they must be."""


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 500) for _ in range(length)]


def published(engine: Engine, request: Request) -> int:
    """Blocks of the request's content that are published, without a lookup, which publishes more."""
    hashes = resolve_block_hashes(request.block_hashes, engine.hash_size, BLOCK)
    found = (engine.manager.block_pool.get_cached_block(block_hash, [0]) for block_hash in hashes)
    return len(list(takewhile(bool, found)))


def real(blocks: Iterable[KVCacheBlock]) -> list[bool]:
    return [not block.is_null for block in blocks]


def held(engine: Engine, request: Request) -> tuple[list[KVCacheBlock], ...]:
    return engine.manager.coordinator.get_blocks(request.request_id)


def preempt(engine: Engine, request: Request) -> None:
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)


# -- Publication -----------------------------------------------------------------------------------------------------


@EARLY
def test_a_hash_is_visible_only_after_its_block_was_sealed(runner: str) -> None:
    """Or will be, whenever a row reads it."""
    engine = Engine(max_step=BLOCK, runner=runner)
    request = engine.add(prompt(5 * BLOCK + 1), max_tokens=3)
    state, due = engine.worker.bound.state, engine.worker.bound.due
    seen = []
    while not request.is_finished():
        engine.step()
        if not request.is_finished():
            count = published(engine, request)
            seen.append(count)
            blocks = [block.block_id for block in held(engine, request)[0][:count]]
            assert all(state.sealed[block] or (block in due and runner == "v1") for block in blocks)
    # Step k computes block k, step k + 1 publishes it first, and seals it before its forward pass.
    assert seen == [0, 1, 2, 3, 4, 5, 5]
    engine.finish()


@BOTH
def test_a_finished_request_publishes_what_its_last_step_sealed(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    request = engine.add(prompt(3 * BLOCK), max_tokens=2)
    engine.finish()
    assert published(engine, request) == 3


@BOTH
@pytest.mark.parametrize("generated", [1, BLOCK + 1])
def test_of_what_the_last_step_completed_only_the_prompts_blocks_are_published(
    asynchronous: bool, generated: int
) -> None:
    """Nothing seals one that ends with a generated token: less than a block of its exact pages is hit. The asynchronous
    scheduler offers it for caching when it has that step's output."""
    engine = Engine(asynchronous=asynchronous, max_step=256)
    total = 4 * BLOCK
    first = engine.add(prompt(total - generated + 1), max_tokens=generated)
    engine.finish()
    assert first.num_computed_tokens == total
    blocks = 4 if generated == 1 else 3
    assert published(engine, first) == blocks
    second = engine.add([*first.all_token_ids, 4, 5], max_tokens=4)
    engine.finish()
    assert engine.hits[second.request_id] == (total if generated == 1 else blocks * BLOCK + BLOCK - PAGE)


@BOTH
def test_a_prompt_that_was_aborted_is_sealed_without_it(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous, max_step=256)
    gone = engine.add(prompt(600), max_tokens=4)
    engine.step()
    engine.abort(gone)
    assert engine.worker.sealed == 0
    second = engine.add(prompt(600), max_tokens=4)
    engine.step()
    assert engine.hits[second.request_id] == 256
    assert engine.worker.sealed == 4, "before the step that reads them"
    engine.finish()


@BOTH
@EARLY
def test_pages_that_are_given_away_before_their_block_is_sealed(asynchronous: bool, runner: str) -> None:
    """The pool is so small that the next prompt takes the pages of the one before in the step that seals from them."""
    engine = Engine(asynchronous=asynchronous, num_blocks=26, max_model_len=320, max_step=256, runner=runner)
    requests = [engine.add(prompt(256, seed), max_tokens=1) for seed in range(4)]
    engine.finish()
    rows = [engine.worker.known[request.request_id].blocks for request in requests]
    for before, after in pairwise(rows):
        assert {*before[1]} & {*after[0], *after[1]}, "nothing was given away"
    engine.add(prompt(10), max_tokens=1)
    engine.finish()
    # Where blocks wait, those that were given away with their pages are never sealed.
    assert engine.worker.sealed == (16 if runner == "v2-cuda" else 8)


@EARLY
def test_a_block_waits_until_it_is_read_or_its_pages_are_taken(runner: str) -> None:
    """And is then what it was when it was completed: the simulation compares."""
    waits = runner == "v1"
    engine = Engine(runner=runner, dense_threshold=300, max_step=256)
    due = engine.worker.bound.due
    engine.add(prompt(256), max_tokens=40)
    engine.finish()
    assert engine.worker.sealed == (0 if waits else 4), "its owner was exact to its end"
    assert len(due) == (4 if waits else 0)
    second = engine.add(prompt(290), max_tokens=20)
    while second.num_computed_tokens < 300:
        engine.step()
    assert engine.hits[second.request_id] == 256
    assert engine.worker.sealed == (0 if waits else 4), "so far it is exact, too"
    engine.finish()
    assert engine.worker.sealed == 4, "blocks that it reads, once"
    for seed in range(1, 20):  # until pages of the first ones were given to others
        engine.add(prompt(256, seed), max_tokens=1)
    engine.finish()
    assert engine.worker.sealed > 8
    assert 4 <= len(due) <= (40 if waits else 4), "those of the newest, whose pages still are what they were"


def freed_when_sealed(self: ExactManager, request_id: str, processed: int, *args: Any) -> None:
    """A step too early."""
    self._processed[request_id] = (processed, processed)
    remove_skipped_blocks(self, request_id, processed, *args)


remove_skipped_blocks = ExactManager.remove_skipped_blocks


@pytest.mark.parametrize("planted", [False, True])
def test_a_generated_block_is_sealed_from_pages_that_are_freed_a_step_later(
    planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With resident pages they would stay what they are, and where blocks wait nothing is lost before they are sealed.
    engine = Engine(dense_threshold=0, resident_pages=False, runner="v2-cuda")
    engine.add(prompt(BLOCK // 2), max_tokens=BLOCK)
    if planted:
        monkeypatch.setattr(ExactManager, "remove_skipped_blocks", freed_when_sealed)
        with pytest.raises(
            (AssertionError, RuntimeError), match=r"seals what is no exact page|its exact pages are gone"
        ):
            engine.finish()
    else:
        engine.finish()
        assert engine.worker.sealed == 1


def test_where_pages_are_zeroed_a_block_is_sealed_only_if_its_owner_goes_on() -> None:
    engine = Engine(max_step=256, zeroed=True)
    engine.add(prompt(256), max_tokens=1)
    engine.finish()
    second = engine.add(prompt(300), max_tokens=2)
    engine.step()
    assert engine.hits[second.request_id] == 0, "nobody has sealed it"
    engine.finish()
    third = engine.add(prompt(300), max_tokens=2)
    engine.finish()
    assert engine.hits[third.request_id] == 256


@BOTH
def test_a_preempted_request_publishes_nothing_more(asynchronous: bool) -> None:
    """Of the step that is being scheduled, which computes nothing of it then."""
    engine = Engine(asynchronous=asynchronous)
    request = engine.add(prompt(3 * BLOCK), max_tokens=50)
    engine.step()
    engine.scheduler.schedule()
    before = published(engine, request)
    shadow = engine.managers[0]
    sealing = shadow._scheduled[request.request_id].tokens // BLOCK
    assert before < sealing, "there was something to publish"
    preempt(engine, request)  # by another request of that step, which this test leaves unfinished
    assert published(engine, request) == before


@BOTH
@pytest.mark.parametrize("runner", ["v1", "v2", "v2-cuda"])
def test_a_preempted_request_hits_what_it_has_published(asynchronous: bool, runner: str) -> None:
    engine = Engine(asynchronous=asynchronous, runner=runner)
    request = engine.add(prompt(3 * BLOCK), max_tokens=3 * BLOCK)
    while request.num_computed_tokens < 5 * BLOCK:
        engine.step()
    own = published(engine, request)
    assert own >= 4, "generated tokens too"
    preempt(engine, request)
    engine.step()
    engine.step()
    assert request.num_preemptions == 1
    assert engine.hits[request.request_id] == own * BLOCK + BLOCK - PAGE
    engine.finish()
    assert request.num_output_tokens == 3 * BLOCK


@BOTH
def test_generated_tokens_are_shared_too(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    first = engine.add(prompt(40), max_tokens=2 * BLOCK)
    engine.finish()
    second = engine.add([*first.all_token_ids, 7], max_tokens=2)
    engine.finish()
    assert engine.hits[second.request_id] == (40 + 2 * BLOCK - 1) // PAGE * PAGE


@BOTH
@pytest.mark.parametrize(
    "chosen",
    [
        {"prefill_exact_tokens": 320},
        {"dense_threshold": 0, "prefill_exact_tokens": 320},
        {"dense_threshold": 0, "prefill_exact_tokens": 0},
    ],
    ids=str,
)
def test_requests_of_one_step_hit_each_other(asynchronous: bool, chosen: dict[str, int]) -> None:
    """As far as the later one may read exactly: nothing is sealed yet."""
    engine = Engine(max_step=640, asynchronous=asynchronous, **chosen)
    texts = {name: prompt(200 + 30 * place) for place, name in enumerate("abc")}
    names = [engine.add(text, 4, name).request_id for name, text in texts.items()]
    engine.step()
    alone = chosen.get("prefill_exact_tokens") == 0
    assert [engine.hits[name] for name in names] == ([0, 48, 48] if alone else [0, 192, 224])
    engine.finish()
    assert engine.worker.sealed == (10 if alone else 4), "three shared, and one more"


def test_a_later_request_hits_what_a_running_one_computes_in_the_same_step() -> None:
    engine = Engine(max_step=400)
    first = engine.add(prompt(600), max_tokens=2)
    engine.step()
    second = engine.add(prompt(600), max_tokens=2)
    engine.step()
    assert (first.num_computed_tokens, engine.hits[second.request_id]) == (600, 592)
    engine.finish()


def test_requests_of_one_step_do_not_hit_each_other_without_resident_pages() -> None:
    engine = Engine(max_step=640, resident_pages=False)
    names = [engine.add(prompt(200), name=name).request_id for name in ("a", "b")]
    engine.step()
    assert [engine.hits[name] for name in names] == [0, 0]
    engine.finish()


# -- Hits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("shared", "total", "sealed", "tail"),
    [
        (63, 300, 0, 48),
        (64, 300, 64, 0),
        (127, 128, 64, 48),
        (200, 300, 192, 0),
        (230, 300, 192, 32),
        (256, 257, 256, 0),
        (256, 256, 192, 48),
    ],
)
def test_a_hit_is_whole_blocks_and_a_tail_of_exact_pages(
    shared: int, total: int, sealed: int, tail: int, resident: bool
) -> None:
    """Below the dense threshold with the blocks' exact pages, too."""
    hit = sealed + tail * resident
    engine = Engine(max_step=640, resident_pages=resident)
    engine.add(prompt(300), max_tokens=4)
    engine.finish()
    second = engine.add(prompt(300)[:shared] + prompt(total - shared, seed=1), max_tokens=4)
    engine.step()
    assert engine.hits[second.request_id] == hit
    _, exact, slots = held(engine, second)
    start = 0 if resident and hit < 128 else sealed
    assert real(exact) == [place * PAGE >= start for place in range(-(-total // PAGE))]
    assert len(slots) == 3, "a hit, or more tokens than the dense threshold, may read sealed blocks"
    engine.finish()


def test_sharers_share_blocks() -> None:
    engine = Engine(max_step=640)
    engine.add(prompt(300), max_tokens=4)
    engine.finish()
    sharers = [engine.add(prompt(256) + prompt(30, seed), max_tokens=20) for seed in range(1, 5)]
    before = engine.free_blocks
    engine.step()
    rows = [engine.rows(request)[0] for request in sharers]
    assert len({tuple(row[:4]) for row in rows}) == 1
    assert len({block for row in rows for block in row}) == 4 + 4
    # Each: an own block, three slot pages, the exact pages of 30 tokens.
    assert before - engine.free_blocks == 4 + 4 * (1 + 3 + 2)
    engine.finish()


def test_without_prefix_caching_nothing_is_shared_and_exact_pages_go_all_the_same() -> None:
    engine = Engine(caching=False, max_step=640)
    first = engine.add(prompt(300), max_tokens=30)
    for _ in range(3):
        engine.step()
    assert sum(real(held(engine, first)[1])) == 3, "exact pages of the open block: 300 - 256 tokens"
    engine.finish()
    second = engine.add(prompt(300), max_tokens=4)
    engine.finish()
    assert engine.hits[second.request_id] == 0


def test_resetting_the_prefix_cache() -> None:
    engine = Engine()
    engine.add(prompt(300), max_tokens=4)
    engine.finish()
    assert engine.scheduler.reset_prefix_cache()
    second = engine.add(prompt(300), max_tokens=4)
    engine.finish()
    assert engine.hits[second.request_id] == 0


# -- Exact pages -----------------------------------------------------------------------------------------------------


def test_a_short_request_stays_exact_and_takes_no_slots() -> None:
    engine = Engine(dense_threshold=256)
    request = engine.add(prompt(200), max_tokens=50)
    while not request.is_finished():
        engine.step()
        if not request.is_finished():
            assert all(real(held(engine, request)[1]))
            assert held(engine, request)[2] == []
    assert engine.worker.decoded == engine.worker.prefilled_over_sealed == 0
    engine.finish()


def test_slots_are_taken_in_the_step_that_may_first_need_them() -> None:
    engine = Engine(dense_threshold=128, max_step=64)
    request = engine.add(prompt(100), max_tokens=100)
    counts = {}
    while not request.is_finished():
        engine.step()
        if not request.is_finished():
            counts[request.num_computed_tokens] = len(held(engine, request)[2])
    # The step that computes token 129 is the first that finds 128 tokens computed.
    assert all(count == (3 if computed > 128 else 0) for computed, count in counts.items())
    assert set(counts.values()) == {0, 3}
    engine.finish()


def test_a_request_that_ends_with_its_prompt_takes_no_slots() -> None:
    engine = Engine(dense_threshold=64, prefill_exact_tokens=0, resident_pages=False)
    for text in (prompt(300), prompt(300), [*prompt(256), 7, 8]):  # the later two start on sealed blocks
        request = engine.add(text, max_tokens=1)
        while not request.is_finished():
            engine.step()
            assert request.is_finished() or held(engine, request)[2] == []
        engine.finish()
    assert engine.hits[request.request_id] == 256
    assert engine.worker.prefilled_over_sealed > 0


def test_a_step_of_one_token_has_slots_whatever_comes_after_it() -> None:
    """Where all rows compute one token, CUDA plans the step as decode."""
    engine = Engine(dense_threshold=64, prefill_exact_tokens=0)
    engine.add(prompt(300), max_tokens=1)
    engine.finish()
    last = engine.add([*prompt(256), 7], max_tokens=1)
    engine.scheduler.schedule()
    assert engine.manager.get_block_ids(last.request_id)[2] != []


def test_exact_pages_go_one_step_after_the_boundary_has_passed_them() -> None:
    engine = Engine(dense_threshold=0, prefill_exact_tokens=0, max_step=BLOCK)
    request = engine.add(prompt(5 * BLOCK), max_tokens=2)
    for step in range(5):
        engine.step()
        # Step k starts at token 64 k; the block before it is sealed in this step, and read for that.
        exact = real(held(engine, request)[1])
        assert exact == [place >= 4 * (step - 1) for place in range(4 * (step + 1))]
    engine.finish()


def test_a_long_prompt_keeps_its_prefill_window() -> None:
    engine = Engine(num_blocks=60, prefill_exact_tokens=2 * BLOCK, max_step=48, resident_pages=False)
    request = engine.add(prompt(9 * BLOCK), max_tokens=30)
    most = 0
    while request.num_computed_tokens < 9 * BLOCK:
        engine.step()
        exact = real(held(engine, request)[1])
        most = max(most, sum(exact))
        assert sum(exact) * PAGE >= min(2 * BLOCK, request.num_computed_tokens)
    assert most <= engine.managers[1].boundary.max_exact_pages == -(-(2 * BLOCK + 2 * 48 + 2 * BLOCK) // PAGE)
    assert engine.worker.prefilled_over_sealed > 0
    engine.finish()


def test_decode_keeps_its_window() -> None:
    engine = Engine(decode_exact_tokens=100)
    request = engine.add(prompt(300), max_tokens=100)
    while not request.is_finished():
        engine.step()
        if not request.is_finished():
            assert sum(real(held(engine, request)[1])) * PAGE >= min(100, request.num_computed_tokens)
    engine.finish()


@BOTH
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
@pytest.mark.parametrize(
    ("max_model_len", "max_step", "chosen"),
    [
        (1280, 300, {}),
        (1280, 33, {}),
        (1280, 300, {"prefill_exact_tokens": 200}),
        (1280, 33, {"decode_exact_tokens": 100}),
        (4000, 33, {}),
    ],
)
def test_the_smallest_pool_serves_the_longest_request(
    asynchronous: bool, caching: bool, max_model_len: int, max_step: int, chosen: dict[str, int]
) -> None:
    config = ShadowKVConfig(block_size=BLOCK, compression=4, dense_threshold=128, **chosen)  # type: ignore[arg-type]
    boundary = exact_boundary(config, max_step, max_model_len, asynchronous)
    engine = Engine(
        num_blocks=boundary.max_exact_pages + boundary.other_pages,
        max_model_len=max_model_len,
        max_step=max_step,
        asynchronous=asynchronous,
        caching=caching,
        **chosen,
    )
    engine.add(prompt(max_model_len - 70), max_tokens=70)
    engine.finish(limit=500)
    assert engine.preemptions == 0


@BOTH
def test_requests_that_end_with_their_prompt_cost_others_nothing(asynchronous: bool) -> None:
    """Their last blocks are sealed without a table: on CUDA no later step may wait for the device because of them."""
    engine = Engine(asynchronous=asynchronous, runner="v2-cuda", max_step=640, dense_threshold=0)
    request = engine.add(prompt(10), max_tokens=3 * BLOCK - 20)
    for seed in range(3):
        engine.add(prompt(2 * BLOCK + 37 * seed, seed), max_tokens=1)
    counts = engine.worker.planner.counts
    while len(engine.worker.rows) != 1 or request.num_output_tokens < 8:
        engine.step()
    before = counts.table_reads
    engine.finish()
    assert request.num_output_tokens == 3 * BLOCK - 20
    assert counts.table_reads - before == 2, "two blocks that it begins"


# -- Resident pages --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("runner", ["v1", "v2", "v2-cuda"])
def test_a_long_prompt_in_an_empty_pool_is_exact(asynchronous: bool, runner: str) -> None:
    """Its pages are freed behind its window, and read all the same."""
    engine = Engine(prefill_exact_tokens=2 * BLOCK, max_step=48, asynchronous=asynchronous, runner=runner)
    engine.add(prompt(9 * BLOCK), max_tokens=30)
    engine.finish()
    worker = engine.worker
    assert worker.prefilled_over_sealed == worker.planner.counts.expanded_tokens == 0
    assert worker.planner.counts.resident_tokens == worker.resident_tokens > 0
    assert worker.resident_chunks == worker.filled > 0
    again = engine.add(prompt(9 * BLOCK), max_tokens=30)
    engine.finish()
    assert engine.hits[again.request_id] == 9 * BLOCK - PAGE
    assert worker.prefilled_over_sealed == 0
    assert worker.resident_chunks == worker.filled


def test_in_a_full_pool_sealed_blocks_are_read_as_such() -> None:
    engine = Engine(num_blocks=100, prefill_exact_tokens=0, max_step=96)
    requests = [engine.add(prompt(550, seed), max_tokens=60) for seed in range(12)]
    engine.finish()
    worker = engine.worker
    assert worker.prefilled_over_sealed > 0
    assert 0 < worker.resident_chunks < worker.filled
    assert [request.num_output_tokens for request in requests] == [60] * 12


def cached_in_order(engine: Engine) -> list[int]:
    """Of every free block, from the first to be given away on: the group that can hit it, or -1."""
    free = engine.manager.block_pool.free_block_queue.get_all_free_blocks()
    return [-1 if block.block_hash is None else get_group_id(block.block_hash) for block in free]


def test_what_is_given_away_first() -> None:
    """What nobody can hit, then exact pages, then sealed blocks; of pages those of the oldest, first ones first."""
    engine = Engine(num_blocks=200, dense_threshold=0)
    requests = [engine.add(prompt(200 + 64 * seed, seed), max_tokens=2) for seed in range(3)]
    engine.finish()
    order = cached_in_order(engine)
    assert order == sorted(order, key=[-1, 1, 0].index)
    assert order.count(0) == 3 + 4 + 5
    assert order.count(1) == 4 * order.count(0)
    pages = [block.block_id for block in engine.manager.block_pool.free_block_queue.get_all_free_blocks()]
    pages = [page for page, group in zip(pages, order, strict=True) if group == 1]
    for request in requests:
        own = engine.worker.known[request.request_id].blocks[1]
        places = [own.index(page) for page in pages if page in own]
        assert places == sorted(places)
    again = engine.add(prompt(200), max_tokens=2)  # the first one's: used again, so its turn is later
    engine.finish()
    assert engine.hits[again.request_id] == 192
    order = cached_in_order(engine)
    assert order == sorted(order, key=[-1, 1, 0].index)


@pytest.mark.parametrize("asked", [list(range(9)), [*range(8, -1, -1)], [3, 1, 4, 1, 5, 8, 2, 6, 7, 0]])
def test_the_prefix_cache_holds_as_many_tokens_as_without_resident_pages(asked: list[int]) -> None:
    """Documents that just fit sealed, asked again in any order."""
    hits = []
    for resident in (True, False):
        engine = Engine(num_blocks=130, max_step=96, dense_threshold=0, resident_pages=resident)
        for seed in range(9):
            engine.add(prompt(600, seed), max_tokens=2)
            engine.finish()
        requests = []
        for seed in asked:
            requests.append(engine.add(prompt(600, seed), max_tokens=2))
            engine.finish()
        hits.append([engine.hits[request.request_id] // BLOCK for request in requests])
    assert hits == [[9] * len(asked)] * 2


def test_admission_asks_for_no_more_pages_than_without_resident_pages() -> None:
    """With so few blocks free that only one more request is admitted; pages of its hit are left where they are."""
    for spare in range(40):
        admitted = []
        for resident in (True, False):
            engine = Engine(num_blocks=120, dense_threshold=500, max_step=640, resident_pages=resident)
            engine.add(prompt(450), max_tokens=1)
            engine.finish()
            pool = engine.manager.block_pool
            pool.get_new_blocks(pool.get_num_free_blocks() - 7 - spare - 28)  # 7 sealed blocks, and 28 exact pages
            request = engine.add(prompt(450), max_tokens=2)
            engine.scheduler.schedule()
            admitted.append(request.num_computed_tokens)
        assert admitted[0] == admitted[1], spare


@pytest.mark.parametrize("zeroed", [False, True], ids=["", "zeroed"])
@pytest.mark.parametrize("first_row", ["owner", "sharer"])
def test_a_block_that_its_owner_seals_in_the_step_that_hits_it(first_row: str, zeroed: bool) -> None:
    """Whichever comes first among the rows; only the owner has the pages. Zeroed: of a prompt; else generated."""
    engine = Engine(max_step=200, zeroed=zeroed, dense_threshold=0)
    order: Any = engine.worker.draw
    order.shuffle = lambda names: names.sort(reverse=first_row == "sharer")
    owner = engine.add(prompt(300 if zeroed else 60), max_tokens=80, name="owner")
    while owner.num_computed_tokens < (200 if zeroed else BLOCK):
        engine.step()
    sharer = engine.add([*owner.all_token_ids, 7, 8][:301], max_tokens=4, name="sharer")
    before = engine.worker.sealed
    engine.step()
    assert engine.hits[sharer.request_id] == (192 if zeroed else BLOCK)
    assert engine.worker.sealed > before, "it was sealed before"
    engine.finish()


@BOTH
def test_a_request_that_begins_within_a_block_with_one_token(asynchronous: bool) -> None:
    """On CUDA that step reads no table; the id of its open block was a sealed one's before."""
    engine = Engine(asynchronous=asynchronous, runner="v2-cuda", num_blocks=40, max_model_len=320, max_step=320)
    for seed in range(1, 6):  # every block has been a sealed one
        engine.add(prompt(300, seed), max_tokens=1)
        engine.finish()
    engine.add(prompt(113), max_tokens=1)
    engine.finish()
    request = engine.add([*prompt(112), 7], max_tokens=90)
    engine.step()
    assert engine.hits[request.request_id] == 112
    opened = engine.rows(request)[0][1]
    while request.num_computed_tokens < 2 * BLOCK + 2:
        assert not engine.worker.bound.state.sealed[opened] or request.num_computed_tokens > 2 * BLOCK
        engine.step()
    engine.finish()


# -- Preemption and storms -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("runner", ["v1", "v2", "v2-cuda"])
def test_preempted_requests_resume(asynchronous: bool, runner: str) -> None:
    engine = Engine(num_blocks=60, asynchronous=asynchronous, runner=runner, dense_threshold=1000, max_model_len=512)
    requests = [engine.add(prompt(150, seed), max_tokens=120) for seed in range(4)]
    engine.finish()
    assert engine.preemptions > 0
    assert [request.num_output_tokens for request in requests] == [120] * 4


@BOTH
@pytest.mark.parametrize("runner", ["v1", "v2", "v2-cuda"])
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
def test_generated_tokens_are_a_prompt_once_they_are_computed_again(
    asynchronous: bool, runner: str, caching: bool
) -> None:
    # The worker computes several in a step, and reads the prefill window for them.
    engine = Engine(
        asynchronous=asynchronous,
        runner=runner,
        caching=caching,
        dense_threshold=0,
        prefill_exact_tokens=4 * BLOCK,
        max_step=48,
    )
    request = engine.add(prompt(50), max_tokens=500)
    for computed in (300, 500):
        while request.num_computed_tokens < computed:
            engine.step()
        preempt(engine, request)
    engine.finish()
    assert request.num_output_tokens == 500


@BOTH
def test_aborted_requests_leave_nothing(asynchronous: bool) -> None:
    engine = Engine(asynchronous=asynchronous)
    for steps in range(8):
        request = engine.add(prompt(300, seed=steps), max_tokens=50)
        for _ in range(steps):
            engine.step()
        engine.abort(request)
    engine.finish()


def storm(seed: int, **options: object) -> Engine:
    """Requests with common beginnings come, stop, are preempted and go, in an engine drawn at random."""
    draw = random.Random(seed)
    chosen: dict[str, object] = {
        "num_blocks": draw.choice([70, 90, 150]),
        "asynchronous": draw.random() < 0.5,
        "runner": draw.choice(["v1", "v2", "v2-cuda"]),
        "max_step": draw.choice([33, 96, 300]),
        "caching": draw.random() < 0.8,
        "dense_threshold": draw.choice([0, 128, 200]),
        "decode_exact_tokens": draw.choice([0, 0, 70]),
        "prefill_exact_tokens": draw.choice([None, 0, 128]),
        "compression": draw.choice([1, 2, 4]),
        "resident_pages": seed % 3 > 0,
    }
    if chosen["caching"] and draw.random() < 0.5:
        chosen["files"] = Files(bad=draw.choice([0.0, 0.2]))
    engine = Engine(**(chosen | options))  # type: ignore[arg-type]
    heads = [prompt(400, seed=head) for head in range(2)]
    requests = []
    for _ in range(12):
        for _ in range(draw.randrange(3)):
            head = draw.choice(heads)[: draw.choice([0, 64, 128, 200, 384, 400])]
            tail = prompt(draw.choice([1, 5, 63, 64, 100]), seed=draw.randrange(10))
            requests.append(engine.add(head + tail, max_tokens=draw.choice([1, 1, 2, 30, 120])))
        for _ in range(draw.randrange(1, 8)):
            engine.step()
        if requests and draw.random() < 0.15:
            request = draw.choice(requests)
            if not request.is_finished():
                engine.abort(request)
        if draw.random() < (0.5 if "files" in chosen else 0.1):
            engine.scheduler.reset_prefix_cache()
    engine.finish()
    return engine


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32))
@example(seed=365441)  # a block that is still to be computed has its right bytes, from a life before
def test_storms(seed: int) -> None:
    storm(seed)


@pytest.mark.parametrize("seed", [0, 4])
def test_a_storm_meets_all_that_there_is(seed: int) -> None:
    engine = storm(seed)
    resident = engine.config.resident_pages
    assert resident == (seed == 4)
    assert sum(engine.hits.values())
    assert engine.worker.decoded
    assert resident or engine.worker.prefilled_over_sealed
    assert bool(engine.worker.resident_chunks) == bool(engine.worker.resident_tokens) == resident


def test_managers_go_with_their_scheduler() -> None:
    engine = Engine()
    managers = [weakref.ref(manager) for manager in engine.managers]
    del engine
    gc.collect()
    assert [manager() for manager in managers] == [None, None, None]
