"""Runs every test of an op with the CPU kernel, and with the CUDA kernel on emulated threads.

A test marked `cpu_kernel` is about the CPU kernel alone. CUDA kernels take float16 and bfloat16, so a test whose
parameter is float32, or a layout of it, runs with the CPU kernel only; a test that names no dtype gets the
`generators.DEFAULT_DTYPE` of the kernel.
"""

from __future__ import annotations

from pathlib import Path

import cuda_emulation
import generators
import pytest
import torch

from vllm_shadowkv import ops

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = metafunc.module.__name__.removeprefix("test_")
    emulated = (CUDA_SOURCES / f"{op}.cu").exists() and not metafunc.definition.get_closest_marker("cpu_kernel")
    metafunc.parametrize("kernel", ["cpu", "emulated"] if emulated else ["cpu"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def possible(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("kernel") != "emulated":
            return True
        return not any(
            value is torch.float32 or getattr(value, "dtype", 0) is torch.float32 for value in params.values()
        )

    items[:] = [item for item in items if possible(item)]


@pytest.fixture(autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel `vllm_shadowkv.ops` calls in this test."""
    if request.param == "emulated":
        cuda_emulation.load()
        monkeypatch.setattr(ops, "_ops", torch.ops.shadowkv_emulated)
        monkeypatch.setattr(ops, "_workspace", lambda like, size: torch.full((size,), torch.nan))
        monkeypatch.setattr(generators, "DEFAULT_DTYPE", torch.bfloat16)
    return request.param
