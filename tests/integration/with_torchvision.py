"""The Python code of the torchvision that vLLM asks for, which processors of images need.

The wheel that PyPI has is built for CUDA: its compiled half does not load beside a CPU torch, and its other half ends
because operators of that half are not there. No processor calls them, so it is enough that they are declared.
"""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

from benchmarks.wheels import Cached, MissingError, Wheel

__all__ = ["TORCHVISION", "MissingError"]

WHEEL = Wheel("torchvision", "0.28.0", "7e80f543b22503d9415e126db5f0ff3917036925e38560ee6b9ae38c571a4002", 7.7)


def _make(content: ZipFile, folder: Path) -> None:
    content.extractall(folder, [name for name in content.namelist() if name.endswith((".py", "/METADATA", "/LICENSE"))])


TORCHVISION = Cached("torchvision-1", WHEEL, _make, "make test-all")
