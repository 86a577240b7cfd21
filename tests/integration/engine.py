"""Starts engines in processes of their own and compares what they say; `trial.py` is the other side."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# Set for every engine: no look at the network, one thread (a tiny model gains nothing from more, and tests run side by side).
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Trial:
    """An engine and what it is asked.

    Attributes:
        name: of the result's file and of the log.
        scenarios: names in `scenarios.SCENARIOS`.
        shadowkv: settings; None: the stock backend.
        options: of `vllm.LLM`, beside those of `trial.start`.
        poison: fill pages that nobody may read with NaN.
        graphs: emulate decode graphs (V2 runner).
        plants: errors to plant, one after the other, each with the `short` scenario.
        in_process: scheduler and worker in the engine's process.
    """

    name: str
    scenarios: tuple[str, ...]
    shadowkv: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    poison: bool = True
    graphs: bool = False
    plants: tuple[str, ...] = ()
    in_process: bool = True


@dataclass(frozen=True)
class Result:
    """What a trial gave.

    Attributes:
        sequences: by scenario and name; see `scenarios.Generated`.
        planted: the same by plant.
        counts: of what happened.
    """

    sequences: dict[str, dict[str, Any]]
    planted: dict[str, dict[str, Any]]
    counts: dict[str, int]


class TrialHost:
    """A process that has imported vLLM and forks an engine for every trial.

    Args:
        runner: "v1" or "v2", vLLM's model runners.
        model: directory of the model.
        directory: for results and logs.
    """

    def __init__(self, runner: str, model: Path, directory: Path) -> None:
        self._model, self._directory = model, directory
        environment = os.environ | ENVIRONMENT | {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "trial.py"), runner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, trial: Trial) -> Result:
        """Runs a trial.

        Raises:
            AssertionError: it failed; with the end of its log.
        """
        result, log = (self._directory / f"{trial.name}.{ending}" for ending in ("json", "log"))
        paths = {"model": str(self._model), "result": str(result), "log": str(log)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(trial) | paths) + "\n")
        self._process.stdin.flush()
        status = self._process.stdout.readline().strip()
        assert status == "0", f"trial {trial.name}: exit status {status or 'of the host'}\n{_tail(log)}"
        return Result(**json.loads(result.read_text()))

    def close(self) -> None:
        """Ends the process, which waits for input."""
        self._process.communicate()


def _tail(log: Path, characters: int = 6000) -> str:
    return log.read_text()[-characters:] if log.exists() else "(no log)"


def differences(ours: Mapping[str, Any], stock: Mapping[str, Any], tolerance: float) -> list[str]:
    """What differs between two engines' sequences of one scenario.

    Args:
        ours, stock: sequences by name.
        tolerance: of log-probabilities; tokens must be equal.

    Returns:
        A sentence per difference.
    """
    found = [f"{name}: missing in one of them" for name in ours.keys() ^ stock.keys()]
    for name in ours.keys() & stock.keys():
        one, other = ours[name], stock[name]
        if len(one["tokens"]) != len(other["tokens"]):
            found.append(f"{name}: {len(one['tokens'])} tokens, stock {len(other['tokens'])}")
        wrong = next((place for place, pair in enumerate(_pairs(one, other, "tokens")) if pair[0] != pair[1]), None)
        if wrong is not None:
            found.append(f"{name}: token {wrong} is {one['tokens'][wrong]}, stock {other['tokens'][wrong]}")
        error = largest_difference({name: one}, {name: other}, places=wrong)
        if not error <= tolerance:  # NaN is not
            found.append(f"{name}: log-probabilities differ by {error:.2g}")
    return sorted(found)


def largest_difference(ours: Mapping[str, Any], stock: Mapping[str, Any], places: int | None = None) -> float:
    """The largest difference of log-probabilities of the first `places` tokens; NaN where one is NaN."""
    errors = [
        abs(a - b) for name in ours.keys() & stock.keys() for a, b in _pairs(ours[name], stock[name], "logprobs")[:places]
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> list[tuple[Any, Any]]:
    return list(zip(one[what], other[what], strict=False))
