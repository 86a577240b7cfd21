from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, multiprocess

from vllm_shadowkv import exposition
from vllm_shadowkv.exposition import FOLDER, Collector

# A worker: its counter shows how often it was asked to refresh, its gauge what it was started with.
WORKER = """
import sys, time
from prometheus_client import CollectorRegistry, Counter, Gauge
from vllm_shadowkv import exposition
if len(sys.argv) > 2:
    exposition.belong_to(sys.argv[2] or None, *map(int, sys.argv[3:]))
registry = CollectorRegistry()
refreshed = Counter("vllm:shadowkv_refreshed", "R.", ["engine"], registry=registry).labels(engine="0")
size = Gauge("vllm:shadowkv_size", "S.", ["engine"], registry=registry, multiprocess_mode="livesum")
size.labels("0").set(sys.argv[1])
exposition.serve(registry, refreshed.inc)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a worker below this process."""
    started: list[subprocess.Popen[str]] = []

    def begin(size: int, *owner: Any, orphan: bool = False, **environment: str) -> subprocess.Popen[str]:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", WORKER, str(size), *map(str, owner)]
        if orphan:
            command = ["sh", "-c", 'exec 3<&0; "$@" <&3 &', "sh", *command]
        process = subprocess.Popen(command, env=os.environ | environment, **pipes)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def values(collector: Any) -> dict[str, float]:
    """What workers of these tests count. This process may have metrics too, where other tests have made it a worker."""
    ours = {"vllm:shadowkv_refreshed", "vllm:shadowkv_size"}
    families = [family for family in collector.collect() if family.name in ours]
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_the_workers_below_are_added_up(start: Callable[..., subprocess.Popen[str]]) -> None:
    collector = Collector()
    assert values(collector) == {}
    first = start(3)
    start(40)
    assert values(collector)["vllm:shadowkv_size"] == 43
    (counter,) = (family for family in collector.collect() if family.name == "vllm:shadowkv_refreshed")
    assert (counter.type, counter.documentation) == ("counter", "R.")
    assert [(sample.name, sample.labels) for sample in counter.samples] == [
        ("vllm:shadowkv_refreshed_total", {"engine": "0"})
    ], "without the _created of Prometheus' text"
    first.kill()
    first.wait()
    assert values(collector)["vllm:shadowkv_size"] == 40


def test_every_answer_is_fresh(start: Callable[..., subprocess.Popen[str]]) -> None:
    start(1)
    collector = Collector()
    asked = [values(collector)["vllm:shadowkv_refreshed_total"] for _ in range(5)]
    assert asked == sorted(set(asked))


def test_a_process_reports_itself_too() -> None:
    code = """
import prometheus_client, os
from vllm_shadowkv import exposition
registry = prometheus_client.CollectorRegistry()
gauge = prometheus_client.Gauge("vllm:shadowkv_size", "S.", registry=registry)
exposition.serve(registry, lambda: gauge.set(5))
print([sample.value for family in exposition.Collector().collect() for sample in family.samples])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[5.0]\n"


def test_other_servers_on_the_machine_are_left_out(start: Callable[..., subprocess.Popen[str]]) -> None:
    start(1)
    code = "from vllm_shadowkv.exposition import FOLDER, Collector; print(list(Collector().collect()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_worker_elsewhere_belongs_to_those_that_its_engine_came_through(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    """Ray's workers are no children of the server, and Ray's engine cores neither."""
    collector = Collector()
    start(1, orphan=True)
    start(2, "", os.getppid(), orphan=True)
    assert values(collector) == {}
    start(30, "", os.getppid(), os.getpid(), orphan=True)
    assert values(collector)["vllm:shadowkv_size"] == 30
    below = start(400)
    start(5000, "", below.pid, orphan=True)
    assert values(collector)["vllm:shadowkv_size"] == 5430


def test_a_worker_that_does_not_answer_keeps_its_numbers(
    start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(3)
    collector = Collector()
    before = values(collector)
    monkeypatch.setattr(exposition, "_ask", lambda *pids: "")
    assert values(collector) == before


def test_a_socket_of_somebody_else_is_not_believed(
    start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start(3)
    assert exposition._ask(worker.pid)
    monkeypatch.setattr(exposition, "_address", lambda *pids: f"\0{exposition.NAME}.{worker.pid}")
    assert not exposition._ask(os.getpid())
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not exposition._ask(worker.pid), "of another user"


def test_without_a_socket_the_worker_works_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition, "_address", lambda *pids: "/no/such/directory/socket")
    exposition.serve(CollectorRegistry(), lambda: None)
    assert "no metrics of this process" in caplog.text


def test_several_api_servers_read_files(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    # Workers inherit the variable that vLLM sets then; nobody connects to them.
    for size in (3, 40):
        start(size, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    collector = multiprocess.MultiProcessCollector(None, path=str(tmp_path))
    assert values(collector)["vllm:shadowkv_size"] == 43
    deadline = time.monotonic() + 20
    while values(collector)["vllm:shadowkv_refreshed_total"] < 3:
        assert time.monotonic() < deadline, "nothing is published without being asked for"
        time.sleep(0.1)


@pytest.mark.parametrize("there", [True, False])
def test_a_worker_of_ray_writes_files_where_it_is_on_the_servers_machine(
    there: bool, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started without the variable, and may have imported Prometheus' client before it hears of it."""
    monkeypatch.delenv(FOLDER, raising=False)
    folder = tmp_path / "files"
    if there:
        folder.mkdir()
    start(3, folder, os.getpid())
    assert there == folder.exists()
    if there:
        assert values(multiprocess.MultiProcessCollector(None, path=str(folder)))["vllm:shadowkv_size"] == 3
