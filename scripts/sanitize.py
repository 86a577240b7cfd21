"""`make sanitize`: the tests of the CPU ops on a build with AddressSanitizer and UndefinedBehaviorSanitizer.

The build lies beside the ordinary one, in build/sanitized. Every instruction set that this CPU has is run. A report of
a sanitizer ends the run with a non-zero exit code and stands at the end of the output.

This file is also the pytest plugin that puts the sanitized library in the ordinary one's place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitized"
LIBRARY = BUILD / "vllm_shadowkv" / "_C.abi3.so"

# Python frees little of what it allocates at exit, so leaks are not looked for. Reports name the lines of our sources.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:strict_init_order=1", "UBSAN_OPTIONS": "print_stacktrace=1"}

# Whether all is well, and what there is to say: a line if it is.
Outcome = tuple[bool, str]


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Replaces the library before a conftest.py loads the ordinary one."""
    from vllm_shadowkv import extension

    extension.LIBRARY = LIBRARY


def pytest_collection_finish() -> None:
    """Makes sure of it: tests of another library would find nothing."""
    assert loaded("_C.abi3") == {LIBRARY}, f"the tests run on {loaded('_C.abi3')}"


def loaded(name: str) -> set[Path]:
    """The files of this process's libraries with `name` in their path."""
    return {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if name in line}


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

    def test(isa: str) -> Outcome:
        code, output = run_tests("sanitize", "not emulated", ["tests/ops"], sanitizers() | {"SHADOWKV_CPU_ISA": isa})
        return code == 0, output if code else output.splitlines()[-1]

    return side_by_side({isa: lambda isa=isa: test(isa) for isa in _instruction_sets()})


def run_tests(plugin: str, keyword: str, paths: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Runs tests with a plugin of this folder; returns the exit code, not 0 where none is selected, and the output."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", plugin, "-p", "no:cacheprovider", "-k", keyword]
    result = subprocess.run(
        [*command, *paths],
        cwd=ROOT,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout


def side_by_side(jobs: Mapping[str, Callable[[], Outcome]]) -> int:
    """Runs as many jobs at once as there are cores, prints what each has to say as it ends; returns the exit code."""
    all_well = True
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        names = {pool.submit(job): name for name, job in jobs.items()}
        for job in as_completed(names):
            well, text = job.result()
            print(f"{names[job]}: {text}", flush=True)
            all_well &= well
    return 0 if all_well else 1


def sanitizers() -> dict[str, str]:
    """The environment of a process that loads a library with AddressSanitizer and UndefinedBehaviorSanitizer."""
    # Before everything else: an allocation that the runtime has not seen cannot be checked. It looks up the C++
    # library's throw when it starts, so that one has to be there too.
    libraries = (_path_of(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    return OPTIONS | {"LD_PRELOAD": " ".join(libraries)}


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
