"""What the README tells a reader to type works as it stands there, with the repository's small model for MODEL.

`vllm serve` with these arguments is what the server's tests start; the installing lines are what set this up.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import ENVIRONMENT

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "benchmarks" / "needle" / "checkpoints" / "needle"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.partition("  #")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.split()[:1] in (["vllm"], ["vllm-shadowkv"], ["make"], ["pip"])]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | ENVIRONMENT | {"PATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_it_is_short_and_its_targets_exist() -> None:
    assert len(README.splitlines()) <= 150
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {line.split()[1] for line in COMMANDS if line.startswith("make ")} <= targets
    for link in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("vllm-shadowkv ")])
def test_commands(command: str) -> None:
    arguments = shlex.split(command.replace("MODEL", str(MODEL)))
    result = run(*arguments)
    # The doctor's findings depend on the machine.
    assert result.returncode == 0 or "doctor" in arguments, result.stderr
    assert result.stdout


@pytest.mark.slow
def test_python_and_throughput() -> None:
    (snippet,) = (block for kind, block in BLOCKS if kind == "python")
    answered = run(sys.executable, "-c", snippet.replace("MODEL", str(MODEL)))
    assert answered.returncode == 0, answered.stderr[-3000:]
    (bench,) = (line for line in COMMANDS if line.startswith("vllm bench throughput "))
    shorter = bench.replace("MODEL", str(MODEL)).replace("32768", "8192").replace("128", "16")
    measured = run(*shlex.split(shorter), "--num-prompts", "2")
    assert re.search(r"Throughput: [\d.]+ requests/s", measured.stdout), measured.stdout + measured.stderr[-3000:]
