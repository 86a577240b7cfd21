"""`make cuda-check`: compiles every CUDA kernel for every architecture, without a GPU, and looks at what came out.

Warnings are errors. Registers and spills of each kernel are compared with `csrc/cuda/budget.json`, and the machine code
must hold the instructions that a kernel is built around. `--update` rewrites the budget.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BUDGET = ROOT / "csrc" / "cuda" / "budget.json"
BUILD = ROOT / "build" / "cuda_check"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-lineinfo", "-Xptxas=-v"]
FLAGS += [f"-I{ROOT / 'csrc'}", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]

LOAD, STORE, COPY = r"\bLDG\.E\S*\.128", r"\bSTG\.E\S*\.128", r"\bLDGSTS\.E\S*\.128"
MUST_HOLD = {
    "select_chunks": ("IMMA", LOAD),
    "fill_slots": ("IMMA", LOAD, COPY, STORE),
    "sparse_attention": ("HMMA", LOAD),
    "expand_blocks": ("IMMA", LOAD, COPY, STORE),
    "store_values": (LOAD, STORE),
}
"""What the kernels of a source need to reach their limit: tensor cores, 16 bytes at a time."""


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel; its name holds the template arguments."""

    source: str
    architecture: str
    name: str
    registers: int
    spilled_bytes: int


def main() -> int:
    """Returns the process's exit code: 1 where something is over budget or missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write what is found as the new budget")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    arguments = parser.parse_args()
    console = Console()
    BUILD.mkdir(parents=True, exist_ok=True)
    jobs = [(source, architecture) for source in SOURCES for architecture in arguments.architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(track(pool.map(lambda job: _compile(*job), jobs), "nvcc", total=len(jobs), console=console))
    kernels = [kernel for found, _ in results for kernel in found]
    problems = [problem for _, found in results for problem in found]

    report = _by_source(kernels)
    (BUILD / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    if arguments.update:
        BUDGET.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    problems += _over_budget(report, budget)
    _print(console, report)
    for problem in problems:
        console.print(f"[red]{problem}")
    return 1 if problems else 0


def _compile(source: Path, architecture: str) -> tuple[list[Kernel], list[str]]:
    """Kernels of a source and what is wrong with them."""
    cubin = BUILD / f"{source.stem}.{architecture}.cubin"
    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    command = [_nvcc(), *FLAGS, *includes, "-cubin", f"-arch={architecture}", str(source), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True)
    name = f"{source.stem}, {architecture}"
    if result.returncode:
        return [], [f"{name}: {result.stdout}{result.stderr}"]
    kernels = _read_ptxas(result.stderr + result.stdout, source.stem, architecture)
    if not kernels:
        return [], [f"{name}: no kernel in the output of ptxas"]
    code = subprocess.run([_nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    missing = [pattern for pattern in MUST_HOLD.get(source.stem, ()) if not re.search(pattern, code)]
    return kernels, [f"{name}: the machine code has no {pattern}" for pattern in missing]


def _read_ptxas(text: str, source: str, architecture: str) -> list[Kernel]:
    kernels = []
    for part in text.split("Compiling entry function '")[1:]:
        spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", part))
        registers = re.search(r"Used (\d+) registers", part)
        assert registers, part
        name = re.sub(r"_GLOBAL__N__\w+?_cu_\w{8}", "", part.split("'", 1)[0])
        kernels.append(Kernel(source, architecture, name, int(registers[1]), spills))
    return kernels


def _by_source(kernels: list[Kernel]) -> dict[str, dict[str, dict[str, int]]]:
    """Per source and architecture: kernels, most registers, and all spilled bytes."""
    report: dict[str, dict[str, dict[str, int]]] = {}
    for kernel in kernels:
        entry = report.setdefault(kernel.source, {}).setdefault(
            kernel.architecture, {"kernels": 0, "registers": 0, "spilled_bytes": 0}
        )
        entry["kernels"] += 1
        entry["registers"] = max(entry["registers"], kernel.registers)
        entry["spilled_bytes"] += kernel.spilled_bytes
    return report


def _over_budget(
    report: dict[str, dict[str, dict[str, int]]], budget: dict[str, dict[str, dict[str, int]]]
) -> list[str]:
    problems = []
    for source, by_architecture in report.items():
        for architecture, found in by_architecture.items():
            allowed = budget.get(source, {}).get(architecture, {})
            problems += [
                f"{source}, {architecture}: {found[what]} {what}, the budget is {allowed.get(what, 0)}; look at it, "
                "then run `python scripts/cuda_check.py --update`"
                for what in ("registers", "spilled_bytes")
                if found[what] > allowed.get(what, 0)
            ]
    return problems


def _print(console: Console, report: dict[str, dict[str, dict[str, int]]]) -> None:
    architectures = sorted({name for entry in report.values() for name in entry}, key=lambda name: int(name[3:]))
    table = Table(
        "source",
        "kernels",
        *(name[3:] for name in architectures),
        title="Most registers (bytes spilled), by compute capability",
        title_justify="left",
    )
    for source, entry in sorted(report.items()):
        cells = [
            f"{entry[name]['registers']} ({entry[name]['spilled_bytes']})" if name in entry else "failed"
            for name in architectures
        ]
        table.add_row(source, str(next(iter(entry.values()))["kernels"]), *cells)
    console.print(table)


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if not nvcc:
        sys.exit("cuda-check needs the CUDA toolkit: set CUDA_HOME, or put nvcc on the PATH")
    return nvcc


def _nvdisasm() -> str:
    """The toolkit's, or the one that comes with triton."""
    beside = Path(_nvcc()).resolve().with_name("nvdisasm")
    if beside.exists():
        return str(beside)
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm")


if __name__ == "__main__":
    raise SystemExit(main())
