"""Training runs through its phases, in this process or with workers, and what it writes is what it trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.needle.batches import BROAD
from benchmarks.needle.evaluate import load_model
from benchmarks.needle.export import read_weights, save_weights, write_checkpoint
from benchmarks.needle.model import NeedleConfig, NeedleModel, Window
from benchmarks.needle.recipes import RECIPES, Phase, Stage
from benchmarks.needle.train import ADVANCE_AT, Batches, Options, Progress, learning_rate, run_phase

DEEP = NeedleConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, head_dim=16)
STAGES = [Stage(64, 4, 4, 128), Stage(128, 2, 4, 256)]
CLIMB = Phase("climb", STAGES, True, 6, 1.0, 2e-3, 0.2, BROAD, far_keys=0)
DRAW = Phase("draw", [Stage(512, 2, 8, 1024)], False, 4, 1.0, 2e-3, 0.5, BROAD, far_keys=64)


@pytest.fixture
def model() -> NeedleModel:
    torch.manual_seed(0)
    return NeedleModel(DEEP)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("phase", [CLIMB, DRAW], ids=lambda phase: phase.name)
def test_every_layer_learns(model: NeedleModel, phase: Phase, workers: int, tmp_path: Path) -> None:
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    run_phase(model, phase, Options(tmp_path / "weights.pt", workers=workers))
    assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    saved = read_weights(tmp_path / "weights.pt")
    assert saved.config == DEEP
    assert all(torch.equal(weight, saved.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_time_limit_ends_a_phase_and_saves(model: NeedleModel, tmp_path: Path) -> None:
    run_phase(model, DRAW._replace(steps=10**9), Options(tmp_path / "weights.pt", minutes=1e-6))
    assert (tmp_path / "weights.pt").exists()


def test_the_rate_falls_with_steps_or_time() -> None:
    assert learning_rate(0, 0.0, DRAW) == DRAW.peak_rate / 50
    assert learning_rate(100, 0.5, DRAW) == DRAW.peak_rate
    assert learning_rate(100, 1.0, DRAW) == pytest.approx(0.02 * DRAW.peak_rate)


def test_batches_follow_the_level() -> None:
    level = torch.zeros((), dtype=torch.int64)
    batches = iter(Batches(CLIMB, 0, level))
    number, batch = next(batches)
    assert (number, batch.token_ids.shape) == (0, (4, 64))
    level += 1
    number, batch = next(batches)
    assert (number, batch.token_ids.shape) == (1, (2, 128))


def test_a_phase_climbs_by_the_answers_of_its_present_stage() -> None:
    progress = Progress(CLIMB)
    needed = 0
    while not progress.counts(0, 1.0):
        needed += 1
        assert progress.accuracy == pytest.approx(1 - 0.9**needed)
        assert progress.accuracy <= ADVANCE_AT
    assert (int(progress.level), progress.accuracy) == (1, 0.0)
    assert not progress.counts(0, 1.0)
    assert progress.accuracy == 0, "a worker's batch of the stage before"
    assert not any(progress.counts(1, 1.0) for _ in range(100)), "the last stage is not left"
    assert progress.accuracy > ADVANCE_AT


def test_a_phase_that_draws_its_stages_counts_them_all() -> None:
    progress = Progress(DRAW._replace(stages=STAGES))
    assert not any(progress.counts(number, 1.0) for number in [0, 1] * 50)
    assert progress.accuracy > ADVANCE_AT
    assert int(progress.level) == 0


def test_a_window_over_everything_is_full_attention(model: NeedleModel) -> None:
    """Of every layer before the last, whether the rest is sampled or not there."""
    ids = torch.randint(1040, (1, 384), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(384)[None]
    full = model(ids, positions, positions)[0]
    torch.testing.assert_close(model(ids, positions, positions, Window(128, 1, 0))[0], full)
    assert not torch.allclose(model(ids, positions, positions, Window(128))[0], full, atol=1e-3)


def test_a_checkpoint_of_more_layers_loads_in_transformers(model: NeedleModel, tmp_path: Path) -> None:
    write_checkpoint(model, tmp_path)
    positions = torch.arange(100)[None]
    ids = torch.randint(1040, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
        got, _, _ = load_model(tmp_path)(ids, positions, positions)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


def test_weights_of_training_are_not_rounded(model: NeedleModel, tmp_path: Path) -> None:
    save_weights(model, tmp_path / "weights.pt")
    assert torch.equal(load_model(tmp_path / "weights.pt").model.norm.weight, model.model.norm.weight)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_their_models(name: str) -> None:
    config, phases = RECIPES[name]
    assert sum(phase.share for phase in phases) == pytest.approx(1)
    assert [phase.name for phase in phases] == ["curriculum", "settle", "sharpen"]
    for stage in (stage for phase in phases for stage in phase.stages):
        assert stage.num_tokens <= stage.span <= config.max_position_embeddings
    bytes_in_bf16 = 2 * sum(weight.numel() for weight in NeedleModel(config).parameters())
    assert bytes_in_bf16 < 8e6
