"""The needle model answers through sealed blocks as it does with full attention; a wrong build does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine import ENVIRONMENT

from benchmarks.needle.tasks import FAMILIES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HAYSTACKS, QUESTIONS = 20, 10  # 200 prompts a family
POINTS = 5
"""How far below full attention a family may be."""
PLANTED_POINTS = 15
"""How far a wrong build must be below in one family at least: the test above then notices it whatever the prompts."""


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, list[float]]]]:
    directory = tmp_path_factory.mktemp("needle")
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": f"{ROOT}:{HERE}"}

    def run(*names: str) -> dict[str, dict[str, dict[str, list[float]]]]:
        found = {}
        for name in names:
            result = directory / f"{name}.json"
            command = [str(HERE / "needle_trial.py"), name, str(result), str(HAYSTACKS), str(QUESTIONS)]
            finished = subprocess.run(
                [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert finished.returncode == 0, f"{name}:\n{finished.stdout[-4000:]}"
            found[name] = json.loads(result.read_text())
        return found

    with ThreadPoolExecutor() as pool:  # as many engines as cores
        one, other = pool.submit(run, "shadowkv"), pool.submit(run, "stock", "planted")
        return one.result() | other.result()


def percent(scores: list[float]) -> float:
    return 100 * sum(scores) / len(scores)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_within_five_points_of_full_attention(scores, family: str) -> None:
    full, ours = (scores[name]["as built"][family] for name in ("stock", "shadowkv"))
    assert len(full) == len(ours) == HAYSTACKS * QUESTIONS
    assert percent(full) >= 85, "the model itself cannot answer"
    assert percent(ours) >= percent(full) - POINTS


@pytest.mark.slow
@pytest.mark.parametrize("plant", ["random selection", "flipped rotation"])
def test_a_wrong_build_fails(scores, plant: str) -> None:
    full, wrong = scores["stock"]["as built"], scores["planted"][plant]
    lost = {family: percent(full[family]) - percent(wrong[family]) for family in FAMILIES}
    assert max(lost.values()) > PLANTED_POINTS, lost
