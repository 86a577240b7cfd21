"""A second CUDA stream, for what goes over the link to the host while the step's own stream computes."""

from __future__ import annotations

import functools

import torch


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The device's; None on a CPU, where everything happens in the order of its calls.

    Whoever uses it makes it wait for the current stream first, and the current stream for it before anything that it
    reads or writes is touched again: PyTorch's allocator knows of the current stream alone.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None
