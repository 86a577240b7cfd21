"""What the benchmarks and the demo share: servers end with whoever started them, and progress shows in a log."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from benchmarks import asked_again, progress

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


def test_what_is_asked_again_becomes_a_table_and_a_plot(tmp_path: Path) -> None:
    stock = [
        asked_again.Case("again, 1,100", 1100, 1024, 0.5, answers=10, different=2, error=0.123),
        asked_again.Case("prompt of 24,000", 0, 0, 2.0, logprobs=[-1.0, -2.0]),
    ]
    ours = [
        asked_again.Case("again, 1,100", 1100, 550, 1.0, answers=10, error=2e-6),
        asked_again.Case("prompt of 24,000", 0, 0, 3.0, logprobs=[-1.0, -2.25]),
        asked_again.Case("documents", 200, 100, 3.0),
    ]
    asked_again.hold_against(ours[1], stock[1])
    results = {"stock": stock, "shadowkv": ours}
    console = Console(file=io.StringIO(), width=200)
    console.print(asked_again.table(results))
    assert isinstance(console.file, io.StringIO)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines() if "│" in line
    ]
    assert rows == [
        ["again, 1,100", "93.1%", "50.0%", "0.50", "1.00", "2, 0.1", "0, 2e-06"],
        ["prompt of 24,000", "", "", "2.00", "3.00", "0", "0.2"],
        ["documents", "", "50.0%", "", "3.00", "", ""],
    ]
    asked_again.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
