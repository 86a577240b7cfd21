"""Starts engines in processes of their own and compares what they say; `trial.py` is the other side."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

HERE = Path(__file__).parent

# Of every engine: no look at the network, and one thread, because two engines run side by side and the model is tiny.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",  # torch.compile traces, but generates no C++, which takes minutes
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # vLLM takes it for granted on CUDA; a cut installation has none
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}

Runner = Literal["v1", "v2"]
Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Trial:
    """An engine and what it is asked.

    Attributes:
        name: of the result's file and of the log.
        scenarios: names in `scenarios.SCENARIOS`.
        shadowkv: settings; None: the stock backend.
        runner: which of vLLM's model runners.
        options: of `vllm.LLM`, beside those of `trial.start`.
        asynchronous: schedule a step before the output of the last is known.
        graphs: emulate decode graphs; on the V2 runner.
        warm_up: run the V2 runner's kernel warm-up before anything is asked, as vLLM does on CUDA unless it is eager.
        emulated_cuda: plan as on CUDA, with this for exact pages, and run the CUDA kernels on emulated threads; float16
            and bfloat16 only.
        poison: fill pages that nobody may read with NaN.
        plants: errors to plant, one after the other, each with the first scenario; names in `plants.PLANTS`.
        in_process: scheduler and worker in the process of the `LLM`.
        extras: what the engine has beside the model; names in `extras.EXTRAS`.
        quick: those of `scenarios` that `make test` asks; None: all. Without any the trial is left to `make test-all`.
    """

    name: str
    scenarios: tuple[str, ...]
    shadowkv: Mapping[str, Any] | None
    runner: Runner = "v1"
    options: Mapping[str, Any] = field(default_factory=dict)
    asynchronous: bool = False
    graphs: bool = False
    warm_up: bool = False
    emulated_cuda: Literal["", "flash_attention", "xformers"] = ""
    poison: bool = False
    plants: tuple[str, ...] = ()
    in_process: bool = True
    extras: tuple[str, ...] = ()
    quick: tuple[str, ...] | None = None

    @property
    def slow(self) -> bool:
        """Whether `make test` leaves it out."""
        return self.quick == ()

    def in_short(self) -> Trial:
        """What `make test` runs of it."""
        return self if self.quick is None else replace(self, scenarios=self.quick)


def each_trial(*trials: Trial | ModelTrial) -> pytest.MarkDecorator:
    """Parametrises a test with every `trial`."""
    cases = [pytest.param(trial, id=trial.name, marks=_marks(trial.slow)) for trial in trials]
    return pytest.mark.parametrize("trial", cases)


def each_scenario(trials: Iterable[Trial]) -> pytest.MarkDecorator:
    """Parametrises a test with every `trial` and `scenario`."""
    pairs = ((trial, name, trial.quick is not None and name not in trial.quick)
             for trial in trials for name in trial.scenarios)  # fmt: skip
    return _each_pair("scenario", pairs)


def each_plant(trials: Iterable[Trial]) -> pytest.MarkDecorator:
    """Parametrises a test with every `trial` and `plant`."""
    return _each_pair("plant", ((trial, plant, trial.slow) for trial in trials for plant in trial.plants))


def _each_pair(what: str, pairs: Iterable[tuple[Trial, str, bool]]) -> pytest.MarkDecorator:
    cases = [pytest.param(trial, name, id=f"{trial.name} {name}", marks=_marks(slow)) for trial, name, slow in pairs]
    return pytest.mark.parametrize(("trial", what), cases)


def _marks(slow: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if slow else []


@dataclass(frozen=True)
class ModelTrial:
    """Several engines of a model of its own, one after the other in one process.

    Attributes:
        name: of the result's file and of the log.
        architecture: name in `architectures.CONFIGS`.
        engines: what runs; their names are those of the results.
        runner: which of vLLM's model runners.
        slow: left to `make test-all`.
        images: it gets a processor of images, and a torchvision (`with_torchvision.py`); skipped where there is none.
    """

    name: str
    architecture: str
    engines: tuple[Trial, ...]
    runner: Runner = "v1"
    slow: bool = False
    images: bool = False


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
    """A process that has imported vLLM and forks an engine for every trial, one after the other."""

    def __init__(self, runner: Runner, model: Path, directory: Path, device: Device, images: bool = False) -> None:
        """Starts the process.

        Args:
            runner: of its engines.
            model: directory of the model.
            directory: for results and logs.
            device: where its engines run.
            images: there is a torchvision.
        """
        self._model, self._directory = model, directory
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "trial.py"), runner, device, *([str(_torchvision())] if images else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT | {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))},
            start_new_session=True,
        )

    def run(self, trial: Trial | ModelTrial) -> Any:
        """Runs a trial.

        Returns:
            Its `Result`, or of each engine by name.

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
        found = json.loads(result.read_text())
        if isinstance(trial, Trial):
            return Result(**found)
        return {engine: Result(**one) for engine, one in found.items()}

    def close(self) -> None:
        """Ends the process, and the engine of a trial that is still running."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Trials:
    """Runs each trial once; those of the two runners side by side."""

    def __init__(self, model: Path, directory: Path, device: Device = "cpu", quick: bool = False) -> None:
        """Starts nothing yet; see `TrialHost` for the arguments.

        Args:
            model, directory, device: see there.
            quick: run of every trial what `make test` runs.
        """
        self.model, self._directory, self._device, self._quick = model, directory, device, quick
        self._hosts: dict[tuple[Runner, bool], tuple[TrialHost, ThreadPoolExecutor]] = {}
        self._results: dict[str, Future[Any]] = {}

    def begin(self, trial: Trial | ModelTrial) -> Future[Any]:
        """Runs a trial in the background, after those of its runner that were begun before."""
        if self._quick and isinstance(trial, Trial):
            trial = trial.in_short()
        if trial.name not in self._results:
            kind = trial.runner, isinstance(trial, ModelTrial) and trial.images
            if kind not in self._hosts:
                host = TrialHost(kind[0], self.model, self._directory, self._device, kind[1])
                self._hosts[kind] = host, ThreadPoolExecutor(max_workers=1)
            host, queue = self._hosts[kind]
            self._results[trial.name] = queue.submit(host.run, trial)
        return self._results[trial.name]

    def __call__(self, trial: Trial | ModelTrial) -> Any:
        """The result of a trial, run now if it was not yet; see `TrialHost.run`."""
        return self.begin(trial).result()

    def close(self) -> None:
        """Ends the processes; trials that wait are dropped."""
        for host, queue in self._hosts.values():
            queue.shutdown(wait=False, cancel_futures=True)
            host.close()


def _torchvision() -> Path:
    """The folder of its code, made if it is not there; without an index that has it the test is skipped."""
    from with_torchvision import TORCHVISION, MissingError

    try:
        return TORCHVISION.make()
    except MissingError as error:
        pytest.skip(str(error))


def _tail(log: Path, characters: int = 6000) -> str:
    return log.read_text()[-characters:] if log.exists() else "(no log)"


def differences(
    ours: Mapping[str, Any], stock: Mapping[str, Any], tolerance: float, undecided: float = 0.0
) -> list[str]:
    """What differs between two engines' sequences of one scenario.

    Args:
        ours: sequences by name.
        stock: the same of the other engine.
        tolerance: of log-probabilities; tokens must be equal.
        undecided: margin of a choice of the stock engine below which another token ends the comparison of its sequence.

    Returns:
        Sentences.
    """
    found = [f"{name}: missing in one of them" for name in ours.keys() ^ stock.keys()]
    for name in ours.keys() & stock.keys():
        tokens, expected = ours[name]["tokens"], stock[name]["tokens"]
        if len(tokens) != len(expected):
            found.append(f"{name}: {len(tokens)} tokens, stock {len(expected)}")
        wrong = first_difference(tokens, expected)
        if wrong is not None and not (undecided and stock[name]["margins"][wrong] < undecided):
            found.append(f"{name}: token {wrong} is {tokens[wrong]}, stock {expected[wrong]}")
        error = largest_error({name: ours[name]}, {name: stock[name]}, tokens=wrong)
        if not error <= tolerance:  # NaN is not
            found.append(f"{name}: log-probabilities differ by {error:.2g}")
    return sorted(found)


def first_difference(ours: Sequence[int], stock: Sequence[int]) -> int | None:
    """The place of the first token that is another; None where there is none."""
    return next((i for i, (one, other) in enumerate(zip(ours, stock, strict=False)) if one != other), None)


def noise_of(disturbed: Mapping[str, Any], quiet: Mapping[str, Any]) -> float:
    """The largest difference of log-probabilities that a disturbance made, up to the first token that it changed."""
    return max(
        largest_error(
            {name: disturbed[name]},
            {name: quiet[name]},
            tokens=first_difference(disturbed[name]["tokens"], quiet[name]["tokens"]),
        )
        for name in quiet
    )


def largest_error(ours: Mapping[str, Any], stock: Mapping[str, Any], tokens: int | None = None) -> float:
    """The largest difference of log-probabilities over the first `tokens` of every sequence; NaN where one is NaN."""
    errors = [
        abs(one - other)
        for name in ours.keys() & stock.keys()
        for one, other in list(zip(ours[name]["logprobs"], stock[name]["logprobs"], strict=False))[:tokens]
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)
