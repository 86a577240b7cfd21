import os
import platform
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import vllm_shadowkv
from vllm_shadowkv import extension

ROOT = Path(__file__).parent.parent

# What the kernel sets need, in the names of /proc/cpuinfo; the best one last.
ISA_FLAGS = {
    "baseline": {"sse4_2", "popcnt"},
    "avx2": {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"},
    "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
SUPPORTED = ["baseline"]
if platform.machine() == "x86_64":
    CPU_FLAGS = set(Path("/proc/cpuinfo").read_text().split())
    SUPPORTED = [isa for isa, flags in ISA_FLAGS.items() if flags <= CPU_FLAGS]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "SHADOWKV_CPU_ISA"}
    return subprocess.run([sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True)


def cpu_isa(**environment: str) -> subprocess.CompletedProcess[str]:
    return python("from vllm_shadowkv.extension import load; print(load().cpu_isa())", **environment)


def test_version_has_one_source() -> None:
    assert version("vllm-shadowkv") == vllm_shadowkv.__version__
    assert vllm_shadowkv.__version__ not in (ROOT / "pyproject.toml").read_text()


def test_entry_point_is_declared() -> None:
    [point] = entry_points(group="vllm.general_plugins", name="shadowkv")
    assert point.value == "vllm_shadowkv.plugin:register"


def test_naming_the_version_does_not_import_torch() -> None:
    result = python("import sys, vllm_shadowkv; print('torch' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_best_isa_is_the_default() -> None:
    result = cpu_isa()
    assert result.stdout.strip() == SUPPORTED[-1], result.stderr


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_isa_can_be_forced_where_supported(isa: str) -> None:
    result = cpu_isa(SHADOWKV_CPU_ISA=isa)
    if isa in SUPPORTED:
        assert result.stdout.strip() == isa, result.stderr
    else:
        assert f"SHADOWKV_CPU_ISA={isa}, but this CPU lacks it" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in ("avx2", "avx512") if isa in SUPPORTED])
def test_a_command_runs_as_on_a_lesser_processor(isa: str) -> None:
    """The script looks by itself at what torch, vLLM and our kernels have chosen."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.cpu._is_amx_tile_supported())"
    command = [sys.executable, "scripts/on_isa.py", isa, sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == [isa.upper(), "False"], result.stderr


@pytest.mark.parametrize("isa", ["AVX2", "sse", ""])
def test_unknown_isa_is_refused(isa: str) -> None:
    result = cpu_isa(SHADOWKV_CPU_ISA=isa)
    assert result.returncode != 0
    assert f"must be baseline, avx2 or avx512, got '{isa}'" in result.stderr


def test_missing_extension_names_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.abi3.so")
    with pytest.raises(ImportError, match=r"is missing; build it with `make install` or"):
        extension.load.__wrapped__()


def test_broken_extension_names_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(extension, "LIBRARY", library)
    with pytest.raises(ImportError, match=r"does not load with torch .*; build it with `make"):
        extension.load.__wrapped__()


def test_has_cuda_tells_what_was_compiled_in() -> None:
    # The linker puts the code of every .cu file into this section.
    assert vllm_shadowkv.has_cuda() == (b".nv_fatbin" in extension.LIBRARY.read_bytes())


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"SHADOWKV_CUDA": "2"}, "SHADOWKV_CUDA must be 0 or 1, got '2'"),
        ({"CUDA_HOME": "/nowhere"}, "a CUDA build needs CUDA_HOME with bin/nvcc, got CUDA_HOME='/nowhere'"),
    ],
    ids=["switch", "toolkit"],
)
def test_a_build_that_cannot_work_says_why(environment: dict[str, str], sentence: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ("SHADOWKV_CUDA", "CUDA_HOME")}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == sentence
