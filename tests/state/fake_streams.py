"""CUDA streams whose work waits until a test runs it, in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch


class Stream:
    """A CUDA stream whose work waits until a test runs it."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None] | tuple[Stream, int]] = []
        self.done = 0

    def wait_stream(self, other: Stream) -> None:
        self.work.append((other, len(other.work)))

    def advance(self) -> bool:
        """Does the next thing, unless it has to wait."""
        if self.done == len(self.work):
            return False
        work = self.work[self.done]
        if isinstance(work, tuple):
            if work[0].done < work[1]:
                return False
        else:
            work()
        self.done += 1
        return True


class Streams:
    """The current stream and the side stream."""

    def __init__(self, patch: pytest.MonkeyPatch, user: ModuleType) -> None:
        """Takes a module that has imported `side_stream`."""
        self.current, self.side = Stream(), Stream()
        self.active = self.current
        patch.setattr(user, "side_stream", lambda device: self.side)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.active)
        patch.setattr(torch.cuda, "stream", self._on)

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.active = self.active, stream
        yield
        self.active = before

    def run(self, first: str) -> None:
        """To the end; of streams that can do something "current" or "side" does."""
        order = (self.current, self.side) if first == "current" else (self.side, self.current)
        while any(stream.advance() for stream in order):
            pass
        assert all(stream.done == len(stream.work) for stream in order), "they wait for each other"
