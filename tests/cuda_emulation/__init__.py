"""The CUDA sources, compiled as C++ and run on emulated threads; see emulation.h."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

import ninja
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_emulation"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-mf16c"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]


def load() -> None:
    """Builds what has changed and loads it: the ops are then `torch.ops.shadowkv_emulated`, for CPU tensors."""
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / "emulated.so"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes start together
        _build(library)
    torch.ops.load_library(library)


def _build(library: Path) -> None:
    includes = " ".join(f"-isystem{path}" for path in cpp_extension.include_paths())
    torch_lib = Path(torch.__file__).parent / "lib"
    lines = [
        "rule compile",
        f"  command = g++ {' '.join(FLAGS)} {includes} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared $in -L{torch_lib} -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -o $out",
    ]
    objects = []
    for source in (*sorted(HERE.glob("*.cpp")), *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {library.name}: link {' '.join(objects)}")
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    result = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", BUILD], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
