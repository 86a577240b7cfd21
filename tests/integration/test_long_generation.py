"""Generation beyond every window: the right token at each place, with no more blocks or memory than planned.

`python -m benchmarks.long_generation` does the same for 20,000 tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine import ENVIRONMENT

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[2]
TOKENS = 3000


@pytest.mark.slow
def test_it_stays_right_and_bounded(tmp_path: Path) -> None:
    """At the end the context has 4,100 tokens, of which a step reads a half."""
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.long_generation", "--tokens", str(TOKENS), "--json", str(result)]
    finished = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    windows = json.loads(result.read_text())["windows"]
    assert sum(window["right"] for window in windows) == TOKENS
    assert min(window["worst_probability"] for window in windows) > 0.95
