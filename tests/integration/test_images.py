"""Models that take images, asked about images, against the stock backend; `images.py` has their processors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine import ModelTrial, Trial, Trials, differences, each_trial
from images import OPTIONS, PROCESSORS
from model_trials import LOSSLESS, SMALL, STOCK, TOLERANCE, check_choices

pytest.importorskip("vllm")

ASKED = ("images",)
POOL = OPTIONS | {"num_gpu_blocks_override": 200}
OF_STOCK = replace(STOCK, scenarios=ASKED, options=POOL)
OURS = replace(LOSSLESS, scenarios=ASKED, options=POOL)
IN_A_SMALL_POOL = replace(OURS, options=POOL | {"num_gpu_blocks_override": 100})
REBUILT = Trial("rebuilt", ASKED, SMALL, options=POOL, plants=("not turned back",))
# Blocks of 256 tokens and exact pages of 64; every request is short enough to stay exact.
DENSE = Trial("dense", ASKED, {"block_size": 256, "compression": 4}, options=POOL, plants=("images not hashed",))

ORDINARY = {"mistral-3.1", "internvl-3"}
"""Those that turn a token of an image by its place in the prompt. M-RoPE, of the others, turns it by three positions,
and beside images keys are not compressed then."""


MROPE = "qwen2.5-vl"
PREEMPTED = {"mistral-3.1", MROPE}


def _trial(name: str) -> ModelTrial:
    ours = IN_A_SMALL_POOL if name in PREEMPTED else OURS
    engines = (OF_STOCK, ours, *((REBUILT, DENSE) if name in ORDINARY else ()))
    return ModelTrial(f"{name}, images", name, engines, slow=True, images=True)


TRIALS = [_trial(name) for name in PROCESSORS]
COMPRESSED = [trial for trial in TRIALS if trial.architecture in ORDINARY]
V2 = ModelTrial(f"{MROPE}, images, v2", MROPE, (replace(OURS, runner="v2"),), "v2", slow=True, images=True)

HEAD, LEAST = 70, 90
"""Tokens of text before the image, and of the image at least."""


def _error(ours: dict[str, Any], stock: dict[str, Any]) -> float:
    """Mean difference of the log-probabilities of two prompts' tokens, from the image on."""
    pairs = list(zip(ours["prompt"][HEAD:], stock["prompt"][HEAD:], strict=True))
    assert len(pairs) > LEAST
    return sum(abs(one - other) for one, other in pairs) / len(pairs)


def _check_hits(found: dict[str, Any]) -> None:
    """A prefix with an image is hit with the same image, and with another one up to the image."""
    cached = {name: sequence["cached"] for name, sequence in found.items()}
    assert cached["longer"] == cached["two images"] == cached["again"] > HEAD + LEAST
    assert cached["another image"] <= HEAD


@each_trial(*TRIALS)
def test_equals_stock(trials: Trials, trial: ModelTrial) -> None:
    stock, ours = (trials(trial)[engine] for engine in ("stock", "lossless"))
    check_choices(stock, "images")
    said = stock.sequences["images"]
    assert _error(said["scored"], said["scored, another image"]) > 0.3, "what it says depends on the image"
    assert differences(ours.sequences["images"], said, TOLERANCE) == []
    _check_hits(ours.sequences["images"])
    assert (ours.counts["preemptions"] > 0) == (trial.architecture in PREEMPTED)
    assert ours.counts["seals"] > 4
    assert ours.counts["poisoned"] > 20


@each_trial(*COMPRESSED)
def test_keys_of_images_are_rebuilt_as_the_model_turned_them(trials: Trials, trial: ModelTrial) -> None:
    """Measured: at most 0.017, and at least 0.37 with an error."""
    ours, stock = trials(trial)["rebuilt"], trials(trial)["stock"].sequences["images"]
    for name in ("scored", "scored, another image"):
        assert _error(ours.sequences["images"][name], stock[name]) < 0.03
        assert _error(ours.planted["not turned back"][name], stock[name]) > 0.15
    _check_hits(ours.sequences["images"])


@each_trial(*COMPRESSED)
def test_equals_stock_over_exact_pages(trials: Trials, trial: ModelTrial) -> None:
    ours, stock = trials(trial)["dense"], trials(trial)["stock"].sequences["images"]
    assert differences(ours.sequences["images"], stock, TOLERANCE) == []
    _check_hits(ours.sequences["images"])
    confused = ours.planted["images not hashed"]
    assert confused["another image"]["cached"] > HEAD + LEAST
    assert differences(confused, stock, TOLERANCE) != []


@each_trial(V2)
def test_equals_stock_on_the_v2_runner(trials: Trials, trial: ModelTrial) -> None:
    ours, stock = trials(trial)["lossless"], trials(_trial(trial.architecture))["stock"]
    assert differences(ours.sequences["images"], stock.sequences["images"], TOLERANCE) == []
    _check_hits(ours.sequences["images"])
    assert ours.counts["seals"] > 4
