"""Runs `vllm bench …`, as users do, and reads what it measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BACKENDS = {
    "stock": [],
    "stock-fp8": ["--kv-cache-dtype", "fp8"],
    "shadowkv": ["--attention-backend", "shadowkv"],
    "shadowkv-int8": [
        *("--attention-backend", "shadowkv"),
        *("--additional-config", '{"shadowkv": {"value_dtype": "int8"}}'),
    ],
}
"""Arguments of an engine that has each backend."""


class BenchError(Exception):
    """`vllm bench …` failed; the message says why."""


def vllm_bench(what: str, arguments: list[str], to: str = "--output-json") -> tuple[dict[str, Any], str]:
    """Runs `vllm bench WHAT`.

    Args:
        what: "latency", "serve" or "throughput".
        arguments: of that command.
        to: its option that takes the path of the result.

    Returns:
        The result, and what was printed.

    Raises:
        BenchError: it failed.
    """
    vllm = Path(sys.executable).with_name("vllm")
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        command = [str(vllm), "bench", what, *arguments, to, str(result)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if finished.returncode or not result.exists():
            raise BenchError(f"vllm bench {what} failed:\n{_reason(finished.stdout)}")
        return json.loads(result.read_text()), finished.stdout


def _reason(output: str) -> str:
    """What its processes raised; the output ends with that they are gone."""
    lines = output.splitlines()
    return "\n".join([line for line in lines if re.search(r"\w(Error|Exception): ", line)] or lines[-30:])
