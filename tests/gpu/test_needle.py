"""The needle model through vLLM on a GPU, against its own FlashAttention, eager and with CUDA graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine import ENVIRONMENT

from benchmarks.needle.tasks import FAMILIES

INTEGRATION = Path(__file__).parents[1] / "integration"
ROOT = INTEGRATION.parents[1]
HAYSTACKS, QUESTIONS = 20, 10  # 200 prompts a family
POINTS = 5
Scores = dict[str, dict[str, list[float]]]


@pytest.fixture(scope="module", params=["eager", "graphs"])
def scores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    directory = tmp_path_factory.mktemp(request.param)
    path = os.pathsep.join([str(ROOT), str(INTEGRATION), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": path}
    found = {}
    for backend in ("stock", "shadowkv"):  # one after the other: each takes its share of the GPU's memory
        result = directory / f"{backend}.json"
        command = [str(INTEGRATION / "needle_trial.py"), backend, str(result), str(HAYSTACKS), str(QUESTIONS)]
        finished = subprocess.run(
            [sys.executable, *command, request.param], env=environment, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
        found[backend] = json.loads(result.read_text())["as built"]
    return found


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_within_five_points_of_flash_attention(scores: Scores, family: str) -> None:
    full, ours = (100 * sum(scores[name][family]) / len(scores[name][family]) for name in ("stock", "shadowkv"))
    assert full >= 85
    assert ours >= full - POINTS
