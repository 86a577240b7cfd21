"""`make sanitize`: the tests of the CPU ops on a build with AddressSanitizer and UndefinedBehaviorSanitizer.

The build lies beside the ordinary one, in build/sanitized. Every instruction set that this CPU has is run. A report of
a sanitizer ends the run with a non-zero exit code and stands at the end of the output.

This file is also the pytest plugin that puts the sanitized library in the ordinary one's place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitized"
LIBRARY = BUILD / "vllm_shadowkv" / "_C.abi3.so"

# Python frees little of what it allocates at exit, so leaks are not looked for. Reports name the lines of our sources.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:strict_init_order=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Replaces the library before a conftest.py loads the ordinary one."""
    from vllm_shadowkv import extension

    extension.LIBRARY = LIBRARY


def pytest_collection_finish() -> None:
    """Makes sure of it: tests of another library would find nothing."""
    libraries = {
        Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "_C.abi3" in line
    }
    assert libraries == {LIBRARY}, f"the tests run on {libraries}"


def main() -> int:
    """Builds what has changed, then runs the tests; returns the exit code."""
    LIBRARY.unlink(missing_ok=True)  # setuptools does not see that a kernel has changed, and would not link again
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(BUILD)]
    result = subprocess.run(
        build,
        cwd=ROOT,
        env=os.environ | {"SHADOWKV_SANITIZE": "1", "SHADOWKV_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        print(result.stdout, result.stderr)
        return result.returncode
    # Before everything else: an allocation that the runtime has not seen cannot be checked. It looks up the C++
    # library's throw when it starts, so that one has to be there too.
    libraries = " ".join(_path_of(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    environment = (
        os.environ
        | OPTIONS
        | {"OMP_NUM_THREADS": "1", "LD_PRELOAD": libraries, "PYTHONPATH": str(Path(__file__).parent)}
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {isa: pool.submit(_test, environment | {"SHADOWKV_CPU_ISA": isa}) for isa in _instruction_sets()}
    for isa, run in runs.items():
        code, output = run.result()
        print(f"{isa}: {output.splitlines()[-1] if not code else output}")
    return max(run.result()[0] for run in runs.values())


def _test(environment: dict[str, str]) -> tuple[int, str]:
    """Runs the tests of the CPU kernels; returns the exit code and the output."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "sanitize", "-p", "no:cacheprovider"]
    command += ["-k", "not emulated", "tests/ops"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return result.returncode, result.stdout


def _path_of(library: str) -> str:
    """Where the compiler has a library of its runtime."""
    return subprocess.check_output(["g++", f"-print-file-name={library}"], text=True).strip()


def _instruction_sets() -> list[str]:
    """What csrc/cpu/isa.h compiles for, as far as this CPU has it."""
    from torch.backends import cpu

    best = cpu.get_cpu_capability()
    return {"AVX512": ["baseline", "avx2", "avx512"], "AVX2": ["baseline", "avx2"]}.get(best, ["baseline"])


if __name__ == "__main__":
    raise SystemExit(main())
