from __future__ import annotations

from pathlib import Path

import cuda_emulation
import pytest


@pytest.fixture(scope="session")
def library() -> Path:
    """The kernels of this folder, compiled as the race detector wants them."""
    return cuda_emulation.build("race", "cases", sorted(Path(__file__).parent.glob("*.cu")))
