"""What a result must say of where it comes from."""

from __future__ import annotations

import datetime
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import vllm_shadowkv
from vllm_shadowkv import extension


def machine(module: str, device: str) -> dict[str, Any]:
    """The command, the machine and the versions, for the head of a result's file.

    Args:
        module: name under `benchmarks` of what ran.
        device: "cpu" or "cuda".
    """
    cuda = device == "cuda"
    about = {
        "command": " ".join(("python -m", f"benchmarks.{module}", *sys.argv[1:])),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm_shadowkv": vllm_shadowkv.__version__,
    }
    return about | ({"cuda": torch.version.cuda} if cuda else {})


def _cpu() -> str:
    """The processor, our kernels' instruction set, and whether vLLM's own have tiles beside it."""
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{_processor()}, {extension.load().cpu_isa()}{amx}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
