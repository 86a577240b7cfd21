from __future__ import annotations

import pytest
import torch

from vllm_shadowkv.state import slot_counts
from vllm_shadowkv.state.slot_counts import COPY_SECONDS, SlotCounts, _HostCopy


def test_on_the_cpu_the_counts_are_always_the_latest() -> None:
    counts = SlotCounts(torch.device("cpu"))
    assert counts.latest() == (0, 0, 0, 0)
    counts.tensor += torch.tensor([5, 3, 2, 1])
    counts.step()
    assert counts.latest() == (5, 3, 2, 1)


class Event:
    """A CUDA event that a test lets happen."""

    recorded = 0
    happened = False

    def record(self) -> None:
        self.recorded += 1
        self.happened = False

    def query(self) -> bool:
        return self.happened


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    zeros = torch.zeros
    monkeypatch.setattr(slot_counts.torch, "zeros", lambda *args, pin_memory, **kwargs: zeros(*args, **kwargs))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return torch.tensor([7, 4, 3])


def test_a_copy_is_read_when_it_has_arrived(counts: torch.Tensor) -> None:
    copy = _HostCopy(counts)
    copy.step(100.0)
    assert copy.latest == [0, 0, 0], "it may still be under way"
    copy.step(100.0 + 2 * COPY_SECONDS)
    assert (copy.latest, copy._arrived.recorded) == ([0, 0, 0], 1), "no second copy over the first"
    copy._arrived.happened = True  # type: ignore[attr-defined]
    copy.step(100.0 + 2 * COPY_SECONDS)
    assert (copy.latest, copy._arrived.recorded) == ([7, 4, 3], 2)


def test_copies_are_rare(counts: torch.Tensor) -> None:
    copy = _HostCopy(counts)
    for step in range(1000):
        copy._arrived.happened = True  # type: ignore[attr-defined]
        copy.step(100.0 + step * 3 * COPY_SECONDS / 1000)
    assert copy._arrived.recorded == 3
