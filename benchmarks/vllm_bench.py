"""Runs `vllm bench …`, as users do, and reads what it measured."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.server import VLLM

BACKENDS = {
    "stock": [],
    "stock-fp8": ["--kv-cache-dtype", "fp8"],
    "shadowkv": ["--attention-backend", "shadowkv"],
    "shadowkv-16-bit-values": [
        *("--attention-backend", "shadowkv"),
        *("--additional-config", '{"shadowkv": {"value_dtype": "auto"}}'),
    ],
}
"""Arguments of an engine that has each backend."""


class BenchError(Exception):
    """`vllm bench …` failed; the message says why."""


def vllm_bench(
    what: str, arguments: list[str], log: Path | None = None, to: str = "--output-json"
) -> tuple[dict[str, Any], str]:
    """Runs `vllm bench WHAT`.

    Args:
        what: "latency", "serve" or "throughput".
        arguments: of that command.
        log: file that takes what it prints, if that is to be kept.
        to: its option that takes the path of the result.

    Returns:
        The result, and what was printed.

    Raises:
        BenchError: it failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        log = log or Path(directory) / "log"
        command = [*VLLM, "bench", what, *arguments, to, str(result)]
        with log.open("wb") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        printed = log.read_text(errors="replace")
        if code or not result.exists():
            raise BenchError(f"vllm bench {what} failed:\n{_reason(printed)}")
        return json.loads(result.read_text()), printed


def log_beside(path: Path | None, name: str) -> Path | None:
    """Where a run's log is kept, in a folder beside the JSON file of the results; None without one."""
    if path is None:
        return None
    folder = path.with_suffix(".logs")
    folder.mkdir(exist_ok=True)
    return folder / f"{name}.log"


def write_records(path: Path | None, module: str, records: Sequence[Any]) -> None:
    """Writes dataclasses to a JSON file, if there is a path: after every run, for the next one may be cut off."""
    if path:
        about = machine(module, "cuda" if torch.cuda.is_available() else "cpu")
        content = {"machine": about, "records": [asdict(record) for record in records]}
        path.write_text(json.dumps(content, indent=1) + "\n")


def _reason(output: str) -> str:
    """What its processes raised; the output ends with that they are gone."""
    lines = output.splitlines()
    return "\n".join([line for line in lines if re.search(r"\w(Error|Exception): ", line)] or lines[-30:])
