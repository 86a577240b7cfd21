"""The examples answer what is known to be right, and the chat's later turns come from the prefix cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


BOTH = """
import runpy
for name in ("long_document", "chat"):
    print("running", name)
    try:
        runpy.run_path(f"examples/{name}.py", run_name="__main__")
    except SystemExit as end:
        print("exit code", end.code)
"""
"""In one process, because vLLM takes long to import."""


@pytest.mark.slow
def test_answers_and_prefix_cache() -> None:
    result = subprocess.run(
        [sys.executable, "-c", BOTH],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    _, document, chat = result.stdout.split("running ")
    for said in (document, chat):
        assert said.endswith("exit code 0\n"), f"{said}\n{result.stderr[-3000:]}"
    assert "8,192 tokens of prompt; answer: k" in document
    cached = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) of [\d,]+ prompt tokens from", chat)]
    assert cached == [0, 8192, 8192]


def test_compose_file() -> None:
    """As far as can be told without Docker: what is named exists, and the service can be watched and can pin."""
    folder = ROOT / "examples" / "compose"
    service: dict[str, Any] = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["vllm"]
    context = (folder / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).is_file()
    assert service["healthcheck"]["test"][0] == "CMD"
    compile(service["healthcheck"]["test"][3], "healthcheck", "exec")
    assert service["ulimits"]["memlock"] == -1
    assert "--attention-backend=shadowkv" in service["command"]
