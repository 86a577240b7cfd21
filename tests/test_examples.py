"""The examples answer what is known to be right, and the chat's later turns come from the prefix cache."""

from __future__ import annotations

import json
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


STUB = '#!/bin/sh\necho "$(basename "$0") $* [$RAY_ADDRESS $RAY_AUTH_MODE]" >> "$COMMANDS"\n'
WAITS_FOR_RAY = 'until grep -q ^ray "$COMMANDS"; do sleep 0.1; done\n'


CONNECTOR = '{"kv_connector": "ShadowKVConnector", "kv_role": "kv_%s", "kv_connector_extra_config": {"path": "files"}}'


def test_two_engines(tmp_path: Path) -> None:
    """What the script starts."""
    (tmp_path / "vllm").write_text(STUB)
    (tmp_path / "vllm").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMMANDS": str(tmp_path / "commands")}
    script = str(ROOT / "examples" / "two_engines" / "ask.sh")
    line = [script, "serve", "a model", "files", "--max-model-len", "8192"]
    result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    assert sorted((tmp_path / "commands").read_text().splitlines()) == [
        f"vllm serve a model --port {port} --served-model-name a model --attention-backend shadowkv "
        f"--enable-prompt-tokens-details --kv-transfer-config {CONNECTOR % role} --max-model-len 8192 [ ]"
        for port, role in ((8001, "producer"), (8002, "consumer"))
    ]
    assert json.loads(CONNECTOR % "both")["kv_role"] == "kv_both"
    result = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert result.stdout.splitlines()[-1].startswith("  ask.sh ask MODEL")


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        (
            ["head", "a model", "--max-model-len", "131072"],
            [
                "python3 - 2 PID [10.0.0.1:6379 token]",
                "ray start --head --block --node-ip-address=10.0.0.1 --port=6379 --num-gpus=4 [10.0.0.1:6379 token]",
                "vllm serve a model --attention-backend shadowkv --distributed-executor-backend ray "
                "--tensor-parallel-size 4 --pipeline-parallel-size 2 --max-model-len 131072 [10.0.0.1:6379 token]",
            ],
        ),
        (["worker", "10.0.0.1"], ["ray start --address=10.0.0.1:6379 --num-gpus=4 --block [ token]"]),
        (["head"], None),
        (["worker"], None),
        ([], None),
    ],
    ids=lambda line: " ".join(line or ["refused"]),
)
def test_two_nodes(line: list[str], commands: list[str] | None, tmp_path: Path) -> None:
    """What the script starts, and with which Ray; `tests/integration/test_ray.py` runs it."""
    for name in ("ray", "vllm", "python3"):
        (tmp_path / name).write_text(STUB + (WAITS_FOR_RAY if name == "python3" else ""))
        (tmp_path / name).chmod(0o755)
    started = tmp_path / "commands"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMMANDS": str(started), "GPUS_PER_NODE": "4"}
    environment["HEAD_ADDRESS"] = "10.0.0.1"
    script = [str(ROOT / "examples" / "two_nodes" / "serve.sh"), *line]
    result = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=30)
    if commands is None:
        assert result.returncode == 2
        assert result.stderr.startswith("usage: serve.sh head MODEL")
        assert not started.exists()
    else:
        assert result.returncode == 0, result.stderr
        # Ray is started beside what waits for it.
        assert sorted(re.sub(r"- 2 \d+", "- 2 PID", line) for line in started.read_text().splitlines()) == commands
