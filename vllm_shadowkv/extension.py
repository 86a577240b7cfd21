"""Loads the compiled extension, which registers the ops under `torch.ops.shadowkv`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")
LEAST_CAPABILITY = (8, 0)
"""Of a GPU: what the kernels are written for."""
FIX = "build it with `make install` or `pip install --no-build-isolation -e .`"


@cache
def load() -> Any:
    """Load the extension once.

    Returns:
        The namespace `torch.ops.shadowkv`.

    Raises:
        ImportError: If the library is missing or does not load; the message names the fix.
        RuntimeError: If `SHADOWKV_CPU_ISA` is set and names what this CPU lacks.
    """
    if not LIBRARY.is_file():
        raise ImportError(f"the compiled extension {LIBRARY} is missing; {FIX}.")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(
            f"the compiled extension {LIBRARY} does not load with torch {torch.__version__} ({error}); {FIX}."
        ) from error
    torch.ops.shadowkv.cpu_isa()  # A wrong SHADOWKV_CPU_ISA fails here, not inside a model.
    return torch.ops.shadowkv


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether kernels for `architectures`, as TORCH_CUDA_ARCH_LIST has them, run on a GPU of this capability.

    Code runs on later GPUs of its major number, on that very one if its name ends in a letter; with `+PTX` and no
    letter the driver compiles it for all later ones. A name that is not a number ("Hopper") is taken to be right.
    """
    for name in re.split("[; ]+", architectures):
        found = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", name)
        if not found:
            return True
        built = (int(found[1]), int(found[2]))
        later = built[0] == capability[0] and built <= capability and not found[3]
        if built == capability or later or (found[4] and not found[3] and built <= capability):
            return True
    return False
