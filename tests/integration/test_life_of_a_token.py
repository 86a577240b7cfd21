"""A token's life in vLLM, against the stock backend: prefill, seal, decode, sharing, preemption, abort.

With `compression` 1 and `key_codec` none a sealed block holds its keys exactly, and with a budget that covers the
context every chunk is selected. So greedy tokens must be equal, and log-probabilities up to fp32 noise. Pages that
nobody may read are full of NaN. At the end, errors are planted in the plugin: the comparison notices each of them.

One file, because `make test` runs a file in one process, and engines are started once per process.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from engine import Result, Trial, Trials, differences, each_plant, each_scenario, each_trial, largest_error

from vllm_shadowkv.cli import arguments
from vllm_shadowkv.cli.pool_plan import make
from vllm_shadowkv.state.decode import DecodeRows

pytest.importorskip("vllm")

# Measured: at most 3.1e-5 in any trial here. One wrong value of one token makes 2.2.
TOLERANCE = 5e-4
HALF_TOLERANCE = 0.03  # measured: at most 0.0075

EVERYWHERE = (
    "edges",
    "eight",
    "generation",
    "prefixes",
    "branches",
    "preemption",
    "longest",
    "aborts",
    "alone",
    "reset",
    "storm",
    "short",
)
ONLY_V1 = ("generation_together", "seeded", "twice")

STOCK = Trial("stock", EVERYWHERE + ONLY_V1, shadowkv=None)

# Sealed blocks are read as such; with `RESIDENT` as long as they must be.
LOSSLESS = {
    "compression": 1,
    "key_codec": "none",
    "value_dtype": "auto",
    "dense_threshold": 0,
    "sparse_budget": 2048,
    "slot_chunks": 280,
    "resident_pages": False,
}
RESIDENT = {"resident_pages": True}
# Small windows: prefill and decode read sealed blocks early, and the dense threshold is crossed on the way.
WINDOWS = {"block_size": 64, "dense_threshold": 600, "prefill_exact_tokens": 256, "decode_exact_tokens": 128}

V1 = Trial("v1", EVERYWHERE + ONLY_V1, LOSSLESS | {"block_size": 256}, poison=True)
V1_WINDOWS = Trial(
    "v1-windows",
    ("edges", "eight", "generation", "prefixes", "longest", "aborts", "alone", "storm"),
    LOSSLESS | WINDOWS | {"slot_chunks": 304},
    poison=True,
)
# The least that vLLM accepts for one request of 2048 tokens: 8 blocks, 4 exact pages, 10 slot pages and the null block.
V1_SMALL_POOL = Trial(
    "v1-small-pool",
    EVERYWHERE,
    LOSSLESS | {"block_size": 256},
    options={"num_gpu_blocks_override": 23},
    poison=True,
    quick=("preemption", "prefixes", "longest", "reset", "storm"),
)
V1_SPAWNED = Trial("v1-spawned", ("short", "prefixes"), LOSSLESS | {"block_size": 256}, in_process=False, quick=())
V1_TWO_RANKS = Trial(
    "v1-two-ranks",
    ("short", "prefixes"),
    LOSSLESS | {"block_size": 256},
    options={"tensor_parallel_size": 2},
    in_process=False,
    quick=(),
)
V1_COMPILED = Trial(
    "v1-compiled",
    ("short", "eight"),
    LOSSLESS | {"block_size": 256},
    options={"enforce_eager": False},
    poison=True,
    quick=(),
)
V2 = Trial("v2", EVERYWHERE, LOSSLESS | {"block_size": 256}, runner="v2", poison=True, quick=())
# One exact page more than above: two steps are in flight.
V2_GRAPHS = Trial(
    "v2-graphs",
    EVERYWHERE,
    LOSSLESS | {"block_size": 256},
    runner="v2",
    options={"num_gpu_blocks_override": 24},
    asynchronous=True,
    graphs=True,
    warm_up=True,
    poison=True,
    quick=("edges", "preemption", "prefixes", "reset", "storm", "short"),
)
# Drafts are mostly right, and cross the edges of blocks (`trial.py`). Without "branches": vLLM 0.32 on the CPU does
# not survive top-k sampling in a step without drafts.
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
V1_DRAFTS = Trial(
    "v1-drafts",
    (*(name for name in EVERYWHERE if name != "branches"), "twice"),
    LOSSLESS | {"block_size": 256},
    options={"speculative_config": NGRAM},
    poison=True,
    quick=("edges", "preemption", "prefixes", "twice"),
)
SEALED_TRIALS = (V1, V1_SMALL_POOL, V1_WINDOWS, V1_COMPILED, V1_SPAWNED, V1_TWO_RANKS, V1_DRAFTS, V2, V2_GRAPHS)


def resident(trial: Trial, *quick: str) -> Trial:
    """The same trial with pages that are read as long as they are there."""
    return replace(trial, name=f"{trial.name}-resident", shadowkv={**(trial.shadowkv or {}), **RESIDENT}, quick=quick)


V1_RESIDENT = resident(V1, "edges", "prefixes", "branches", "storm")
SMALL_POOL_RESIDENT = resident(V1_SMALL_POOL, "preemption", "prefixes", "storm")
V2_GRAPHS_RESIDENT = resident(V2_GRAPHS, "prefixes", "preemption", "storm")
RESIDENT_TRIALS = (
    V1_RESIDENT,
    SMALL_POOL_RESIDENT,
    V2_GRAPHS_RESIDENT,
    *(resident(trial) for trial in (V1_TWO_RANKS, V1_DRAFTS)),
)
LOSSLESS_TRIALS = (*SEALED_TRIALS, *RESIDENT_TRIALS)

# The CUDA side: its planner, kernels on emulated threads, FlashAttention and xformers in PyTorch (`emulated_cuda.py`).
# In float16, because the kernels take 16 bits.
HALF: dict[str, Any] = {"dtype": "float16"}
HALF_SCENARIOS = ("edges", "eight", "prefixes", "short")
STOCK_HALF = Trial("stock-half", HALF_SCENARIOS, shadowkv=None, options=HALF)
CUDA_V1 = Trial(
    "cuda-v1",
    ("edges", "prefixes"),
    LOSSLESS | {"block_size": 64, "dense_threshold": 300, "prefill_exact_tokens": 256, "slot_chunks": 304},
    options=HALF,
    emulated_cuda="flash_attention",
    poison=True,
    quick=(),
)
CUDA_XFORMERS = replace(CUDA_V1, name="cuda-xformers", emulated_cuda="xformers")
CUDA_V2_GRAPHS = Trial(
    "cuda-v2-graphs",
    HALF_SCENARIOS,
    LOSSLESS | {"block_size": 256},
    runner="v2",
    options=HALF,
    asynchronous=True,
    graphs=True,
    warm_up=True,
    emulated_cuda="flash_attention",
    poison=True,
    quick=("eight", "prefixes"),
)
CUDA_V2_GRAPHS_RESIDENT = resident(CUDA_V2_GRAPHS, "prefixes")
CUDA_TRIALS = (CUDA_V1, CUDA_XFORMERS, CUDA_V2_GRAPHS, CUDA_V2_GRAPHS_RESIDENT)

COMPRESSED = Trial(
    "compressed",
    ("edges", "eight", "alone", "prefixes"),
    {"block_size": 256, "dense_threshold": 512, "sparse_budget": 512, "slot_chunks": 128, "resident_pages": False},
    poison=True,
)
COMPRESSED_RESIDENT = replace(resident(COMPRESSED), quick=None)


@pytest.fixture
def stock(trials: Trials) -> Result:
    return trials(STOCK)


# First, so that the stock engine is the first to run.
@each_trial(STOCK)
def test_stock_is_decisive(trials: Trials, trial: Trial) -> None:
    """No greedy choice is so close that noise could turn it; else choose another seed for the model or the prompts."""
    greedy = {name: found for name, found in trials(trial).sequences.items() if name != "seeded"}
    margins = [margin for found in greedy.values() for sequence in found.values() for margin in sequence["margins"]]
    assert len(margins) > 3000
    assert min(margins) > 1e-4


@each_scenario(LOSSLESS_TRIALS)
def test_equals_stock(trials: Trials, stock: Result, trial: Trial, scenario: str) -> None:
    assert differences(trials(trial).sequences[scenario], stock.sequences[scenario], TOLERANCE) == []


@each_scenario(CUDA_TRIALS)
def test_the_cuda_side_equals_stock(trials: Trials, trial: Trial, scenario: str) -> None:
    stock = trials(STOCK_HALF)
    ours, theirs = trials(trial).sequences[scenario], stock.sequences[scenario]
    assert differences(ours, theirs, HALF_TOLERANCE, undecided=2 * HALF_TOLERANCE) == []


@each_trial(CUDA_V1, CUDA_XFORMERS, CUDA_V2_GRAPHS)
def test_blocks_are_sealed_on_the_cuda_side_too(trials: Trials, trial: Trial) -> None:
    """The trials are shorter, so the numbers are lower."""
    counts = trials(trial).counts
    assert counts["seals"] > 10
    assert counts["poisoned"] > 100
    if trial.graphs:
        assert counts["replays"] > 50
        assert counts["asynchronous steps"] > 50


@each_trial(V1, V1_SMALL_POOL, V1_WINDOWS, V2, V2_GRAPHS)
def test_blocks_are_sealed_and_their_pages_poisoned(trials: Trials, trial: Trial) -> None:
    counts = trials(trial).counts
    assert counts["seals"] > 50
    assert counts["poisoned"] > 1000
    assert counts["host pools at start-up"] > 0, "the first request pays for them"


@each_trial(V1_SMALL_POOL, V2_GRAPHS)
def test_a_small_pool_preempts(trials: Trials, trial: Trial) -> None:
    assert trials(trial).counts["preemptions"] > 0


@each_trial(V1, V1_WINDOWS, COMPRESSED)
def test_the_pool_is_what_plan_says(trials: Trials, trial: Trial) -> None:
    """`vllm-shadowkv plan` and the engine, from the same flags; tests/integration/test_capacity.py has the requests."""
    counts = trials(trial).counts
    line = [str(trials.model), "--additional-config", json.dumps({"shadowkv": trial.shadowkv}), "--dtype", "float32"]
    line += ["--device", "cpu", "--kv-cache-gib", "1", "--max-model-len", "2048", "--max-num-batched-tokens", "200"]
    parser = argparse.ArgumentParser()
    arguments.add(parser, plan=True)
    plan = make(parser.parse_args(line))
    assert plan.num_blocks == counts["blocks"]
    assert plan.num_blocks * plan.pool.block_bytes == counts["device bytes"]
    assert plan.host_pool_bytes == counts["host bytes"]
    assert counts["weighed layers"] == counts["layers to weigh"] > 0
    assert plan.pool.boundary.prefill_exact_tokens == counts["exact prompt tokens"]
    assert plan.min_blocks - 1 == counts["blocks of the longest request"], "the null block is not counted there"


@each_trial(V1, V2, CUDA_V1)
def test_an_llm_that_is_deleted_gives_its_host_pool_back(trials: Trials, trial: Trial) -> None:
    assert trials(trial).counts["host pools left"] == 0


@each_trial(*LOSSLESS_TRIALS, *CUDA_TRIALS, COMPRESSED, COMPRESSED_RESIDENT)
def test_what_happened_is_in_the_metrics(trials: Trials, trial: Trial) -> None:
    counts = trials(trial).counts
    metrics = {name.removeprefix("vllm:shadowkv_"): count for name, count in counts.items() if "shadowkv" in name}
    is_resident = (trial.shadowkv or {})["resident_pages"]
    assert metrics["selected_chunks_total"] == metrics["slot_hits_total"] + metrics["slot_misses_total"]
    # Of prefills not every trial has what is counted; what requests use is nothing between them.
    of_some = ("prefill", "expanded", "used", "refused", "fetched", "resident", "hit_tokens", "ownerless")
    assert all(value for name, value in metrics.items() if not any(word in name for word in of_some))
    assert metrics["host_pool_used_bytes"] < metrics["host_pool_bytes"]
    fetched = metrics["slot_misses_total"] - metrics["resident_chunks_total"]
    assert metrics["fetched_bytes_total decode"] % max(fetched, 1) == 0
    assert bool(metrics["fetched_bytes_total decode"]) == bool(fetched)
    assert bool(metrics["resident_chunks_total"]) == is_resident
    prefixes = "prefixes" in trial.scenarios
    for name in (
        "sealed_prefills_total",
        "expanded_tokens_total",
        "fetched_bytes_total prefill",
        "hit_tokens_total sealed",
    ):
        assert not prefixes or metrics[name] or is_resident, "a hit is read from sealed blocks"
    assert not prefixes or bool(metrics["resident_tokens_total"]) == is_resident
    if "seals" in counts:
        assert metrics["sealed_blocks_total"] >= counts["seals"], "a call seals a block or more"


@pytest.mark.slow
def test_metrics_of_ranks_add_up(trials: Trials) -> None:
    one, two = (trials(trial).counts for trial in (V1_SPAWNED, V1_TWO_RANKS))
    assert one.keys() == two.keys()
    for name in ("sealed_blocks", "selected_chunks", "slot_hits", "slot_misses", "expanded_tokens", "sealed_prefills"):
        assert one[f"vllm:shadowkv_{name}_total"] == two[f"vllm:shadowkv_{name}_total"], name
    for phase in ("decode", "prefill"):
        assert one[f"vllm:shadowkv_fetched_bytes_total {phase}"] == two[f"vllm:shadowkv_fetched_bytes_total {phase}"]


def test_the_stock_backend_has_no_metrics_of_ours(stock: Result) -> None:
    assert not any("shadowkv" in name for name in stock.counts)


@each_trial(V1_DRAFTS)
def test_drafts_were_accepted(trials: Trials, trial: Trial) -> None:
    assert trials(trial).counts["accepted drafts"] > 200


@each_trial(V2_GRAPHS)
def test_graphs_and_asynchronous_steps_were_used(trials: Trials, trial: Trial) -> None:
    counts = trials(trial).counts
    assert counts["replays"] > 1000
    assert counts["asynchronous steps"] > 1000


@each_trial(V2_GRAPHS, CUDA_V2_GRAPHS)
def test_the_warm_up_of_kernels_was_planned(trials: Trials, trial: Trial) -> None:
    """Three groups each, of a prefill and of decode steps of all requests, of two and of one.

    It must leave nothing behind: what is asked next is compared with the stock backend, which was not warmed up.
    """
    assert trials(trial).counts["warm-up plans"] == 3 * 4


@each_trial(V1, V1_SMALL_POOL, V1_WINDOWS, V1_SPAWNED, V2, V2_GRAPHS, COMPRESSED)
def test_prefixes_are_hit(trials: Trials, trial: Trial) -> None:
    """Whole blocks of prompts and of generated tokens; the prompt has 740 tokens, the next turn 789."""
    cached = {name: sequence["cached"] for name, sequence in trials(trial).sequences["prefixes"].items()}
    assert trial.shadowkv is not None
    block_size = trial.shadowkv["block_size"]
    assert cached["first"] == 0
    assert cached["again"] == 740 // block_size * block_size
    assert cached["branched"] == 520 // block_size * block_size
    assert cached["next turn"] >= 768, "blocks that end in generated tokens were not shared"


@each_trial(V1_SMALL_POOL, V2_GRAPHS)
def test_after_a_reset_nothing_is_hit(trials: Trials, trial: Trial) -> None:
    """Until someone has computed it again: 700 tokens, blocks of 256."""
    cached = {name: sequence["cached"] for name, sequence in trials(trial).sequences["reset"].items()}
    assert cached["forgotten"] == 0
    assert cached["known"] == 512


@each_trial(V1, V1_WINDOWS, V2, COMPRESSED)
def test_company_changes_nothing(trials: Trials, trial: Trial) -> None:
    """Compressed keys too: which chunks are read depends on the request alone.

    A sum that rounds otherwise in other company can move a code of 4 bits by one: measured without AVX-512, 0.0024;
    with coefficients of 8 bits alone (`rank` 16) the usual tolerance held there. What compression itself changes is
    other tokens.
    """
    found = trials(trial).sequences
    tolerance = 0.01 if trial is COMPRESSED else TOLERANCE
    assert differences(found["eight"], found["alone"], tolerance) == []


@each_trial(COMPRESSED_RESIDENT)
def test_a_second_ask_equals_the_first_while_there_is_room(trials: Trials, trial: Trial) -> None:
    """Both decode over sealed blocks; without resident pages the second also prefills over them."""
    for one, is_equal in ((trial, True), (COMPRESSED, False)):
        found = trials(one).sequences["prefixes"]
        first = {what: found["first"][what][:8] for what in ("tokens", "logprobs")}
        assert found["again"]["cached"] == (736 if is_equal else 512), "and less than a block of exact pages"
        assert (differences({"": found["again"]}, {"": first}, TOLERANCE) == []) == is_equal


@each_trial(V1_RESIDENT, SMALL_POOL_RESIDENT, V2_GRAPHS_RESIDENT)
def test_requests_of_one_step_share_what_they_compute(trials: Trials, trial: Trial) -> None:
    """Two prompts of 530 tokens, blocks of 256, that come together, and a later step may compute the second."""
    found = trials(trial).sequences["prefixes"]
    assert {found[name]["cached"] for name in ("twin a", "twin b")} == {0, 512}


@each_trial(COMPRESSED)
class TestCompressed:
    """Compressed keys, of which random ones keep little: what must be exact is, and the rest is sane."""

    @pytest.mark.parametrize("scenario", ["edges", "eight"])
    def test_short_requests_are_exact(self, trials: Trials, stock: Result, trial: Trial, scenario: str) -> None:
        def is_short(name: str) -> bool:
            prompt = int(name.split(": ")[1].removesuffix(" tokens"))
            return prompt + len(stock.sequences[scenario][name]["tokens"]) <= 512

        ours, expected = (
            {name: sequence for name, sequence in found.sequences[scenario].items() if is_short(name)}
            for found in (trials(trial), stock)
        )
        assert len(ours) > 4
        assert differences(ours, expected, TOLERANCE) == []

    def test_prefill_is_exact(self, trials: Trials, stock: Result, trial: Trial) -> None:
        ours, expected = (first_tokens(found.sequences["edges"]) for found in (trials(trial), stock))
        assert differences(ours, expected, TOLERANCE) == []

    def test_long_requests_are_sane(self, trials: Trials, stock: Result, trial: Trial) -> None:
        for scenario in trial.scenarios:
            ours, expected = trials(trial).sequences[scenario], stock.sequences[scenario]
            assert {name: len(found["tokens"]) for name, found in ours.items()} == {
                name: len(found["tokens"]) for name, found in expected.items()
            }
            assert math.isfinite(largest_error(ours, expected))


def first_tokens(sequences: dict[str, Any]) -> dict[str, Any]:
    return {name: {what: found[what][:1] for what in ("tokens", "logprobs")} for name, found in sequences.items()}


# After "nothing" the engine must be as it was before the others.
EAGER_PLANTS = ("wrong value", "wrong key", "no lag", "not cleared", "nothing")
GRAPH_PLANTS = (*(f"not persistent: {tensor.name}" for tensor in fields(DecodeRows)), "nothing")

# Without prefix caching: what one plant spoils is not found again by the next.
UNSHARED = {"enable_prefix_caching": False}
EAGER = Trial(
    "planted-eager",
    ("short",),
    LOSSLESS | {"block_size": 64, "slot_chunks": 304},
    options=UNSHARED,
    poison=True,
    plants=EAGER_PLANTS,
)
GRAPHS = Trial(
    "planted-graphs",
    ("short",),
    LOSSLESS | {"block_size": 64, "slot_chunks": 304},
    runner="v2",
    options=UNSHARED,
    graphs=True,
    poison=True,
    plants=GRAPH_PLANTS,
)


@each_plant((EAGER, GRAPHS))
def test_a_planted_error_is_noticed(trials: Trials, trial: Trial, plant: str) -> None:
    planted, stock = trials(trial).planted[plant], trials(STOCK).sequences["short"]
    found = differences(planted, stock, TOLERANCE)
    if plant == "nothing":
        assert found == []
    else:
        assert found
        assert not largest_error(planted, stock) < 100 * TOLERANCE, "it is hardly more than noise"


@each_trial(EAGER, GRAPHS)
def test_without_a_plant_nothing_is_noticed(trials: Trials, trial: Trial) -> None:
    assert differences(trials(trial).sequences["short"], trials(STOCK).sequences["short"], TOLERANCE) == []
