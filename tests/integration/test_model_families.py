"""One of each family of architectures: default settings, two ranks, a pool too small, and what `plan` says of it."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from architectures import write_model
from engine import ModelTrial, Trial, Trials, differences, each_trial
from model_trials import BESIDE, LOSSLESS, MAMBA2, MIXED, POOL, STOCK, WINDOWED, check_choices, of

from vllm_shadowkv.cli import arguments
from vllm_shadowkv.cli.pool_plan import make

pytest.importorskip("vllm")

ORDINARY = Trial(
    "ordinary",
    ("long",),
    {},
    options={"max_model_len": 5120, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": 200},
)

# Of full layers: eight KV heads of 64 in the first, one of 256 in the second. Then one of each family: windows, sinks,
# a norm after RoPE, M-RoPE, short convolutions, Mamba 2 and gated delta nets.
FAMILIES = ("gemma-3", "gpt-oss", "hunyuan", "qwen2.5-vl", "lfm2", "granite-4-h", "qwen3-next")
LONG_MODELS = [
    ModelTrial(f"{name}, ordinary", name, (of(name, ORDINARY),), slow=True)
    for name in ("llama-3.1", "gemma", *FAMILIES)
]


@each_trial(*LONG_MODELS)
def test_ordinary_settings(trials: Trials, trial: ModelTrial) -> None:
    found = trials(trial)["ordinary"]
    for sequence in found.sequences["long"].values():
        assert len(sequence["tokens"]) == 8
        assert all(map(math.isfinite, sequence["logprobs"]))
    assert found.counts["seals"] > 0


# One of each family whose heads, sinks or states ranks share, and Gemma 3, whose one KV head both ranks have.
RANKED = ("gemma-3", "gpt-oss", "granite-4-h", "qwen2.5-vl")
RANKED_TOLERANCE = 2e-3  # measured: 0.0002; two ranks add up in another order
ONE_RANK = replace(STOCK, scenarios=("short",))
TWO_RANKS = Trial("two ranks", ("short",), LOSSLESS.shadowkv, in_process=False)


def _ranked(name: str, engine: Trial, ranks: int) -> ModelTrial:
    options = (BESIDE if name in WINDOWED else POOL) | {"tensor_parallel_size": ranks}
    return ModelTrial(f"{name}, ranks: {ranks}", name, (of(name, engine, **options),), slow=True)


RANKED_MODELS = [_ranked(name, TWO_RANKS, 2) for name in RANKED]


@each_trial(*RANKED_MODELS)
def test_two_ranks_equal_one_of_stock(trials: Trials, trial: ModelTrial) -> None:
    ours = trials(trial)["two ranks"]
    stock = trials(_ranked(trial.architecture, ONE_RANK, 1))["stock"]
    assert differences(ours.sequences["short"], stock.sequences["short"], RANKED_TOLERANCE) == []
    assert ours.counts["vllm:shadowkv_sealed_blocks_total"] > 4


# Pages of 128 tokens, as those of the layers with sliding windows, and 1024 tokens in slots.
BESIDE_WINDOWS = {
    "block_size": 128,
    "compression": 1,
    "key_codec": "none",
    "value_dtype": "auto",
    "dense_threshold": 0,
    "prefill_exact_tokens": 0,
    "sparse_budget": 1024,
    "slot_chunks": 176,
}
SHARED = ("prefixes", "preemption", "aborts")
DEEP_TOLERANCE = 5e-3  # measured: 0.0007; 0.002 between two stock engines whose pools differ
FULL_LAYERS = Trial(
    "full layers",
    SHARED,
    BESIDE_WINDOWS,
    options={"max_model_len": 1024, "num_gpu_blocks_override": 45},
    poison=True,
)
STOCK_BESIDE = Trial("stock", SHARED, shadowkv=None, options={"max_model_len": 1024})
BLOCKS = {
    "gemma-3": 45,
    "gpt-oss": 38,
    "hunyuan": 34,
    "qwen2.5-vl": 34,
    "lfm2": 38,
    "granite-4-h": 35,
    "qwen3-next": 38,
}
"""Room for what is admitted, and too little once it grows."""


def _sharing(name: str, engine: Trial, suffix: str = "", **options: Any) -> ModelTrial:
    scenarios = tuple(scenario for scenario in SHARED if name not in MAMBA2 or scenario != "prefixes")
    engine = replace(of(name, engine, **options), scenarios=scenarios)
    return ModelTrial(f"{name}, sharing{suffix}", name, (engine,), slow=True)


SHARING = [_sharing(name, FULL_LAYERS, num_gpu_blocks_override=BLOCKS[name]) for name in FAMILIES]


@each_trial(*SHARING)
def test_a_pool_that_is_too_small_and_shared(trials: Trials, trial: ModelTrial) -> None:
    """VLLM zeroes what layers of other backends get of ours (`other_layers.spec_dtype`)."""
    ours = trials(trial)["full layers"]
    stock = trials(_sharing(trial.architecture, STOCK_BESIDE, ", stock"))["stock"]
    for scenario in stock.sequences:
        assert differences(ours.sequences[scenario], stock.sequences[scenario], DEEP_TOLERANCE) == []
    check_choices(stock, "preemption")
    assert ours.counts["preemptions"] > 0 or trial.architecture in MAMBA2  # of no size of pool known yet
    assert ours.counts["seals"] > 10
    assert ours.counts["poisoned"] > 100
    if "prefixes" in stock.sequences:
        assert ours.sequences["prefixes"]["again"]["cached"] == 640


POOL_OF_A_GIB = Trial("pool", (), {}, options={"enable_prefix_caching": False})
FULL_ONLY = ("llama-3.1", "step-3", "nemotron-super")
PLANNED_MODELS = [
    ModelTrial(f"{name}, pool", name, (of(name, POOL_OF_A_GIB),), slow=name != MIXED)
    for name in (
        *(MIXED, "gpt-oss", "command-a", "olmo-3", "exaone-4", "llama-4"),
        *("lfm2", "granite-4-h", "falcon-h1", "nemotron-h", "qwen3-next", "qwen3.5", *FULL_ONLY),
    )
]


@each_trial(*PLANNED_MODELS)
def test_the_pool_is_what_plan_says(trials: Trials, trial: ModelTrial, tmp_path: Path) -> None:
    """`vllm-shadowkv plan` counts the layers beside ours from config.json, and imports no vLLM."""
    counts = trials(trial)["pool"].counts
    write_model(trial.architecture, tmp_path)
    parser = argparse.ArgumentParser()
    arguments.add(parser, plan=True)
    line = ["--dtype", "float32", "--device", "cpu", "--kv-cache-gib", "1", "--max-model-len", "2048"]
    plan = make(parser.parse_args([str(tmp_path), *line, "--max-num-batched-tokens", "200"]))
    assert (trial.architecture in FULL_ONLY) == (not plan.pool.others)
    assert plan.num_blocks == counts["blocks"]
    assert plan.num_blocks * plan.pool.block_bytes == counts["device bytes"]
    assert plan.host_pool_bytes == counts["host bytes"]
    assert plan.pool.boundary.prefill_exact_tokens == counts["exact prompt tokens"]
    assert plan.min_blocks - 1 == counts["blocks of the longest request"], "the null block is not counted there"
