"""Runs every test of an op with the CPU kernel, with the CUDA kernel on emulated threads, and on a GPU where one is.

A test marked `cpu_kernel` is about the CPU kernel alone. CUDA kernels take float16 and bfloat16, so a test whose
parameter is float32, or a layout of it, runs with the CPU kernel only; a test that names no dtype gets the
`generators.DEFAULT_DTYPE` of the kernel.
"""

from __future__ import annotations

from typing import Any

import cuda_emulation
import generators
import pytest
import torch
from on_device import OnDevice

import vllm_shadowkv
from vllm_shadowkv import ops


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kernels: list[Any] = ["cpu"]
    if not metafunc.definition.get_closest_marker("cpu_kernel"):
        kernels.append("emulated")
        if torch.cuda.is_available() and vllm_shadowkv.has_cuda():
            kernels.append(pytest.param("cuda", marks=pytest.mark.gpu))
    metafunc.parametrize("kernel", kernels, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def possible(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("kernel", "cpu") == "cpu":
            return True
        return not any(
            value is torch.float32 or getattr(value, "dtype", 0) is torch.float32 for value in params.values()
        )

    items[:] = [item for item in items if possible(item)]


@pytest.fixture(autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel `vllm_shadowkv.ops` calls in this test."""
    if request.param != "cpu":
        monkeypatch.setattr(ops, "_ops", _cuda_ops() if request.param == "cuda" else _emulated_ops())
        monkeypatch.setattr(ops, "_workspace", lambda like, size: torch.full((size,), torch.nan))
        monkeypatch.setattr(generators, "DEFAULT_DTYPE", torch.bfloat16)
    return request.param


def _emulated_ops() -> Any:
    cuda_emulation.load()
    return torch.ops.shadowkv_emulated


def _cuda_ops() -> Any:
    return OnDevice(torch.ops.shadowkv, "cuda")
