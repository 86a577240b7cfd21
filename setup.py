"""Builds the one extension file, `vllm_shadowkv/_C.abi3.so`, against torch's stable ABI.

Metadata is in pyproject.toml. Environment:
    SHADOWKV_CUDA: 1 compiles the CUDA kernels, 0 does not. Unset: as CUDA_HOME is set or not.
    CUDA_HOME: where the CUDA toolkit is; unset and SHADOWKV_CUDA=1: that of `nvcc` on the PATH.
    TORCH_CUDA_ARCH_LIST: as torch reads it; unset: CUDA_ARCHITECTURES below.
    SHADOWKV_SANITIZE: 1 adds AddressSanitizer and UndefinedBehaviorSanitizer; scripts/sanitize.py builds and runs that.
    MAX_JOBS: how many compilers run at once.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ninja
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# The oldest torch the library loads in: 2.11. One file then serves every later torch and Python.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
OLDEST_PYTHON = "cp310"

COMMON_FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=fast", "-fPIC", f"-I{CSRC}"]
COMMON_FLAGS += ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]
COMMON_FLAGS += ["-Wall", "-Wextra", "-Werror"]
# Python's own flags have -g, which makes the library seven times larger and a fifth slower to build.
COMMON_FLAGS += ["-g0"]

SANITIZE = os.environ.get("SHADOWKV_SANITIZE") == "1"
SANITIZER_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
if SANITIZE:
    # Lines of our sources in reports; -O1 compiles in half of the time of -O3.
    COMMON_FLAGS += [*SANITIZER_FLAGS, "-O1", "-g1"]

# How each kernel in csrc/cpu/kernels is compiled; csrc/cpu/isa.h explains. The order matters, see
# BuildExtension. Widths are explicit because compilers by default avoid 512-bit registers.
X86_ISAS = {
    "baseline": ["-march=x86-64-v2"],
    "avx2": ["-march=x86-64-v3", "-mprefer-vector-width=256"],
    "avx512": ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"],
}
ISAS = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}

CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"

# torch's BuildExtension finds ninja through the PATH, where a virtual environment's need not be.
os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


def cuda_home() -> str | None:
    """Return the CUDA toolkit to build with, None for a CPU-only build."""
    switch = os.environ.get("SHADOWKV_CUDA")
    if switch not in (None, "0", "1"):
        sys.exit(f"SHADOWKV_CUDA must be 0 or 1, got {switch!r}")
    home = os.environ.get("CUDA_HOME")
    if switch == "0" or (switch is None and not home):
        return None
    if not home and shutil.which("nvcc"):
        # Ask nvcc: the one on the PATH may be a script that calls the real one.
        command = ["nvcc", "--dryrun", "-x", "cu", os.devnull]
        dry_run = subprocess.run(command, capture_output=True, text=True).stderr
        home = next((line[7:] for line in dry_run.splitlines() if line.startswith("#$ TOP=")), None)
    if not home or not (Path(home) / "bin" / "nvcc").is_file():
        sys.exit(f"a CUDA build needs CUDA_HOME with bin/nvcc, got CUDA_HOME={home!r}")
    if not list(CSRC.glob("cuda/*.cu")):
        if switch == "1":
            sys.exit("SHADOWKV_CUDA=1, but csrc/cuda has no .cu file")
        return None
    return home


def relative(paths: Any) -> list[str]:
    """Return paths as setuptools wants them: relative to this file, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def host_flags(cuda: str | None) -> list[str]:
    """Return the flags of the C++ sources that talk to torch."""
    # -isystem, so that -Werror judges our sources and not torch's headers.
    flags = [*COMMON_FLAGS, TORCH_TARGET]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    if cuda:
        flags += ["-DSHADOWKV_HAS_CUDA", "-DUSE_CUDA", f"-isystem{cuda}/include"]
        flags += [f'-DSHADOWKV_CUDA_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"']
    return flags


