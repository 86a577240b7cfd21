"""Architectures that vLLM knows, each as a tiny random model, against the stock backend."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from architectures import IMAGES, NAMES, write_model
from engine import ModelTrial, Result, Trial, Trials, differences, each_trial

from vllm_shadowkv.cli import arguments
from vllm_shadowkv.cli.pool_plan import make

pytest.importorskip("vllm")

# Measured: at most 4e-5.
TOLERANCE = 5e-4

SMALL = {"block_size": 64, "compression": 1, "dense_threshold": 0, "prefill_exact_tokens": 0, "slot_chunks": 304}
SMALL |= {"resident_pages": False}
POOL = {"max_model_len": 512, "num_gpu_blocks_override": 96, "enable_prefix_caching": False}

STOCK = Trial("stock", ("short", "scored"), shadowkv=None, options=POOL)
# As many basis vectors as tokens: nothing is lost but what 8 bits round, unless keys are not turned as the model does.
REBUILT = Trial("rebuilt", ("scored",), SMALL, options=POOL, plants=("not turned back",))
ORDINARY = Trial(
    "ordinary",
    ("long",),
    {},
    options={"max_model_len": 5120, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": 200},
)
LOSSLESS = Trial("lossless", ("short", "scored"), SMALL | {"key_codec": "none"}, options=POOL, poison=True)


def _of(name: str, engine: Trial, **options: Any) -> Trial:
    """An engine with the options that an architecture asks for."""
    if name in IMAGES:  # vLLM asks for a processor of images where it may get one
        options["language_model_only"] = True
    if name in MAMBA2:  # beside cached prefixes vLLM 0.32 takes one prompt a step on the CPU
        options["enable_prefix_caching"] = False
    return replace(engine, options={**engine.options, **options})


MAMBA2 = {"granite-4-h", "falcon-h1", "nemotron-h"}


def _engines(name: str) -> tuple[Trial, ...]:
    """The engines of an architecture: some have layers beside ours, or none of ours rotates."""
    engines = (STOCK, REBUILT, LOSSLESS)
    if name in WINDOWED:
        engines = tuple(replace(engine, options=BESIDE) for engine in engines)
    engines = tuple(_of(name, engine) for engine in engines)
    if name == "gpt-oss":
        engines = tuple(replace(e, plants=(*e.plants, "no sinks") if e.plants else ()) for e in engines)
    if name in UNTURNED:
        engines = tuple(replace(engine, plants=("turned",) if engine.plants else ()) for engine in engines)
    return engines


MIXED = "gemma-3"
WINDOWED = {
    MIXED,
    "command-a",
    "olmo-3",
    "exaone-4",
    "exaone-moe",
    "trinity",
    "llama-4",
    "gpt-oss",
    "gemma-3-mm",
}
"""Those with layers that stay with vLLM's own backend."""
UNTURNED = {"command-a", "exaone-4", "exaone-moe", "trinity", "llama-4", "nemotron-h"}
"""Those whose layers of ours do not rotate."""
BESIDE = POOL | {"block_size": 64, "num_gpu_blocks_override": 200}  # the others' pages fit ours
QUICK = {"llama-3.1", "phi-4-mini", "smollm3", "exaone-4"}
"""Scaled, partial, by Transformers with layers that do not rotate, with windows; tests of rotations are elsewhere."""
MODELS = [ModelTrial(name, name, _engines(name), slow=name not in QUICK) for name in NAMES]


# Of full layers: eight KV heads of 64 in the first, one of 256 in the second. Then one of each family: windows, sinks,
# a norm after RoPE, M-RoPE, short convolutions, Mamba 2 and gated delta nets.
FAMILIES = ("gemma-3", "gpt-oss", "hunyuan", "qwen2.5-vl", "lfm2", "granite-4-h", "qwen3-next")
LONG_MODELS = [
    ModelTrial(f"{name}, ordinary", name, (_of(name, ORDINARY),), slow=True)
    for name in ("llama-3.1", "gemma", *FAMILIES)
]


def check_choices(stock: Result, scenario: str) -> None:
    """Greedy choices that noise cannot turn, and not the same one all the time; else choose another seed."""
    sequences = stock.sequences[scenario].values()
    assert min(margin for found in sequences for margin in found["margins"]) > 1e-4
    assert len({token for found in sequences for token in found["tokens"]}) > 20


@each_trial(*MODELS)
def test_equals_stock(trials: Trials, trial: ModelTrial) -> None:
    stock, ours = (trials(trial)[engine] for engine in ("stock", "lossless"))
    check_choices(stock, "short")
    for scenario in ("short", "scored"):
        assert differences(ours.sequences[scenario], stock.sequences[scenario], TOLERANCE) == []
    for name, found in stock.sequences["scored"].items():
        assert len(found["prompt"]) > 140
        assert ours.sequences["scored"][name]["prompt"] == pytest.approx(found["prompt"], abs=TOLERANCE)
    assert ours.counts["seals"] > 4
    assert ours.counts["poisoned"] > 20


@each_trial(*MODELS)
def test_keys_are_rebuilt_as_the_model_turned_them(trials: Trials, trial: ModelTrial) -> None:
    """Measured: up to 0.027 in the prompts and 0.09 in decode; at least 14 times as much with an error."""
    ours, stock = trials(trial)["rebuilt"], trials(trial)["stock"].sequences["scored"]
    assert _prompt_error(ours.sequences["scored"], stock) < 0.03
    assert _decode_error(ours.sequences["scored"], stock) < 0.2
    # Two of LFM2's five layers attend, and less goes wrong with them.
    least = 0.04 if trial.architecture.startswith("lfm2") else 0.15
    for planted in ours.planted.values():
        assert _prompt_error(planted, stock) > max(least, 10 * _prompt_error(ours.sequences["scored"], stock))


