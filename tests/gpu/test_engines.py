"""Where sealing loses nothing, engines on a GPU say what vLLM's own FlashAttention says there.

The scenarios are those of tests/integration, on tiny random weights in float16: both model runners, eager, with full
CUDA graphs and as vLLM would run them, with drafts, and in a pool that preempts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from engine import Result, Trial, Trials, differences, each_scenario, each_trial
from sharp_model import write_sharp_model
from test_life_of_a_token import LOSSLESS, NGRAM, WINDOWS

SCENARIOS = ("edges", "eight", "generation", "prefixes", "preemption", "longest", "aborts", "alone", "reset", "storm")
TOLERANCE = 0.03
"""Of log-probabilities. On emulated threads the kernels are at most 0.0075 from the stock backend on a CPU."""

OPTIONS: dict[str, Any] = {
    "dtype": "float16",
    "num_gpu_blocks_override": 400,
    # Tiny engines: vLLM would ask for most of the GPU, and warm kernels up for minutes; `MEASURED` does that once.
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 1 << 30,
    "kernel_config": {"enable_jit_warmup": False},
}
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]},
}

STOCK = Trial("stock", (*SCENARIOS, "twice"), shadowkv=None, options=OPTIONS)
EAGER = Trial("eager", SCENARIOS, LOSSLESS | {"block_size": 256}, options=OPTIONS, poison=True)
V1, V2 = (replace(EAGER, name=f"{runner}-eager", runner=runner) for runner in ("v1", "v2"))
V1_GRAPHS, V2_GRAPHS = (
    # Without poison, which waits for the device.
    replace(trial, name=f"{trial.runner}-graphs", options=OPTIONS | GRAPHS, asynchronous=True, poison=False)
    for trial in (V1, V2)
)
# It measures its memory, graphs too, over a KV cache that it throws away, and warms its kernels up.
MEASURED: dict[str, Any] = {"enforce_eager": False, "kv_cache_memory_bytes": None, "kernel_config": {}}
V2_AS_VLLM_WOULD = replace(V2_GRAPHS, name="v2-default", options=OPTIONS | MEASURED)
# The least for one request of 2,048 tokens, and a page for each of two steps in flight.
V2_SMALL_POOL = replace(V2_GRAPHS, name="v2-small-pool", options=OPTIONS | GRAPHS | {"num_gpu_blocks_override": 24})
V1_WINDOWS = replace(
    V1,
    name="v1-windows",
    shadowkv=LOSSLESS | WINDOWS | {"slot_chunks": 304},
)
V1_DRAFTS = replace(
    V1,
    name="v1-drafts",
    scenarios=("eight", "prefixes", "twice"),
    options=OPTIONS | {"speculative_config": NGRAM, "async_scheduling": False},
)
TRIALS = (V1, V2, V1_GRAPHS, V2_GRAPHS, V2_AS_VLLM_WOULD, V2_SMALL_POOL, V1_WINDOWS, V1_DRAFTS)

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    """One engine at a time: each takes its share of the GPU's memory."""
    model = tmp_path_factory.mktemp("sharp_model")
    write_sharp_model(model)
    trials = Trials(model, tmp_path_factory.mktemp("trials"), "gpu")
    yield trials
    trials.close()


@pytest.fixture
def stock(trials: Trials) -> Result:
    return trials(STOCK)


@each_scenario(TRIALS)
def test_equals_flash_attention(trials: Trials, stock: Result, trial: Trial, scenario: str) -> None:
    ours, theirs = trials(trial).sequences[scenario], stock.sequences[scenario]
    assert differences(ours, theirs, TOLERANCE, undecided=2 * TOLERANCE) == []


@each_trial(*TRIALS)
def test_blocks_are_sealed_and_read(trials: Trials, trial: Trial) -> None:
    counts = trials(trial).counts
    assert counts["seals"] > 20
    assert counts["vllm:shadowkv_slot_misses_total"] > 100
    assert counts["vllm:shadowkv_expanded_tokens_total"] > 1000
    assert counts["host pools left"] == 0
    assert counts["host pools at start-up"] > 0
    if trial.poison:
        assert counts["poisoned"] > 100


@each_trial(V1_GRAPHS, V2_GRAPHS, V2_AS_VLLM_WOULD, V2_SMALL_POOL)
def test_graphs_are_replayed(trials: Trials, trial: Trial) -> None:
    counts = trials(trial).counts
    assert counts["replays"] > 500
    assert counts["asynchronous steps"] > 500


def test_a_small_pool_preempts(trials: Trials) -> None:
    assert trials(V2_SMALL_POOL).counts["preemptions"] > 0


def test_drafts_were_accepted(trials: Trials) -> None:
    assert trials(V1_DRAFTS).counts["accepted drafts"] > 200
