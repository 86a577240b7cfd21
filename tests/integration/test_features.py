"""Features of vLLM beside the stock backend: drafts of a draft model, adapters, structured output, log-probabilities of
prompts, quantised weights, several engines, stages of a pipeline. The method is that of `test_life_of_a_token.py`.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import simulation
from engine import Trial, Trials, differences, each_trial, noise_of
from test_life_of_a_token import LOSSLESS, RESIDENT, STOCK, TOLERANCE, UNSHARED
from vllm.config import ParallelConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.core import EngineCore

from vllm_shadowkv import metrics
from vllm_shadowkv.integration.worker import machine

SETTINGS: dict[str, Any] = LOSSLESS | {"block_size": 256}

# Some of the drafts are accepted. The draft model has as many layers as the model; see `other_layers.check_group`.
DRAFTS = Trial("draft-model", ("short", "edges", "prefixes"), SETTINGS, extras=("draft_model",), poison=True, quick=())

FEATURES = ("adapters", "structured")
STOCK_FEATURES = Trial("stock-features", FEATURES, shadowkv=None, extras=("adapters", "tokenizer"), quick=())
OUR_FEATURES = Trial(
    "our-features", FEATURES, SETTINGS | RESIDENT, extras=("adapters", "tokenizer"), poison=True, quick=()
)

STOCK_QUANTISED = Trial(
    "stock-quantised", ("short",), shadowkv=None, options=UNSHARED, extras=("quantised",), plants=("rounding",)
)
SMALL_BLOCKS = LOSSLESS | {"block_size": 64, "slot_chunks": 304}
OUR_QUANTISED = Trial(
    "our-quantised",
    ("short",),
    SMALL_BLOCKS,
    options=UNSHARED,
    extras=("quantised",),
    poison=True,
    plants=("lost block",),
    quick=(),
)

STOCK_EMBEDDING = Trial("stock-embedding", ("embedded",), shadowkv=None, extras=("embedding",))
OUR_EMBEDDING = Trial("our-embedding", ("embedded",), SMALL_BLOCKS, extras=("embedding",), poison=True)

# In bfloat16, so that the table in float32 is not the model's own, and with keys that are rebuilt with it.
SLEEPER = Trial(
    "sleeper",
    ("sleep",),
    {"block_size": 256, "dense_threshold": 512, "sparse_budget": 512, "slot_chunks": 128, "resident_pages": False},
    options={"dtype": "bfloat16"},
    quick=(),
)
STAGES = Trial(
    "v2-two-stages",
    ("short", "prefixes"),
    SETTINGS | RESIDENT,
    runner="v2",
    options={"pipeline_parallel_size": 2},
    in_process=False,
    quick=(),
)


@each_trial(DRAFTS)
def test_a_draft_model_changes_nothing(trials: Trials, trial: Trial) -> None:
    stock = trials(STOCK).sequences
    for scenario in trial.scenarios:
        assert differences(trials(trial).sequences[scenario], stock[scenario], TOLERANCE) == []
    assert trials(trial).counts["accepted drafts"] > 100
    assert trials(trial).counts["seals"] > 25


@each_trial(STOCK_FEATURES)
def test_stock_is_decisive(trials: Trials, trial: Trial) -> None:
    for found in trials(trial).sequences.values():
        assert min(margin for sequence in found.values() for margin in sequence["margins"]) > 1e-4


@each_trial(OUR_FEATURES)
def test_adapters_keep_to_themselves(trials: Trials, trial: Trial) -> None:
    ours, stock = (trials(one).sequences["adapters"] for one in (trial, STOCK_FEATURES))
    assert differences(ours, stock, TOLERANCE) == []
    first = {tuple(sequence["tokens"]) for name, sequence in ours.items() if "again" not in name}
    assert len(first) == 3, "an adapter changed nothing"
    assert {name: sequence["cached"] for name, sequence in ours.items()} == {
        f"adapter {number}{again}": 512 if again else 0 for number in range(3) for again in ("", " again")
    }


@each_trial(OUR_FEATURES)
def test_structured_output(trials: Trials, trial: Trial) -> None:
    ours, stock = (trials(one).sequences["structured"] for one in (trial, STOCK_FEATURES))
    assert differences(ours, stock, TOLERANCE) == []
    allowed = {*range(10), *range(120, 130)}
    assert set(ours["guided"]["tokens"]) <= allowed
    assert not set(ours["free"]["tokens"]) <= allowed


@each_trial(OUR_QUANTISED)
def test_quantised_weights(trials: Trials, trial: Trial) -> None:
    """Activations of 8 bits turn the noise of any sum into other codes, how many depends on the processor's kernels: so
    the stock engine says itself by how much rounding moves its answers."""
    ours, stock = (trials(one).sequences["short"] for one in (trial, STOCK_QUANTISED))
    noise = noise_of(trials(STOCK_QUANTISED).planted["rounding"], stock)
    assert TOLERANCE < noise < 0.1, "codes do not follow noise, or everything does"
    wrong = trials(trial).planted["lost block"]
    for answers, is_right in ((ours, True), (wrong, False)):
        assert (differences(answers, stock, 4 * noise, undecided=8 * noise) == []) == is_right
    assert differences(ours, trials(STOCK).sequences["short"], TOLERANCE), "nothing was quantised"
    assert trials(trial).counts["seals"] > 2


@each_trial(OUR_EMBEDDING)
def test_embeddings(trials: Trials, trial: Trial) -> None:
    """Of prompts over sealed context too, which no slots were taken for; `test_managers.py` counts them."""
    ours, stock = (trials(one).sequences["embedded"] for one in (trial, STOCK_EMBEDDING))
    assert differences(ours, stock, TOLERANCE) == []
    assert len({tuple(sequence["logprobs"]) for sequence in ours.values()}) == 10
    assert ours["1100 tokens, continued"]["cached"] > 512
    assert trials(trial).counts["vllm:shadowkv_sealed_prefills_total"] > 0


@each_trial(SLEEPER)
def test_nothing_is_lost_in_sleep(trials: Trials, trial: Trial) -> None:
    found = trials(trial).sequences["sleep"]
    before, after = (
        {name.removeprefix(when): sequence for name, sequence in found.items() if name.startswith(when)}
        for when in ("before ", "after ")
    )
    assert len(before) == 2
    assert differences(after, before, tolerance=0.0) == []
    assert all(sequence["cached"] == 0 for sequence in after.values())
    assert trials(trial).counts["seals"] > 0


@each_trial(STAGES)
def test_two_stages_of_a_pipeline(trials: Trials, trial: Trial) -> None:
    """On the V2 runner: with two stages vLLM 0.32's V1 runner fails on the CPU, its own backend too."""
    stock = trials(STOCK).sequences
    for scenario in trial.scenarios:
        assert differences(trials(trial).sequences[scenario], stock[scenario], TOLERANCE) == []


