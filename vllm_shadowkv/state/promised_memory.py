"""Host memory that servers on this machine were promised and have not touched yet.

Linux gives memory when it is first written, so an idle server looks as if it had taken none, and the next one would
plan with the same bytes. Each notes what it was promised in a file that it holds locked while it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger("vllm.shadowkv")

FOLDER = Path("/dev/shm")
"""Seen by all of a machine, or of a container; a restart clears it."""
ENDING = ".json"


class Promise:
    """Bytes that this process will take; others count what of them it has not touched. Ends with the object."""

    def __init__(self, num_bytes: int, server: str) -> None:
        """Makes the promise known; where the folder cannot be written, nobody learns of it.

        Args:
            num_bytes: of host memory.
            server: the same in all processes of a server, which share memory by their own rule.
        """
        process = psutil.Process()
        note = {
            "bytes": num_bytes,
            "server": server,
            "pid": process.pid,
            "started": process.create_time(),
            "resident": process.memory_info().rss,
        }
        try:
            _folder().mkdir(mode=0o700, exist_ok=True)
            descriptor, path = tempfile.mkstemp(prefix=f"{process.pid}.", dir=_folder())
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, json.dumps(note).encode())
            path = str(Path(path).rename(path + ENDING))  # only now it is found, locked and whole
        except OSError as error:
            logger.debug("shadowkv: other servers are not told of this one's host memory: %s.", error)
            return
        weakref.finalize(self, _withdraw, descriptor, path)


def promised_to_others(server: str = "") -> int:
    """Bytes that other servers of this user were promised and have not touched; notes of dead ones are removed.

    Args:
        server: whose promises do not count; none.
    """
    untouched = 0
    for note in _notes():
        if note["server"] == server:
            continue
        touched = 0
        with contextlib.suppress(psutil.Error):  # of another process namespace: as if nothing were touched
            process = psutil.Process(note["pid"])
            if process.create_time() == note["started"]:
                touched = process.memory_info().rss - note["resident"]
        untouched += max(note["bytes"] - max(touched, 0), 0)
    return untouched


def _folder() -> Path:
    return FOLDER / f"vllm_shadowkv.{os.getuid()}"


def _notes() -> Iterator[dict[str, Any]]:
    for path in _folder().glob("*" + ENDING):
        with contextlib.suppress(OSError), path.open() as file:  # gone meanwhile
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield json.load(file)
            else:
                path.unlink()


def _withdraw(descriptor: int, path: str) -> None:
    with contextlib.suppress(OSError):
        Path(path).unlink()
    os.close(descriptor)
