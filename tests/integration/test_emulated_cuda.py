"""The CUDA side in whole engines on the CPU, against the stock backend: planner, kernels on emulated threads, prefill.

In float16, because the CUDA kernels take 16 bits.
"""

from __future__ import annotations

from typing import Any

import pytest
from engine import Result, Trial, Trials, differences

pytest.importorskip("vllm")

# Of log-probabilities; measured: at most 0.0075. One wrong value of one token makes 2.2 (test_life_of_a_token.py).
TOLERANCE = 0.03

SCENARIOS = ("edges", "eight", "prefixes", "short")
HALF: dict[str, Any] = {"dtype": "float16"}
LOSSLESS = {"compression": 1, "key_codec": "none", "dense_threshold": 0, "sparse_budget": 2048, "slot_chunks": 280}

STOCK = Trial("stock-half", SCENARIOS, shadowkv=None, options=HALF)
# Prefill and decode read sealed blocks early.
WINDOWS = Trial(
    "cuda-windows",
    ("edges", "prefixes"),
    LOSSLESS | {"block_size": 64, "dense_threshold": 300, "prefill_exact_tokens": 256, "slot_chunks": 304},
    options=HALF,
    emulated_cuda=True,
    poison=True,
)
V2_GRAPHS = Trial(
    "cuda-v2-graphs",
    SCENARIOS,
    LOSSLESS | {"block_size": 256},
    runner="v2",
    options=HALF,
    asynchronous=True,
    graphs=True,
    emulated_cuda=True,
    poison=True,
)


@pytest.fixture
def stock(trials: Trials) -> Result:
    return trials(STOCK)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trial", "scenario"),
    [
        pytest.param(trial, scenario, id=f"{trial.name} {scenario}")
        for trial in (WINDOWS, V2_GRAPHS)
        for scenario in trial.scenarios
    ],
)
def test_says_what_the_stock_backend_says(trials: Trials, stock: Result, trial: Trial, scenario: str) -> None:
    assert differences(trials(trial).sequences[scenario], stock.sequences[scenario], TOLERANCE) == []


@pytest.mark.slow
@pytest.mark.parametrize("trial", [WINDOWS, V2_GRAPHS], ids=lambda trial: trial.name)
def test_blocks_are_sealed_and_their_pages_poisoned(trials: Trials, trial: Trial) -> None:
    counts = trials(trial).counts
    assert counts["seals"] > 20
    assert counts["poisoned"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("trial", [V2_GRAPHS], ids=lambda trial: trial.name)
def test_graphs_were_replayed(trials: Trials, trial: Trial) -> None:
    assert trials(trial).counts["replays"] > 50
