"""vLLM's CPU platform with what its Ray executor asks of a platform. Ray's GPUs are numbers then: `--num-gpus`.

A plugin of vLLM wherever this folder is in PYTHONPATH, by the metadata beside this file, and nowhere else.
"""

from __future__ import annotations

from typing import ClassVar

from vllm.platforms.cpu import CpuPlatform


def register() -> str:
    return f"{__name__}.RayCpuPlatform"


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"
    ray_noset_device_env_vars: ClassVar[list[str]] = ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]
