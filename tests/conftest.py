import os

import pytest
import torch

import vllm_shadowkv


def runs_on_gpu() -> bool:
    return torch.cuda.is_available() and vllm_shadowkv.has_cuda()


def pytest_configure() -> None:
    """With SHADOWKV_REQUIRE_GPU=1, as scripts/gpu.py sets it, nothing may be skipped for want of a GPU."""
    if os.environ.get("SHADOWKV_REQUIRE_GPU") == "1" and not runs_on_gpu():
        raise pytest.UsageError("SHADOWKV_REQUIRE_GPU=1, but there is no CUDA device, or no CUDA kernels are built.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if runs_on_gpu():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and the CUDA kernels")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
