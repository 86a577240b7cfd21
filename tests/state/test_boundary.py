from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.state.boundary import ExactBoundary

BLOCK = 64
MAX_LEN = 40 * BLOCK


def rule(
    dense: int = 0,
    prefill: int | None = 0,
    decode: int = 0,
    step: int = 128,
    max_len: int = MAX_LEN,
    exact_tokens: int = 16,
) -> ExactBoundary:
    return ExactBoundary(
        block_size=BLOCK,
        exact_tokens=exact_tokens,
        dense_threshold=dense,
        prefill_exact_tokens=prefill,
        decode_exact_tokens=decode,
        max_step_tokens=step,
        max_model_len=max_len,
    )


LENGTHS = st.integers(0, MAX_LEN)
WINDOWS = st.integers(0, 10 * BLOCK)
RULES = st.builds(rule, dense=WINDOWS, prefill=WINDOWS, decode=WINDOWS, step=st.integers(1, 300))

quick = settings(deadline=None)


def hits(computed: int) -> st.SearchStrategy[int]:
    return st.integers(0, computed // BLOCK).map(lambda blocks: blocks * BLOCK)


def test_settings_become_the_rule() -> None:
    config = ShadowKVConfig(
        block_size=2048, compression=4, dense_threshold=5, prefill_exact_tokens=7, decode_exact_tokens=9
    )
    assert ExactBoundary.of(config, max_step_tokens=100, max_model_len=1000) == ExactBoundary(
        block_size=2048,
        exact_tokens=512,
        dense_threshold=5,
        prefill_exact_tokens=7,
        decode_exact_tokens=9,
        max_step_tokens=100,
        max_model_len=1000,
    )
    assert ExactBoundary.of(config, max_step_tokens=8192, max_model_len=1000).max_step_tokens == 1000


@quick
@given(data=st.data(), boundary=RULES, computed=LENGTHS, prefilling=st.booleans())
def test_it_is_a_block_between_the_hit_and_the_open_block(
    data: st.DataObject, boundary: ExactBoundary, computed: int, prefilling: bool
) -> None:
    hit = data.draw(hits(computed))
    start = boundary.exact_start(computed, prefilling, hit)
    assert start % BLOCK == 0
    assert hit <= start <= computed // BLOCK * BLOCK


@quick
@given(data=st.data(), boundary=RULES, computed=LENGTHS, more=st.integers(0, 2 * BLOCK), prefilling=st.booleans())
def test_it_never_moves_back(
    data: st.DataObject, boundary: ExactBoundary, computed: int, more: int, prefilling: bool
) -> None:
    hit = data.draw(hits(computed))
    now = boundary.exact_start(computed, prefilling, hit)
    assert boundary.exact_start(computed + more, prefilling, hit) >= now
    # Prefill may turn into decode; that gives up exact tokens, and never wants some back.
    assert boundary.exact_start(computed + more, False, hit) >= now


@quick
@given(boundary=RULES, rows=st.lists(st.tuples(LENGTHS, st.booleans(), st.integers(0, 20)), min_size=1, max_size=8))
def test_many_at_once_are_the_same(boundary: ExactBoundary, rows: list[tuple[int, bool, int]]) -> None:
    rows = [(computed, prefilling, min(hit * BLOCK, computed // BLOCK * BLOCK)) for computed, prefilling, hit in rows]
    computed, prefilling, hits = (torch.tensor(column) for column in zip(*rows, strict=True))
    starts = boundary.exact_starts(computed.int(), prefilling, hits.int())
    assert starts.dtype == torch.int32
    assert starts.tolist() == [boundary.exact_start(*row) for row in rows]


@given(boundary=RULES, computed=LENGTHS, prefilling=st.booleans())
def test_short_requests_are_exact(boundary: ExactBoundary, computed: int, prefilling: bool) -> None:
    if computed < boundary.dense_threshold:
        assert boundary.exact_start(computed, prefilling) == 0


@quick
@given(boundary=RULES, computed=LENGTHS, prefilling=st.booleans())
def test_the_window_stays_exact(boundary: ExactBoundary, computed: int, prefilling: bool) -> None:
    window = boundary.prefill_exact_tokens if prefilling else boundary.decode_exact_tokens
    assert window is not None
    exact = computed - boundary.exact_start(computed, prefilling)
    assert exact >= min(window, computed)
    if computed >= boundary.dense_threshold:
        assert exact < max(window, boundary.decode_exact_tokens) + BLOCK, "keeps more than a cut block beside it"


@pytest.mark.parametrize(
    ("computed", "prefilling", "start"),
    [
        (0, True, 0),
        (4095, False, 0),
        (4096, False, 4096),
        (5119, False, 4096),
        (5120, False, 5120),
        (122_880, False, 122_880),
        (8192, True, 0),
        (8193, True, 0),
        (9216, True, 1024),
        (122_880, True, 114_688),
    ],
)
def test_examples(computed: int, prefilling: bool, start: int) -> None:
    boundary = ExactBoundary.of(ShadowKVConfig(prefill_exact_tokens=8192), 8192, 131_072)
    assert boundary.exact_start(computed, prefilling) == start


def test_the_prefill_window_must_be_resolved_first() -> None:
    unresolved = rule(prefill=None)
    with pytest.raises(AssertionError, match="resolve"):
        unresolved.exact_start(BLOCK, prefilling=True)


@quick
@given(num_blocks=st.integers(1, 5000), step=st.integers(1, 300), max_len=st.integers(BLOCK, MAX_LEN))
def test_an_open_window_resolves_to_at_most_half_of_the_pool(num_blocks: int, step: int, max_len: int) -> None:
    unresolved = rule(prefill=None, step=step, max_len=max_len)
    boundary = unresolved.resolve(num_blocks)
    window = boundary.prefill_exact_tokens
    assert window is not None
    assert window % BLOCK == 0
    assert 0 <= window <= max_len
    if window:
        assert boundary.max_exact_pages <= max(num_blocks // 2, unresolved.max_exact_pages)
    assert boundary.resolve(num_blocks) == boundary, "resolved once"


@quick
@given(boundary=RULES, beside=st.integers(0, 20), num_blocks=st.integers(1, 500))
def test_a_pool_that_is_too_small_fits_the_longest_request(
    boundary: ExactBoundary, beside: int, num_blocks: int
) -> None:
    """As vLLM does for --max-model-len auto: the longest that fits, and not one token more."""
    boundary = boundary.beside(beside)
    fitted = boundary.fit(num_blocks)
    assert boundary.of_length(boundary.max_model_len) == boundary
    if boundary.min_blocks <= num_blocks:
        assert fitted == boundary
        return
    assert fitted == boundary.of_length(fitted.max_model_len)
    assert fitted.min_blocks <= num_blocks or fitted.max_model_len == 1
    assert boundary.of_length(fitted.max_model_len + 1).min_blocks > num_blocks


def test_a_large_pool_keeps_whole_prompts_exact() -> None:
    boundary = rule(prefill=None).resolve(10_000)
    assert boundary.exact_start(MAX_LEN - 1, prefilling=True) == 0


def test_a_window_that_is_set_does_not_depend_on_the_pool() -> None:
    assert rule(prefill=77).resolve(30) == rule(prefill=77).resolve(300) == rule(prefill=77)


@quick
@given(boundary=RULES, data=st.data())
def test_slots_are_there_whenever_sealed_blocks_are_read(boundary: ExactBoundary, data: st.DataObject) -> None:
    computed = data.draw(LENGTHS)
    hit = data.draw(hits(computed))
    end = computed + data.draw(st.integers(1, boundary.max_step_tokens))
    for prefilling in (False, True):
        if boundary.exact_start(computed, prefilling, hit) > 0:
            assert boundary.reads_sealed(end, hit)
    if end <= boundary.dense_threshold and not hit:
        assert not boundary.reads_sealed(end, hit), "a short request needs no slots"


@dataclass
class Pages:
    """What the manager has done to one request's exact pages, by the rule it follows (`ExactManager`)."""

    boundary: ExactBoundary
    prefill_end: int
    freed: int
    """Tokens below have no pages any more."""
    before: int = 0
    now: int = 0
    most: int = 0
    """Most tokens that had pages at once."""

    def schedule(self, processed: int, end: int) -> None:
        if processed != self.now:
            self.before, self.now = self.now, processed
        start = self.boundary.exact_start(self.before, prefilling=self.before < self.prefill_end)
        self.freed = max(self.freed, start)
        self.most = max(self.most, end - self.freed)


def run_request(
    boundary: ExactBoundary,
    prompt: int,
    decode_steps: int,
    hit: int,
    lag: int,
    chunk: Callable[[], int],
    resumed_at: int = 0,
) -> Pages:
    """Runs a request; checks that whatever the worker reads in a step still has its pages in that step.

    `lag`: steps in flight when the next one is scheduled. `resumed_at`: the prompt's length, where the "prompt" of this
    admission ends with tokens that were generated before a preemption.
    """
    pages = Pages(boundary, prefill_end=prompt, freed=hit)
    prompt_only = resumed_at or prompt
    computed, sealed, history = hit, hit, [hit]
    while computed < prompt + decode_steps:
        end = min(computed + chunk(), prompt) if computed < prompt else computed + 1
        pages.schedule(history[max(len(history) - 1 - lag, 0)], end)
        # The worker: several tokens are a prompt's; a single one may be either (`Planner._read_rows`).
        prefilling = end - computed > 1 or computed < prompt_only
        assert boundary.exact_start(computed, prefilling, hit) >= pages.freed, "reads pages that were freed"
        assert sealed >= pages.freed, "seals pages that were freed"
        sealed = computed // BLOCK * BLOCK
        computed = end
        history.append(computed)
    return pages


@quick
@given(
    data=st.data(), boundary=RULES, prompt=st.integers(1, 800), decode_steps=st.integers(0, 200), lag=st.integers(0, 2)
)
def test_the_worker_never_reads_what_the_manager_has_freed(
    data: st.DataObject, boundary: ExactBoundary, prompt: int, decode_steps: int, lag: int
) -> None:
    hit = data.draw(hits(prompt - 1))
    resumed_at = data.draw(st.sampled_from([0, max(prompt // 2, 1)]))
    chunks = data.draw(st.lists(st.integers(1, boundary.max_step_tokens), min_size=1, max_size=5))

    def chunk() -> int:
        chunks.append(chunks.pop(0))
        return chunks[0]

    pages = run_request(boundary, prompt, decode_steps, hit, lag, chunk, resumed_at)
    bound = replace(boundary, steps_in_flight=lag + 1)
    held = -(-pages.most // boundary.exact_tokens)
    assert held <= bound.max_exact_pages, "holds more pages than admission counts on"
