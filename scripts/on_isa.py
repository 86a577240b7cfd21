"""Runs a command as on a processor that has less: `python scripts/on_isa.py avx2|avx512 COMMAND …`.

What torch, vLLM, oneDNN, MKL and our kernels choose is then what they choose on such a machine; `avx512` is without AMX
and bf16. Of what they choose, nothing is emulated: the processor runs fewer of its instructions.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "build" / "isa" / "hide.so"

VARIABLES = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "SHADOWKV_CPU_ISA": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "SHADOWKV_CPU_ISA": "avx512"},
}
"""By instruction set: what each library takes as its own way to choose."""

PROBE = """
import sys
import torch
from vllm import _custom_ops
from vllm_shadowkv.extension import load
assert torch.backends.cpu.get_cpu_capability().lower() == sys.argv[1], torch.backends.cpu.get_cpu_capability()
assert not torch.cpu._is_amx_tile_supported() and not torch.cpu._is_avx512_bf16_supported()
loaded = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if "/vllm/_C" in line}
assert loaded == {f"_C_{sys.argv[1].upper()}.abi3.so"}, loaded
assert load().cpu_isa() == sys.argv[1]
"""


def main() -> int:
    """Builds the library that hides what is beyond, makes sure of it, and runs the command; returns its exit code."""
    if len(sys.argv) < 3 or sys.argv[1] not in VARIABLES:
        sys.exit(f"usage: python scripts/on_isa.py {'|'.join(VARIABLES)} COMMAND …")
    isa, *command = sys.argv[1:]
    import torch

    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", f"-isystem{include}"]
    subprocess.run(["g++", *flags, str(ROOT / "tests" / "isa" / "hide.cpp"), "-ldl", "-o", str(LIBRARY)], check=True)
    environment = os.environ | VARIABLES[isa] | {"LD_PRELOAD": str(LIBRARY), "SHADOWKV_HIDE_BEYOND": isa}
    probe = subprocess.run([sys.executable, "-c", PROBE, isa], env=environment, cwd=LIBRARY.parent)
    if probe.returncode:
        sys.exit(f"scripts/on_isa.py: this machine, or these versions, do not run as with {isa} alone")
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
