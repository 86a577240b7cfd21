"""`examples/two_nodes` on one machine: two raylets, which Ray and vLLM take for two, and a server over both.

VLLM has no Ray on its CPU platform; the one of `ray_on_cpu` has. Only loopback is used.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import psutil
from engine import ENVIRONMENT
from test_server import runs

from benchmarks.needle import CHECKPOINT
from benchmarks.server import VLLM, Server

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SERVE = str(ROOT / "examples" / "two_nodes" / "serve.sh")
HEAD, OTHER = "127.0.0.2", "127.0.0.3"
"""Not 127.0.0.1, in whose place Ray puts the machine's address."""
IN_RAY = ("ray::RayWorkerProc", "ray::EngineCoreActor")

COMMANDS = {
    "python3": f'exec {sys.executable} "$@"',
    "vllm": f'exec {" ".join(VLLM)} "$@"',
    # A small object store, no dashboard, and addresses that make them two machines.
    "ray": f'case "$*" in *--head*) more=--include-dashboard=false ;; *) more=--node-ip-address={OTHER} ;; esac\n'
    f'exec {sys.executable} -m ray.scripts.scripts "$@" --object-store-memory=80000000 $more',
}
"""What the script starts, by name."""


def title(process: psutil.Process) -> str:
    """What a process calls itself, or the file that it runs; nothing where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return "".join(process.cmdline()[:1])
    return ""


class TwoNodes:
    """The two raylets and the server, from `with` to its end.

    Attributes:
        server: of the first node.
        temporary: its temporary files, Ray's aside.
    """

    def __init__(self, directory: Path, arguments: list[str], environment: dict[str, str]) -> None:
        """Describes them.

        Args:
            directory: for files and sockets; with a short name.
            arguments: of `vllm serve`, after the script's own.
            environment: variables beyond those that all have; `PYTHONPATH` comes first.
        """
        self._directory, self.temporary = directory, directory / "tmp"
        commands = directory / "bin"
        for folder in (commands, self.temporary):
            folder.mkdir()
        for name, command in COMMANDS.items():
            (commands / name).write_text(f"#!/bin/sh\n{command}\n")
            (commands / name).chmod(0o755)
        paths = [environment.get("PYTHONPATH", ""), str(HERE / "ray_on_cpu"), str(ROOT)]
        with socket.socket() as probe:
            probe.bind((HEAD, 0))
            port = probe.getsockname()[1]
        self._environment = {
            **ENVIRONMENT,
            "VLLM_LOGGING_LEVEL": "INFO",
            "GLOO_SOCKET_IFNAME": "lo",
            "HEAD_ADDRESS": HEAD,
            "PORT": str(port),
            "GPUS_PER_NODE": "1",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_DEDUP_LOGS": "0",  # each rank's lines count
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_TMPDIR": str(directory),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # 15 else, which on few cores is a crawl
            **environment,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TMPDIR": str(self.temporary),
        }
        log = directory / "server.log"
        self.server = Server(CHECKPOINT, log, arguments, self._environment, command=[SERVE, "head"])
        self._other: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TwoNodes:
        """Starts both nodes and waits until the server answers."""
        with (self._directory / "other.log").open("wb") as log:
            self._other = subprocess.Popen(
                [SERVE, "worker", HEAD],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._environment,
                start_new_session=True,
            )
        try:
            self.server.__enter__()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends everything that there still is."""
        self._kill()
        self.server.__exit__(kind, error, trace)
        assert self._other is not None
        self._other.wait()

    def workers(self) -> list[psutil.Process]:
        """Those in which Ray runs something of vLLM's."""
        return [process for process in self._of(*self._sessions()) if title(process).startswith(IN_RAY)]

    def of_the_server(self) -> list[psutil.Process]:
        """Those that must end with the server: all but the other node's Ray, which waits for another."""
        return list({*self._of(self.server.pid), *self.workers()})

    def _sessions(self) -> list[int]:
        """A node's processes keep its session, though Ray puts each worker in a group of its own."""
        assert self._other is not None
        return [self.server.pid, self._other.pid]

    def _of(self, *sessions: int) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) in sessions and runs(process):
                    found.append(process)
        return found

    def _kill(self) -> None:
        while left := self._of(*self._sessions()):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
