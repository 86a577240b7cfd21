import pytest
import torch

import vllm_shadowkv


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and vllm_shadowkv.has_cuda():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and the CUDA kernels")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
