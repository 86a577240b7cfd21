"""The CUDA side in whole engines on the CPU, against the stock backend: planner, kernels on emulated threads, prefill.

In float16, because the CUDA kernels take 16 bits. So tokens may differ where the stock backend itself is undecided, and
log-probabilities by rounding; one wrong value of one token moves them by 2.2 (test_life_of_a_token.py).
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import pytest
from engine import Result, Trial, Trials, largest_error

pytest.importorskip("vllm")

TOLERANCE = 0.15
"""Of log-probabilities; measured: at most 0.06."""
UNDECIDED = 0.2
"""Margin of a greedy choice below which another token is no error."""

SCENARIOS = ("edges", "eight", "prefixes", "short")
HALF: dict[str, Any] = {"dtype": "float16"}
LOSSLESS = {"compression": 1, "key_codec": "none", "dense_threshold": 0, "sparse_budget": 2048, "slot_chunks": 280}

STOCK = Trial("stock-half", SCENARIOS, shadowkv=None, options=HALF)
V1 = Trial("cuda-v1", SCENARIOS, LOSSLESS | {"block_size": 256}, options=HALF, emulated_cuda=True, poison=True)
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


def agreed(ours: dict[str, Any], stock: dict[str, Any]) -> int:
    """How many tokens are those of the stock backend, up to the first that it was itself undecided about.

    Raises:
        AssertionError: the first other token is one that the stock backend was sure of.
    """
    pairs = zip(ours["tokens"], stock["tokens"], strict=True)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if same < len(stock["tokens"]):
        margin = stock["margins"][same]
        assert margin < UNDECIDED, f"token {same} is another one, where the stock backend had a margin of {margin:.2f}"
    return same


@pytest.fixture
def stock(trials: Trials) -> Result:
    return trials(STOCK)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trial", "scenario"),
    [
        pytest.param(trial, scenario, id=f"{trial.name} {scenario}")
        for trial in (V1, WINDOWS, V2_GRAPHS)
        for scenario in trial.scenarios
    ],
)
def test_says_what_the_stock_backend_says(trials: Trials, stock: Result, trial: Trial, scenario: str) -> None:
    ours, theirs = trials(trial).sequences[scenario], stock.sequences[scenario]
    assert ours.keys() == theirs.keys()
    compared = 0
    for name in ours:
        same = agreed(ours[name], theirs[name])
        assert largest_error({name: ours[name]}, {name: theirs[name]}, tokens=same) <= TOLERANCE
        compared += same
    assert compared > sum(len(sequence["tokens"]) for sequence in theirs.values()) / 2


@pytest.mark.slow
@pytest.mark.parametrize("trial", [V1, WINDOWS, V2_GRAPHS], ids=lambda trial: trial.name)
def test_blocks_are_sealed_and_their_pages_poisoned(trials: Trials, trial: Trial) -> None:
    counts = trials(trial).counts
    assert counts["seals"] > 20
    assert counts["poisoned"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("trial", [V2_GRAPHS], ids=lambda trial: trial.name)
def test_graphs_were_replayed(trials: Trials, trial: Trial) -> None:
    assert trials(trial).counts["replays"] > 50
