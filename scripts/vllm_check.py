"""What a new vLLM means for the plugin: fetches it, compares it at our seams, and runs the tests that meet those on it.

    python -m scripts.vllm_check VERSION|newest

`make vllm-check VLLM=…` runs it. What there is to look at is printed, and lies with all diffs in `build/vllm-VERSION`.
The exit code is 1 where something that we use is missing or a test fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.wheels import MissingError
from scripts.vllm_overlay import ROOT, SHA256, VENV, metadata, python_of, site_of, unmet
from vllm_shadowkv.versions import ANY_VERSION, is_supported


def newest() -> str:
    """The newest release of vLLM that the index has for this Python.

    Raises:
        MissingError: it has none, or cannot be asked.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", "vllm"]
    result = subprocess.run(pip, capture_output=True, text=True)
    found = re.search(r"^vllm \((\S+)\)", result.stdout, re.MULTILINE)
    if result.returncode or found is None:
        raise MissingError(f"the index does not say which vLLM is the newest: {result.stderr.strip()[-300:]}")
    return found[1]


def look(title: str, command: list[str], log: Path) -> int:
    """Runs a command, shows what it prints up to each diff's lines, and keeps all of it; returns its exit code."""
    print(f"\n{title}", flush=True)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log.write_text(result.stdout + result.stderr)
    shown = [line for line in result.stdout.splitlines() if not line.startswith("  ")]
    print(
        *(f"  {line}" for line in shown or ["nothing"]), f"  (all of it: {log.relative_to(ROOT)})", sep="\n", flush=True
    )
    if result.returncode and not shown:
        print(result.stderr[-2000:], file=sys.stderr)
    return result.returncode


def check(vllm: str) -> int:
    """Prints what there is to look at in a version; returns the exit code.

    Raises:
        MissingError: no index has it.
    """
    fetched = python_of(vllm)
    tree = fetched.make()
    folder = ROOT / "build" / f"vllm-{vllm}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"vLLM {vllm}{'' if is_supported(vllm) else ', which versions.SUPPORTED does not name'}, in {tree}")
    if vllm not in SHA256:
        print("Its checksum is not pinned: add that of its wheel to SHA256 in scripts/vllm_overlay.py.")
    print(
        "\nRequirements that .venv does not meet, to be installed beside it:",
        *(list(unmet(metadata(tree))) or ["none"]),
    )
    trees = [str(site_of(VENV) / "vllm"), str(tree / "vllm")]
    compare = [sys.executable, "scripts/compare_vllm.py", "--diff", *trees]
    failed = look("Our seams, from the pinned version to this one:", compare, folder / "seams.txt")
    operators = [sys.executable, "scripts/vllm_operators.py", *trees]
    failed |= look("Operators that its Python calls otherwise than the wheel for the CPU has them:", operators,
                   folder / "operators.txt")  # fmt: skip
    print(f"\nThe tests that meet those seams, on {vllm}:", flush=True)
    environment = os.environ | {ANY_VERSION: "1"}
    return failed | subprocess.run(["make", "test-seams", f"VLLM={vllm}"], cwd=ROOT, env=environment).returncode


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.vllm_check VERSION|newest (make vllm-check VLLM=…)")
    try:
        sys.exit(int(check(newest() if sys.argv[1] == "newest" else sys.argv[1]) != 0))
    except (MissingError, OSError) as error:
        sys.exit(f"make vllm-check: {error}")


if __name__ == "__main__":
    main()
