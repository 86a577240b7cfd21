"""How one call is timed, on a CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

SWEEP_BYTES = 128 << 20
"""More than the L2 cache of an H100 (50 MiB), or what a core finds of its processor's L3."""


def sweeper(device: str) -> Callable[[], Tensor]:
    """A call that takes whatever was cached out of the caches, as the rest of a model would.

    It reads: dirty lines would have to be written back by what is timed. On a GPU what is timed is launched while this
    still runs, so the time of a launch does not count.
    """
    return torch.zeros(SWEEP_BYTES // 4, device=device).sum


def once(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - started)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
