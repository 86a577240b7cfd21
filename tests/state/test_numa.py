"""Memory is asked for near a GPU; the machine of the tests may have one node only."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_shadowkv.state import numa

MAPS = Path("/proc/self/numa_maps")
SIZE = 1 << 26


def policy(memory: torch.Tensor) -> str:
    """What Linux says of a tensor's middle."""
    inside = memory.data_ptr() + memory.nbytes // 2
    starts = [(int(line.split()[0], 16), line.split()[1]) for line in MAPS.read_text().splitlines()]
    return max((start, found) for start, found in starts if start <= inside)[1]


@pytest.mark.skipif(not MAPS.exists() or not numa.nodes(), reason="this Linux knows no NUMA nodes")
def test_linux_takes_memory_from_a_node() -> None:
    node = numa.nodes()[-1]
    memory = torch.empty(SIZE, dtype=torch.uint8)
    assert policy(memory) == "default"
    assert numa.prefer_node(memory, node)
    assert policy(memory) == f"prefer:{node}"
    memory.fill_(3)
    assert (memory == 3).all()


@pytest.mark.parametrize("node", [63, 64, 1000])
def test_a_node_that_is_not_there_changes_nothing(node: int) -> None:
    memory = torch.empty(SIZE, dtype=torch.uint8)
    assert not numa.prefer_node(memory, node)
    assert (memory.fill_(3) == 3).all()


def test_too_small_or_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.arange(100)
    assert not numa.prefer_node(memory, 0)
    monkeypatch.setattr(numa.platform, "machine", lambda: "riscv64")
    assert not numa.prefer_node(torch.empty(SIZE, dtype=torch.uint8), 0)
    assert torch.equal(memory, torch.arange(100))


@pytest.mark.parametrize(("said", "node"), [("1\n", 1), ("-1\n", None), (None, None)])
def test_the_node_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, node: int | None) -> None:
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x65, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(numa, "PCI", tmp_path)
    if said is not None:
        (tmp_path / "0000:65:00.0").mkdir()
        (tmp_path / "0000:65:00.0" / "numa_node").write_text(said)
    assert numa.node_of_gpu(0) == node


def test_an_older_torch_does_not_tell_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    assert numa.node_of_gpu(0) is None
