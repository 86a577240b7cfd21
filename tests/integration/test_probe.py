"""The run that shows how large queries are: on which input, and that it leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.sequence import IntermediateTensors

from vllm_shadowkv.integration.worker import probe as probed
from vllm_shadowkv.integration.worker.probe import TOKENS, probe
from vllm_shadowkv.rotary import Rotary


class Runner:
    """A model of two layers, of which the second is another backend's; a query is what comes in."""

    def __init__(self, max_tokens: int = 1000) -> None:
        self.max_num_tokens = max_tokens
        self.layers = SimpleNamespace(by_name={name: layer(name) for name in ("ours", "not run")}, seen=None)
        self.input, self.uses_inputs_embeds = torch.zeros(max_tokens, 4, 8), False
        self.model_state = SimpleNamespace(dummy_inputs_embeds=lambda tokens: self.input[:tokens])
        self.intermediate_tensors: IntermediateTensors | None = None
        self.model = SimpleNamespace(make_empty_intermediate_tensors=self._make)
        self.calls: list[tuple[int, dict[str, Any]]] = []
        self.queries: list[Tensor] = []

    def _make(self, batch_size: int, dtype: torch.dtype, device: str) -> IntermediateTensors:
        return IntermediateTensors({"hidden_states": torch.zeros(batch_size, 4, 8, dtype=dtype, device=device)})

    def _dummy_run(self, tokens: int, randomize_inputs: bool, **options: Any) -> None:
        assert randomize_inputs
        self.calls.append((tokens, options))
        query = self.input[:tokens]
        if self.intermediate_tensors is not None:
            query = self.intermediate_tensors["hidden_states"][:tokens]
        elif not self.uses_inputs_embeds:
            query = torch.randn(tokens, 4, 8)
        self.queries.append(query.clone())
        self.layers.seen["ours"] = query.square().mean(0)


def layer(name: str) -> Any:
    attention = SimpleNamespace(num_kv_heads=2, layer_name=name)
    pseudo = {suffix: SimpleNamespace(layer_name=f"{name}.{suffix}") for suffix in ("exact", "slots")}
    return SimpleNamespace(attention=attention, rotary=Rotary.identity(), query_scales=None, **pseudo)


@pytest.fixture(autouse=True)
def stage(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(is_first_rank=True)
    monkeypatch.setattr(probed, "get_pp_group", lambda: found)
    return found


def a(base: type) -> Any:
    """A layer of a class of vLLM's, and nothing of it."""
    return object.__new__(type("Other", (base,), dict.fromkeys(base.__abstractmethods__)))


def run(runner: Runner, v2: bool = False, on_cpu: bool = True, **others: Any) -> Tensor:
    context = dict.fromkeys(("ours", "ours.exact", "ours.slots", "not run"), a(AttentionLayerBase)) | others
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
    worker = SimpleNamespace(model_runner=runner, use_v2_model_runner=v2, vllm_config=config, device="cpu")
    worker.model_config = SimpleNamespace(dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probed, "current_platform", SimpleNamespace(is_cpu=lambda: on_cpu))
        patch.setattr(probed, "set_current_vllm_config", lambda config: torch.no_grad())
        before = torch.get_rng_state()
        probe(worker, runner.layers)
        assert torch.equal(torch.get_rng_state(), before), "a seed of the user's says what comes next"
    assert runner.layers.seen is None
    assert runner.layers.by_name["not run"].query_scales is None
    scales: Tensor = runner.layers.by_name["ours"].query_scales
    return scales


def test_layers_get_scales_from_the_same_input_every_time() -> None:
    first, second = Runner(), Runner()
    scales = run(first)
    torch.manual_seed(7)
    assert torch.equal(run(second), scales)
    assert scales.shape == (16,)
    assert scales.std() > 0.01
    assert first.calls == [(TOKENS, {"skip_eplb": True, "is_profile": True})]


def test_the_v2_runner_is_asked_in_its_words_and_small_steps_are_kept_to() -> None:
    runner = Runner(max_tokens=40)
    run(runner, v2=True)
    assert runner.calls == [(40, {"skip_eplb": True, "skip_attn": True, "is_profile": True})]


def test_what_stands_for_embeddings_is_random_and_zero_again() -> None:
    """The V2 runner's, of a model with images."""
    runner = Runner()
    runner.uses_inputs_embeds = True
    run(runner, v2=True)
    assert runner.queries[0].std().item() == pytest.approx(1, abs=0.05)
    assert not runner.input.any()


@pytest.mark.parametrize("made", [True, False])
def test_a_later_stage_reads_random_hidden_states(stage: SimpleNamespace, made: bool) -> None:
    stage.is_first_rank = False
    runner = Runner()
    if made:
        runner.intermediate_tensors = runner._make(1000, torch.float32, "cpu")
    run(runner)
    assert runner.queries[0].std().item() == pytest.approx(1, abs=0.05)
    assert runner.intermediate_tensors is not None
    assert not runner.intermediate_tensors["hidden_states"].any()


@pytest.mark.parametrize(
    ("other", "on_cpu", "runs"),
    [
        (a(MambaBase), True, False),
        (a(MambaBase), False, False),
        (a(AttentionLayerBase), True, False),
        (a(AttentionLayerBase), False, True),
        (SimpleNamespace(), True, True),  # experts
    ],
)
def test_models_whose_run_reads_what_nobody_wrote_are_left_alone(other: Any, on_cpu: bool, runs: bool) -> None:
    """Layers with a state return memory as it was, and so does vLLM's attention on the CPU, not that on GPUs."""
    runner = Runner()
    scales = run(runner, on_cpu=on_cpu, other=other)
    assert len(runner.calls) == runs == (scales is not None)


def test_a_run_that_fails_leaves_nobody_looking() -> None:
    runner = Runner()
    runner._dummy_run = lambda *args, **options: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        run(runner)
    assert runner.layers.seen is None
