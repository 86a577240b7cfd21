"""What the benchmarks and the demo share: servers end with whoever started them, and progress shows in a log."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks import asked_again, dummy_model, progress
from benchmarks import stored_prefixes as stored
from benchmarks.alone import Alone

ROOT = Path(__file__).parents[1]

# Stands for `vllm serve`: says that it is well, and has a child that would outlive it.
SERVE = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""

USE = """
import sys, time
from pathlib import Path
from benchmarks import server
server.VLLM = [sys.executable, sys.argv[1]]
with server.Server(Path("model"), Path(sys.argv[2]), [], {}) as started:
    print(started.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_server_ends_with_the_process_that_started_it(number: signal.Signals, tmp_path: Path) -> None:
    serve, log = tmp_path / "serve.py", tmp_path / "log"
    serve.write_text(SERVE)
    user = subprocess.Popen(
        [sys.executable, "-c", USE, str(serve), str(log)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert user.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in (user.stdout.readline(), log.read_text().split()[0])]
    user.send_signal(number)
    assert user.wait(20) == 128 + number
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []


def test_progress_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item takes 4 s, a look at the clock none: a line after 12 and 24 s, and whatever rich writes at the end."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log = io.StringIO()
    for _ in progress.track(range(6), "sizes", Console(file=log)):
        now[0] += 4
    lines = [line for line in log.getvalue().splitlines() if line.startswith("sizes: ")]
    assert lines == ["sizes: 3 of 6 after 12 s", "sizes: 6 of 6 after 24 s"]


def printed(table: Table) -> list[list[str]]:
    """The cells of a table as a wide terminal shows them, but for its head."""
    file = io.StringIO()
    Console(file=file, width=200).print(table)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in file.getvalue().splitlines() if "│" in line]


def test_what_is_asked_again_becomes_a_table_and_a_plot(tmp_path: Path) -> None:
    stock = [
        asked_again.Case("again, 1,100", 1100, 1024, [0.4, 0.05, 0.01], answers=10, different=2, error=0.123),
        asked_again.Case("prompt of 24,000", 0, 0, [2.0], logprobs=[-1.0, -2.0]),
    ]
    ours = [
        asked_again.Case("again, 1,100", 550, 275, [0.04], answers=4, error=2e-6),
        asked_again.Case("prompt of 24,000", 0, 0, [3.0], logprobs=[-1.0, -2.25]),
        asked_again.Case("documents", 200, 100, [3.0]),
    ]
    ours[0].add(asked_again.Case("again, 1,100", 550, 275, [0.06, 0.02], answers=6, error=1e-6))
    asked_again.hold_against(ours[1], stock[1])
    results = {"stock": stock, "shadowkv": ours}
    assert printed(asked_again.table(results)) == [
        ["again, 1,100", "93.1%", "50.0%", "0.05", "0.04", "2, 0.1", "0, 2e-06"],
        ["prompt of 24,000", "", "", "2", "3", "0", "0.2"],
        ["documents", "", "50.0%", "", "3", "", ""],
    ]
    asked_again.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_where_a_prefix_was_becomes_a_table_and_a_plot(tmp_path: Path) -> None:
    """Medians of three prompts; the other engine says another token once, and the restarted one is off by 0.25."""

    def answers(seconds: float, cached: int, logprob: float = -1.0, file_bytes: int = 0) -> list[stored.Answer]:
        return [
            stored.Answer(seconds * factor, 0.0, cached, 7, logprob, file_bytes, file_bytes // 2)
            for factor in (9, 1, 0.5)
        ]

    other = answers(0.25, 4096, file_bytes=2**27)
    results = {
        4096: {
            stored.COMPUTED: answers(10.0, 0, -3.0),
            stored.COMPLETE: [stored.Answer(0.125)] * 3,
            stored.SEALED: answers(0.5, 4096),
            stored.OTHER: [other[0], other[1], replace(other[2], token=8)],
            stored.CACHED: [
                *answers(0.5, 4096, file_bytes=2**28)[:2],
                stored.Answer(0.5, 0.0, 3072, 7, -1.25, 2**28, 2**27),
            ],
        }
    }
    lines = [line.strip("|").split("|") for line in stored.markdown(results).splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[1] == ["---"] * len(cells[0])
    assert cells[2:] == [
        ["4,096", "shadowkv: computed", "10", "1.00", "0", "", "", "", ""],
        ["4,096", "shadowkv: files complete", "0.125", "", "", "", "", "", ""],
        ["4,096", "shadowkv: in memory, sealed", "0.5", "20.00", "4,096", "", "", "", ""],
        ["4,096", "other engine", "0.25", "40.00", "4,096", "128.0", "64.0", "0.50", "0, 1 other tokens"],
        ["4,096", "restart: in the page cache", "0.5", "20.00", "3,072", "256.0", "128.0", "0.50", "0.25"],
    ]
    assert printed(stored.table(results)) == cells[2:]
    stored.plot(results | {16_384: results[4096]}, tmp_path / "plot.png", "a title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_files_are_waited_for_and_dropped_from_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "00").mkdir()
    for name in ("a.safetensors", "b.safetensors", "c.unfinished"):
        (tmp_path / "00" / name).write_bytes(bytes(2**20))
    waited = stored.wait_for_files(tmp_path, 2, time.perf_counter() - 5)
    assert waited.token < 0
    assert 5 <= waited.seconds < 50
    assert stored.file_size(tmp_path) == 2**20
    monkeypatch.setattr(stored, "MOST_SECONDS_OF_WRITING", 0.01)
    with pytest.raises(TimeoutError, match=r"There are 2 files in .*; 3 were expected\."):
        stored.wait_for_files(tmp_path, 3, 0.0)

    def read_from_disk(name: str) -> int:
        before = psutil.Process().io_counters().read_bytes
        (tmp_path / "00" / name).read_bytes()
        return int(psutil.Process().io_counters().read_bytes - before)

    assert read_from_disk("a.safetensors") == 0
    stored.drop_from_page_cache(tmp_path)
    mounts = {disk.mountpoint: disk.fstype for disk in psutil.disk_partitions(all=True)}
    if next(mounts[str(folder)] for folder in tmp_path.resolve().parents if str(folder) in mounts) == "tmpfs":
        pytest.skip("a file system in memory has its files nowhere else")
    names = ("a.safetensors", "b.safetensors", "c.unfinished")
    assert [read_from_disk(name) >= 2**20 for name in names] == [True, True, False]


class Kept:
    """What a process of its own keeps: it says where it is, and leaves a file at its end."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def where(self) -> int:
        return os.getpid()

    def close(self) -> None:
        self.left.write_text(str(os.getpid()))


def test_an_object_lives_in_a_process_of_its_own_and_is_closed(tmp_path: Path) -> None:
    with Alone(Kept, tmp_path / "left") as one, Alone(Kept, tmp_path / "other") as other:
        process = one.call("where")
        assert len({process, one.call("where"), other.call("where"), os.getpid()}) == 3
    assert (tmp_path / "left").read_text() == str(process)
    assert not psutil.pid_exists(process)
    with pytest.raises(TypeError, match="argument"), Alone(Kept) as wrong:
        wrong.call("where")


def test_weights_at_random_are_the_same_twice_and_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as they are at the beginning of a training: a query and a key have a product of about 1."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = dummy_model.CONFIGS["llama-3.2-1b"] | small | {"head_dim": 16, "initializer_range": 0.125}
    monkeypatch.setitem(dummy_model.CONFIGS, "small", shape)
    for name in ("one", "other"):
        dummy_model.write("small", tmp_path / name, 1)
        dummy_model.write_weights(tmp_path / name)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    logits = model(torch.tensor([[5, 6, 7], [6, 5, 7]])).logits[:, -1]
    assert logits.std() > 0.1
    assert (logits[0] - logits[1]).abs().max() > 0.1
