"""The CUDA sources, compiled as C++ and run on emulated threads; see emulation.h."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ninja
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_emulation"
OPS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-mf16c"]
# A kernel's static shared memory is its library's own, also where a process loads two.
FLAGS += ["-fno-gnu-unique", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


@dataclass(frozen=True)
class Kind:
    """How a library is built: flags of every file, of kernels, of the linker, and sources that come with it."""

    flags: Sequence[str] = ()
    kernel_flags: Sequence[str] = ()
    link_flags: Sequence[str] = ()
    sources: Sequence[Path] = ()


KINDS = {
    "ordinary": Kind(),
    # Only kernels tell the detector what they access. A call of GCC's that race/tsan.cpp does not answer fails to link.
    "race": Kind(
        kernel_flags=["-fsanitize=thread", "-g1"],
        link_flags=["-Wl,-z,defs"],
        sources=sorted((HERE / "race").glob("*.cpp")),
    ),
    # The sanitizers know one stack of a thread, so what lies on those of fibers is not looked at.
    "sanitized": Kind(
        flags=["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "--param=asan-stack=0", "-g1"],
        link_flags=["-fsanitize=address,undefined"],
    ),
}


def load() -> None:
    """Loads the ops: they are then `torch.ops.shadowkv_emulated`, for CPU tensors.

    Of the library that SHADOWKV_EMULATION names, as scripts/sanitize_cuda.py sets it; the ordinary one is built first
    where something has changed.
    """
    torch.ops.load_library(library())


def library() -> Path:
    """The library that `load` loads."""
    path = os.environ.get("SHADOWKV_EMULATION")
    return Path(path) if path else build("ordinary")


def build(kind: str, name: str = "", sources: Sequence[Path] = (HERE / "bindings.cpp", *OPS)) -> Path:
    """Builds what has changed of a library of one of KINDS, in a folder `name`, by default that of the ops."""
    folder = BUILD / (name or kind)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes start together
        (folder / "build.ninja").write_text("\n".join(_rules(KINDS[kind], sources)) + "\n")
        result = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    return folder / "emulated.so"


def _rules(kind: Kind, sources: Sequence[Path]) -> list[str]:
    includes = [f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    includes += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    torch_lib = Path(torch.__file__).parent / "lib"
    lines = [
        "rule compile",
        f"  command = g++ {' '.join([*FLAGS, *kind.flags, *includes])} $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # Kernels without bindings need no torch. libc10 has a part of the C++ library, which therefore comes first.
        f"  command = g++ -shared $in -L{torch_lib} -Wl,--as-needed -lstdc++ -ltorch -ltorch_cpu -lc10"
        f" {' '.join(kind.link_flags)} -o $out",
    ]
    objects = []
    for source in (HERE / "emulation.cpp", HERE / "order.cpp", *kind.sources, *sources):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
        if source.suffix == ".cu":
            lines.append(f"  flags = {' '.join(kind.kernel_flags)}")
    return [*lines, f"build emulated.so: link {' '.join(objects)}"]
