"""The two servers that are compared: how they are started, and what they say of their KV cache."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.server import Server

BACKENDS = ("shadowkv", "stock")


@dataclass(frozen=True)
class Pool:
    """The KV cache on the device.

    Attributes:
        num_blocks: as the server reports them, the null block included.
        block_size: tokens of a block; ours is a sealed one.
        num_bytes: of all blocks, as it was asked for.
    """

    num_blocks: int
    block_size: int
    num_bytes: int

    @property
    def token_bytes(self) -> float:
        """Device bytes of a cached token, sealed where blocks are."""
        return self.num_bytes / (self.num_blocks * self.block_size)

    @classmethod
    def of(cls, server: Server, num_bytes: int) -> Pool:
        """Of a server that runs."""
        cache = server.cache_config()
        # vLLM reports the smallest block of any group, and ours holds exact pages too.
        sizes = re.findall(r"shadowkv: \d+ blocks of (\d+) tokens", server.log_text())
        return cls(int(cache["num_gpu_blocks"]), int((sizes or [cache["block_size"]])[0]), num_bytes)


@contextmanager
def serve(
    backend: str, model: Path, settings: dict[str, Any], cache_mib: int, arguments: list[str], console: Console
) -> Iterator[Server]:
    """A server with one of `BACKENDS`; `settings` are shadowkv's, and stock ignores them."""
    ours = ["--attention-backend", "shadowkv", "--additional-config", json.dumps({"shadowkv": settings})]
    extra = ours if backend == "shadowkv" else []
    name = re.sub(r"-\d+-[0-9a-f]{8}$", "", model.name)
    console.print(f"Starting `vllm serve {name}{' ' if extra else ''}{' '.join(extra)}` …", highlight=False)
    pool = ["--kv-cache-memory-bytes", str(cache_mib * 2**20)]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "server.log"
        with Server(model, log, [*pool, "--enforce-eager", *arguments, *extra], _environment()) as server:
            yield server


def _environment() -> dict[str, str]:
    """Of both servers. vLLM leaves a core of the CPU to itself, which of two is one too many here."""
    cores = sorted(os.sched_getaffinity(0))
    few = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))} if len(cores) == 2 else {}
    return {"VLLM_LOGGING_LEVEL": "DEBUG"} | few
