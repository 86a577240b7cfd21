"""Starts `vllm serve`, asks it through its OpenAI API, and reads what it says of itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

START_SECONDS = 300

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
"""The `vllm` command, also where its script is not installed."""


class ServerError(Exception):
    """The server did not start, or died; the message ends with the end of its log."""


@dataclass(frozen=True)
class Completion:
    """One answer: its text, and the seconds between its tokens, the first one's not counted."""

    text: str
    token_seconds: list[float]


class Server:
    """`vllm serve` in a process group of its own. Use it as a context manager."""

    def __init__(
        self,
        model: Path,
        log: Path,
        arguments: list[str],
        environment: dict[str, str],
        command: Sequence[str] = (),
    ) -> None:
        """Describes a server.

        Args:
            model: directory of the checkpoint.
            log: file that takes the server's output.
            arguments: of `vllm serve`, beyond model and port.
            environment: variables beyond this process's own.
            command: what takes the arguments of `vllm serve`; default: that.
        """
        self._log, self._arguments, self._environment = log, arguments, environment
        self._command = command or (*VLLM, "serve")
        self._model = str(model)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> Server:
        """Starts the server and waits until it answers.

        Until it is stopped, SIGTERM and SIGHUP end this process as an exception does, so that the server ends too: it
        is in a process group of its own, which no terminal and no `make` knows.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._handlers.callback(signal.signal, number, signal.signal(number, _exit))
        command = [*self._command, self._model, "--host", "127.0.0.1", "--port", str(self._port), *self._arguments]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | self._environment,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the server and everything that it started."""
        self._stop()

    @property
    def url(self) -> str:
        """Where the server listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The server's first process."""
        assert self._process is not None
        return self._process.pid

    def complete(self, prompt: str, max_tokens: int) -> Completion:
        """Asks for a greedy completion, streamed so that every token can be timed."""
        text, times = "", []
        for token in self.stream(prompt, max_tokens):
            text += token
            times.append(time.perf_counter())
        return Completion(text.strip(), [later - earlier for earlier, later in pairwise(times)])

    def stream(self, prompt: str, max_tokens: int, ignore_eos: bool = False) -> Generator[str, None, None]:
        """Asks for a greedy completion; its tokens as they come. To close the generator is to hang up."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": ignore_eos,
            "stream": True,
        }
        for line in self._get("/v1/completions", body):
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])["choices"][0]["text"]

    def cache_config(self) -> dict[str, str]:
        """What the server reports of its KV cache in Prometheus' `vllm:cache_config_info`."""
        for line in self._get("/metrics"):
            if line.startswith(b"vllm:cache_config_info{"):
                return dict(re.findall(r'(\w+)="([^"]*)"', line.decode()))
        raise ServerError("the server reports no vllm:cache_config_info")

    def host_pool_mib(self) -> int:
        """What the backend says that its host pool takes."""
        found = re.search(r"host pool ([\d.]+) GiB", self.log_text())
        if found is None:
            raise ServerError("the log does not say how large the host pool is")
        return round(float(found[1]) * 1024)

    def metrics(self) -> dict[str, float]:
        """What `/metrics` says: values by name with labels, as they are written there."""
        lines = (line.decode().strip() for line in self._get("/metrics") if not line.startswith(b"#"))
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def wait(self, seconds: float) -> int:
        """Waits until that process has ended of itself; returns its exit code."""
        assert self._process is not None
        return self._process.wait(seconds)

    def log_text(self) -> str:
        """The server's output up to now."""
        return self._log.read_text(errors="replace")

    def _get(self, path: str, body: dict[str, Any] | None = None) -> Iterator[bytes]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=START_SECONDS) as response:
            yield from response

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"vllm serve ended with code {self._process.returncode}:\n{self._end_of_log()}")
            try:
                for _ in self._get("/health"):
                    pass
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise ServerError(f"vllm serve did not answer within {START_SECONDS} s:\n{self._end_of_log()}")

    def _end_of_log(self) -> str:
        return "\n".join(self.log_text().splitlines()[-30:])

    def _stop(self) -> None:
        with self._handlers:
            if self._process is None or self._process.poll() is not None:
                return
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def _exit(number: int, frame: FrameType | None) -> None:
    """A signal's handler: ends the process through its `with` and `finally`, with the exit code that shells give."""
    raise SystemExit(128 + number)