def test_a_prompt_in_pieces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM answers the one request with the error, and goes on with the others."""
    managers = simulation.Engine(num_blocks=64).managers
    core: Any = EngineCore.__new__(EngineCore)
    core.vllm_config = simulation.vllm_config()
    refused = metrics.REFUSED_REQUESTS.labels(**metrics.labels_of(core.vllm_config))
    monkeypatch.setattr(metrics, "_serve", lambda: None)
    before = refused._value.get()
    request = SimpleNamespace(resumable=True)
    for served, error in ((managers, VLLMValidationError), ((), AttributeError)):
        coordinator = SimpleNamespace(single_type_managers=served)
        core.scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(coordinator=coordinator))
        with pytest.raises(error, match="streaming input; send the whole prompt" if served else None):
            core.preprocess_add_request(request)
    assert refused._value.get() == before + 1


@pytest.mark.parametrize(("sizes", "engines"), [((1, 1), 1), ((4, 4), 4), ((4, 2), 4)])
def test_data_parallel_engines_of_a_dense_model_share_the_host(sizes: tuple[int, int], engines: int) -> None:
    """VLLM makes each forget the others before its workers start; those of all machines are counted then."""
    parallel = ParallelConfig(data_parallel_size=sizes[0], data_parallel_size_local=sizes[1])
    assert machine._engines(parallel) == sizes[1]
    parallel.reconfigure_for_independent_dp_rank()
    assert parallel.data_parallel_size == 1
    assert machine._engines(parallel) == engines


@pytest.mark.parametrize(
    ("groups", "engines"),
    [
        ([("ours", "here"), ("ours", "there")], 1),
        ([("ours", "here"), ("ours", "here there"), ("ours", "there")], 2),
        ([("ours", "here"), ("ours", "")], 2),  # Ray has not placed the other yet
        ([("ours", "here"), ("theirs", "here")], 1),
        ([("ours", "here"), ("ours", "here", "REMOVED")], 1),
    ],
)
def test_data_parallel_engines_that_ray_has_placed_on_a_machine_share_it(
    groups: list[tuple[str, ...]], engines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray has a placement group of each engine; the id of a group ends with that of the server's job."""
    jobs = {"ours": "02000000", "theirs": "03000000"}
    table = {
        f"{number:028x}{jobs[job]}": {"state": "".join(state) or "CREATED", "bundles_to_node_id": nodes}
        for number, (job, placed, *state) in enumerate(groups)
        for nodes in [dict(enumerate(placed.split(" ")))]
    }
    ray: Any = SimpleNamespace(
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "here"),
        util=SimpleNamespace(placement_group_table=lambda: table),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    parallel = ParallelConfig(data_parallel_size=8, data_parallel_backend="ray")
    parallel.reconfigure_for_independent_dp_rank()
    group: Any = SimpleNamespace(id=bytes.fromhex(next(iter(table))))
    parallel.placement_group = group
    assert machine._engines(parallel) == engines