def extension(cuda: str | None) -> Any:
    """Describe the extension; the CPU kernels come in through BuildExtension."""
    sources = relative([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])
    # libtorch.so must be NEEDED although nothing names it: through it the weak CUDA symbols are
    # found in a CUDA torch, while a CPU torch leaves them NULL.
    link_flags = ["-fopenmp", "-Wl,--no-as-needed", "-ltorch"]
    if SANITIZE:
        link_flags += SANITIZER_FLAGS
    library_dirs = []
    nvcc_flags: list[str] = []
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        sources += relative(CSRC.glob("cuda/*.cu"))
        library_dirs = [f"{cuda}/lib64"]
        # Static, because a CPU torch has no libcudart.
        link_flags += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        nvcc_flags = ["-std=c++20", "-O3", "-lineinfo", f"-I{CSRC}", TORCH_TARGET, "-DUSE_CUDA"]
        nvcc_flags += ["--expt-relaxed-constexpr", "-Werror=all-warnings", "-Xcompiler=-fvisibility=hidden"]
        # A CPU torch sets it to None, whatever the environment says.
        cpp_extension.CUDA_HOME = cuda
    return cpp_extension.CppExtension(
        "vllm_shadowkv._C",
        sources,
        library_dirs=library_dirs,
        extra_compile_args={"cxx": host_flags(cuda), "nvcc": nvcc_flags},
        extra_link_args=link_flags,
        py_limited_api=True,
    )


class BuildExtension(cpp_extension.BuildExtension):
    """torch's builder, plus one object per kernel and ISA, which it has no flags for."""

    def finalize_options(self) -> None:
        """Keep objects in build/, where pip would use a new directory and compile all again."""
        super().finalize_options()
        python = f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}"
        kind = "sanitized" if SANITIZE else "objects"
        self.build_temp = str(ROOT / "build" / f"{kind}-{platform.machine()}-{python}")

    def build_extension(self, ext: Any) -> None:
        """Compile the kernels, hand their objects to the linker, build the rest as usual.

        Objects are linked in the order: once-compiled, baseline, avx2, avx512. A linker keeps the
        first copy of an inline function that several objects hold, so it never keeps one with
        instructions that only a later ISA has.
        """
        ext.extra_objects = [*ext.extra_objects, *self.build_kernels()]
        super().build_extension(ext)

    def build_kernels(self) -> list[str]:
        """Compile csrc/cpu/kernels/*.cpp for every ISA and return the objects in link order."""
        directory = Path(self.build_temp).resolve() / "kernels"
        directory.mkdir(parents=True, exist_ok=True)
        command = shlex.join([*self.compiler.compiler_so, *COMMON_FLAGS]).replace("$", "$$")
        lines = [
            "rule kernel",
            f"  command = {command} $isa -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        objects = []
        for isa, isa_flags in ISAS.items():
            for source in sorted(CSRC.glob("cpu/kernels/*.cpp")):
                name = f"{source.stem}.{isa}.o"
                lines += [f"build {name}: kernel {source}"]
                lines += [f"  isa = {shlex.join([*isa_flags, f'-DSHADOWKV_ISA={isa}'])}"]
                objects.append(str(directory / name))
        (directory / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", directory, *jobs], check=True)
        return objects


def cudart_version(cuda: str) -> str:
    """Return the version of the toolkit's runtime library."""
    header = (Path(cuda) / "include" / "cuda_runtime_api.h").read_text()
    number = int(re.findall(r"#define CUDART_VERSION\s+(\d+)", header)[0])
    return f"{number // 1000}.{number % 1000 // 10}"


class BdistWheel(bdist_wheel):
    """The wheel, with a bill of what is bundled in `.dist-info/sboms` (PEP 770, CycloneDX)."""

    def egg2dist(self, egginfo_path: str, distinfo_path: str) -> None:
        """Write the bill beside the metadata."""
        super().egg2dist(egginfo_path, distinfo_path)
        cudart = {
            "type": "library",
            "name": "cudart_static",
            "description": "CUDA runtime, linked into vllm_shadowkv/_C.abi3.so",
            "supplier": {"name": "NVIDIA"},
            "licenses": [{"license": {"name": "CUDA Toolkit End User License Agreement"}}],
        }
        wheel = {"type": "library", "name": "vllm-shadowkv", "version": self.distribution.get_version()}
        bill = {
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "version": 1,
            "metadata": {"component": wheel | {"licenses": [{"license": {"id": "Apache-2.0"}}]}},
            "components": [cudart | {"version": cudart_version(CUDA)}] if CUDA else [],
        }
        sboms = Path(distinfo_path) / "sboms"
        sboms.mkdir()
        (sboms / "vllm-shadowkv.cdx.json").write_text(json.dumps(bill, indent=2) + "\n")


CUDA = cuda_home()
WHEEL = {"py_limited_api": OLDEST_PYTHON}
if CUDA:  # the build number tells the two wheels of a version apart; pip takes the one that has one
    WHEEL["build_number"] = f"1cu{cudart_version(CUDA).replace('.', '')}"
print(f"vllm_shadowkv: building CPU kernels for {', '.join(ISAS)};", "CUDA", CUDA or "off")
setup(
    ext_modules=[extension(CUDA)],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": BdistWheel},
    options={"bdist_wheel": WHEEL},
)
