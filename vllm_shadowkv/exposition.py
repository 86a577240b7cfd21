"""From workers to vLLM's `/metrics`, which another process serves.

A worker answers whoever connects to its socket with the text of its metrics, as Prometheus' own clients do. In the
process of the API server, or of an `LLM`, a collector in Prometheus' default registry, which is what vLLM serves, asks
the workers below that process, and Ray's that it handed an engine to, and adds up. The sockets are abstract Unix
sockets: there is no file, and a process that is killed leaves nothing.

Where vLLM runs several API servers it sets `PROMETHEUS_MULTIPROC_DIR` and reads, instead of the registry, what
`prometheus_client` writes there in every process. A worker's metrics are among that without our doing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, generate_latest, values
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

NAME = "vllm_shadowkv.metrics"
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
REFRESH_SECONDS = 1.0
ANSWER_SECONDS = 0.5
"""A worker that does not answer in this time keeps the numbers of its last answer."""

logger = logging.getLogger("vllm.shadowkv")

owners: set[int] = set()  # processes that this one's engine came through; Ray's workers are no children of theirs


def belong_to(folder: str | None, *pids: int) -> None:
    """Makes this process's metrics known to those that its engine came through, where they look: Ray does neither."""
    owners.update(pids)
    if folder and FOLDER not in os.environ and Path(folder).is_dir():  # not on another machine
        os.environ[FOLDER] = folder
        values.ValueClass = values.get_value_class()


def serve(registry: CollectorRegistry, refresh: Callable[[], None]) -> None:
    """Serves this process's metrics from a thread, for as long as it lives.

    Args:
        registry: what to serve.
        refresh: brings the metrics up to date; called for every answer, and every `REFRESH_SECONDS`.
    """
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(_address(os.getpid(), *sorted(owners)))
    except OSError as error:  # not on Linux, or forbidden
        logger.warning("shadowkv: no metrics of this process, for it cannot have an abstract Unix socket: %s", error)
        return
    listener.listen()
    listener.settimeout(REFRESH_SECONDS)
    threading.Thread(target=_answer, args=(listener, registry, refresh), name="shadowkv-metrics", daemon=True).start()


def _address(*pids: int) -> str:
    """The name of a process's socket: its own id, then its owners'. A leading NUL makes it abstract."""
    return "\0" + ".".join([NAME, *map(str, pids)])


def _answer(listener: socket.socket, registry: CollectorRegistry, refresh: Callable[[], None]) -> None:
    with listener:
        while True:
            try:
                connection = listener.accept()[0]
            except TimeoutError:
                connection = None
            try:
                refresh()
            except Exception:
                logger.exception("shadowkv: this process reports no metrics any more.")
                return
            if connection is not None:
                with connection, contextlib.suppress(OSError):  # whoever asked may have gone
                    connection.settimeout(ANSWER_SECONDS)
                    connection.sendall(generate_latest(registry))


class Collector:
    """The sum of what the workers at and below this process count; for `prometheus_client.REGISTRY`."""

    def __init__(self) -> None:
        self._answers: dict[tuple[int, ...], str] = {}

    def describe(self) -> Iterable[Metric]:
        """Nothing: only workers know the names."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The metrics of all workers, those with equal labels added up."""
        # A sum that lacks a worker for once would look like a counter that was reset.
        self._answers = {pids: _ask(*pids) or self._answers.get(pids, "") for pids in _workers()}
        families: dict[str, Metric] = {}
        sums: Counter[tuple[str, str, tuple[tuple[str, str], ...]]] = Counter()
        for text in self._answers.values():
            for family in text_string_to_metric_families(text):
                if family.name.endswith("_created"):
                    continue
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    sums[family.name, sample.name, tuple(sorted(sample.labels.items()))] += sample.value  # type: ignore[assignment]
        for (name, sample_name, labels), value in sums.items():
            families[name].add_sample(sample_name, dict(labels), value)
        return families.values()


def _workers() -> list[tuple[int, ...]]:
    """The processes that serve metrics and are at or below this one, or have an owner there; with their owners."""
    try:
        sockets = Path("/proc/net/unix").read_text()
    except OSError:
        return []
    names = set(re.findall(rf"@{re.escape(NAME)}\.([\d.]+)$", sockets, re.MULTILINE))
    return sorted(pids for pids in (tuple(map(int, name.split("."))) for name in names) if any(map(_is_ours, pids)))


def _is_ours(pid: int) -> bool:
    try:
        return os.getpid() in (pid, *(parent.pid for parent in psutil.Process(pid).parents()))
    except psutil.Error:  # it has just ended
        return False


def _ask(*pids: int) -> str:
    """A worker's answer; nothing where it does not come, or where another process or user has taken the name."""
    answer = b""
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(_address(*pids))
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", peer)[:2] != (pids[0], os.geteuid()):
                return ""
            while part := connection.recv(1 << 16):
                answer += part
                if time.monotonic() > deadline:
                    return ""
    except OSError:
        return ""
    return answer.decode()
