"""How many selected chunks were found in slots: counted by the kernels, read by the host without waiting."""

from __future__ import annotations

import time

import torch

COPY_SECONDS = 1.0
"""At most so often are the counts copied from a device."""


class SlotCounts:
    """Chunks since the start, all layers and KV heads: how many wanted a slot, and where they came from.

    Attributes:
        tensor: int64 `[4]` on the device, which `ops.plan_slots` and `ops.fill_slots` add to: chunks that wanted a
            slot, were found in one, were copied to one from resident pages, were rebuilt and fetched. It never moves,
            so graphs hold it.
    """

    def __init__(self, device: torch.device) -> None:
        """Allocates."""
        self.tensor = torch.zeros(4, dtype=torch.int64, device=device)
        self._copy = _HostCopy(self.tensor) if device.type == "cuda" else None

    def step(self) -> None:
        """To be called once a step, in the thread and the stream of the step. Never waits for the device."""
        if self._copy is not None:
            self._copy.step(time.monotonic())

    def latest(self) -> tuple[int, int, int, int]:
        """What the host knows, from any thread: on CUDA the counts of some step before."""
        counts = self.tensor.tolist() if self._copy is None else self._copy.latest
        return counts[0], counts[1], counts[2], counts[3]


class _HostCopy:
    """Copies counts to the host every `COPY_SECONDS`, and looks whether the copy has arrived in later steps."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._pinned = torch.zeros(len(tensor), dtype=tensor.dtype, pin_memory=True)
        self._arrived = torch.cuda.Event()
        self._under_way = False
        self._due = 0.0
        self.latest = [0] * len(tensor)

    def step(self, now: float) -> None:
        if self._under_way and self._arrived.query():
            self.latest = self._pinned.tolist()
            self._under_way = False
        if not self._under_way and now >= self._due:
            self._pinned.copy_(self._tensor, non_blocking=True)
            self._arrived.record()
            self._under_way, self._due = True, now + COPY_SECONDS
