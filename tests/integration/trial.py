"""Runs engines for the tests, one after the other, each in a fork of this process, which imports vLLM once.

    python trial.py v1|v2        reads one trial per line from stdin, and answers each with a line: its exit status

A trial is a JSON object, `engine.Trial`; its result goes to the file that it names. This process computes nothing itself: a
fork after the first parallel computation would hang.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 1200  # a trial that hangs says where, and ends


def main(runner: str) -> None:
    if runner == "v2":
        import v2_on_cpu.interpreter  # noqa: F401
    import vllm.entrypoints.llm  # noqa: F401

    for line in sys.stdin:
        trial = json.loads(line)
        child = os.fork()
        if child == 0:
            _run_and_exit(trial)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run_and_exit(trial: dict[str, Any]) -> None:
    """Ends the process: nothing of the parent's exit runs in it."""
    status = 1
    try:
        with Path(trial["log"]).open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
            Path(trial["result"]).write_text(json.dumps(run(trial)))
            status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(trial: dict[str, Any]) -> dict[str, Any]:
    """Starts an engine and asks the trial's scenarios of it."""
    from scenarios import SCENARIOS, Asker

    settings = trial["shadowkv"]
    if settings is not None and trial["poison"]:
        import poison

        poison.install()
    llm = start(trial)
    counts = _count(llm) if trial["in_process"] else {}
    asker = Asker(llm, margins=settings is None)
    if trial["graphs"]:
        _capture(llm)
    found = {name: SCENARIOS[name](asker) for name in trial["scenarios"]}
    planted = {name: _ask_with(name, llm, asker) for name in trial["plants"]}
    if settings is not None and trial["in_process"]:
        from vllm_shadowkv.integration.runtime import Runtime

        Runtime.latest().bind().state.check_integrity()
    if settings is not None and trial["poison"]:
        counts["poisoned"] = poison.poisoned
    if trial["graphs"]:
        from v2_on_cpu import emulated_graphs

        counts["replays"] = emulated_graphs.replays
    return {"sequences": found, "planted": planted, "counts": counts}


def start(trial: dict[str, Any]) -> Any:
    """An engine with the trial's backend."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if trial["in_process"] else "1"
    from vllm import LLM

    backend: dict[str, Any] = {}
    if trial["shadowkv"] is not None:
        backend = {"attention_backend": "shadowkv", "additional_config": {"shadowkv": trial["shadowkv"]}}
    options = {"enforce_eager": True, "max_model_len": 2048, "max_num_batched_tokens": 200, "max_num_seqs": 8}
    return LLM(trial["model"], dtype="float32", skip_tokenizer_init=True, **(options | backend | trial["options"]))


def _count(llm: Any) -> dict[str, int]:
    """Counts what the tests want to have happened."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_shadowkv.integration import metadata

    counts = {"preemptions": 0, "seals": 0}

    def counting(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    Scheduler._preempt_request = counting("preemptions", Scheduler._preempt_request)
    metadata.seal_blocks = counting("seals", metadata.seal_blocks)
    return counts


def _ask_with(plant: str, llm: Any, asker: Any) -> dict[str, Any]:
    """The short scenario with an error planted."""
    import plants
    from scenarios import SCENARIOS

    tensor = plant.removeprefix("not persistent: ")
    with plants.not_persistent(tensor) if tensor != plant else plants.PLANTS[plant]():
        if tensor != plant:
            _capture(llm)
        return SCENARIOS["short"](asker)


def _capture(llm: Any) -> None:
    from v2_on_cpu import emulated_graphs

    executor = llm.llm_engine.engine_core.engine_core.model_executor
    emulated_graphs.capture(executor.driver_worker.worker.model_runner)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1])