def _prompt_error(ours: dict[str, Any], stock: dict[str, Any]) -> float:
    """Mean error of log-probabilities of the prompts from the second block on."""
    errors = [
        abs(one - other)
        for name in stock
        for one, other in zip(ours[name]["prompt"][64:], stock[name]["prompt"][64:], strict=True)
    ]
    assert len(errors) > 1000
    return sum(errors) / len(errors)


def _decode_error(ours: dict[str, Any], stock: dict[str, Any]) -> float:
    """Mean error of the second tokens, where the first ones are equal."""
    errors = [
        abs(ours[name]["logprobs"][1] - stock[name]["logprobs"][1])
        for name in stock
        if ours[name]["tokens"] == stock[name]["tokens"]
    ]
    assert len(errors) > len(stock) / 2
    return sum(errors) / len(errors)


# The two that most people run of those with layers beside ours: on the V2 runner, and with CUDA's planner and kernels.
# Without graphs, which vLLM's CPU backend of the other layers has none of.
# vLLM runs Gemma 3 in no float16, and in bfloat16 rounding alone is as large as some errors.
HALF = BESIDE | {"dtype": "float16"}
HALF_TOLERANCE = 0.03  # measured: at most 0.008
V2_MODELS = [
    ModelTrial(f"{name}, v2", name, (replace(LOSSLESS, runner="v2", options=BESIDE),), "v2", slow=True)
    for name in ("gemma-3", "gpt-oss")
]
CUDA_MODELS = [
    ModelTrial(
        f"{name}, CUDA",
        name,
        (
            Trial("stock", ("short",), shadowkv=None, options=HALF),
            replace(LOSSLESS, scenarios=("short",), options=HALF, emulated_cuda="flash_attention"),
        ),
        slow=True,
    )
    for name in ("olmo-3", "gpt-oss")
]


# One of each family whose heads, sinks or states ranks share, and Gemma 3, whose one KV head both ranks have.
RANKED = ("gemma-3", "gpt-oss", "granite-4-h", "qwen2.5-vl")
RANKED_TOLERANCE = 2e-3  # measured: 0.0002; two ranks add up in another order
TWO_RANKS = Trial("two ranks", ("short",), LOSSLESS.shadowkv, in_process=False)
RANKED_MODELS = [
    ModelTrial(
        f"{name}, two ranks",
        name,
        (_of(name, TWO_RANKS, **(BESIDE if name in WINDOWED else POOL), tensor_parallel_size=2),),
        slow=True,
    )
    for name in RANKED
]


@each_trial(*RANKED_MODELS)
def test_two_ranks_equal_one_of_stock(trials: Trials, trial: ModelTrial) -> None:
    ours = trials(trial)["two ranks"]
    (stock,) = (trials(of_one)["stock"] for of_one in MODELS if of_one.name == trial.architecture)
    assert differences(ours.sequences["short"], stock.sequences["short"], RANKED_TOLERANCE) == []
    assert ours.counts["vllm:shadowkv_sealed_blocks_total"] > 4


@each_trial(*V2_MODELS)
def test_equals_stock_on_the_v2_runner(trials: Trials, trial: ModelTrial) -> None:
    ours = trials(trial)["lossless"]
    (stock,) = (trials(of_v1)["stock"] for of_v1 in MODELS if of_v1.name == trial.architecture)
    for scenario in ("short", "scored"):
        assert differences(ours.sequences[scenario], stock.sequences[scenario], TOLERANCE) == []
    assert ours.counts["seals"] > 4


@each_trial(*CUDA_MODELS)
def test_equals_stock_with_the_kernels_of_cuda(trials: Trials, trial: ModelTrial) -> None:
    ours, stock = (trials(trial)[engine].sequences["short"] for engine in ("lossless", "stock"))
    assert differences(ours, stock, HALF_TOLERANCE, undecided=2 * HALF_TOLERANCE) == []


@each_trial(*LONG_MODELS)
def test_ordinary_settings(trials: Trials, trial: ModelTrial) -> None:
    found = trials(trial)["ordinary"]
    for sequence in found.sequences["long"].values():
        assert len(sequence["tokens"]) == 8
        assert all(map(math.isfinite, sequence["logprobs"]))
    assert found.counts["seals"] > 0


# Pages of 128 tokens, as those of the layers with sliding windows, and 1024 tokens in slots.
BESIDE_WINDOWS = {
    "block_size": 128,
    "compression": 1,
    "key_codec": "none",
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
    engine = replace(_of(name, engine, **options), scenarios=scenarios)
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
    assert ours.counts["seals"] > 20
    assert ours.counts["poisoned"] > 100
    if "prefixes" in stock.sequences:
        assert ours.sequences["prefixes"]["again"]["cached"] == 640


POOL_OF_A_GIB = Trial("pool", (), {}, options={"enable_prefix_caching": False})
FULL_ONLY = ("llama-3.1", "step-3", "nemotron-super")
PLANNED_MODELS = [
    ModelTrial(f"{name}, pool", name, (_of(name, POOL_OF_A_GIB),), slow=name != MIXED)
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
