"""Host memory near a GPU: on a machine of several NUMA nodes, that of another one takes one more link."""

from __future__ import annotations

import ctypes
import mmap
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_shadowkv.state.huge_pages import whole_pages

NODES = Path("/sys/devices/system/node")
PCI = Path("/sys/bus/pci/devices")
_PREFERRED = 1  # mbind(2): of this node while it has memory, then of others
_MBIND = {"x86_64": 237, "aarch64": 235}
"""The system call's number; libc has no function for it, and libnuma is often not installed."""


def nodes() -> list[int]:
    """The machine's nodes."""
    return sorted(int(path.name[4:]) for path in NODES.glob("node[0-9]*"))


def node_of_gpu(index: int) -> int | None:
    """A GPU's node; None where the machine, or an older torch, does not say."""
    gpu: Any = torch.cuda.get_device_properties(index)
    try:
        address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
        node = int((PCI / address / "numa_node").read_text())
    except (AttributeError, OSError):
        return None
    return None if node < 0 else node


def prefer_node(memory: Tensor, node: int) -> bool:
    """Asks Linux to take a tensor's memory from a node as long as that has some.

    Args:
        memory: on the CPU, contiguous, and not touched yet: what is there stays where it is.
        node: see `nodes`.

    Returns:
        Whether Linux agreed, for all of it but its ends; where not, it works as before.
    """
    number = _MBIND.get(platform.machine())
    begin, size = whole_pages(memory, mmap.PAGESIZE)
    if number is None or size == 0:
        return False
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (node // bits + 1))()
    mask[node // bits] = 1 << node % bits
    call = ctypes.CDLL(None, use_errno=True).syscall
    arguments = (ctypes.c_long(number), ctypes.c_void_p(begin), ctypes.c_ulong(size), ctypes.c_int(_PREFERRED), mask)
    # The kernel reads one bit less than it is told.
    return call(*arguments, ctypes.c_ulong(bits * len(mask) + 1), ctypes.c_uint(0)) == 0
