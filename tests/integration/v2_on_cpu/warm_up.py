"""The V2 runner's warm-up of its kernels: steps that vLLM makes up on CUDA before graphs are captured.

Its requests have two tokens, block ids that no manager gave them, and one slot page each. vLLM 0.32 leaves it out on
the CPU, 0.33 beside `enforce_eager`, and both on CUDA beside it.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.warmup import warmup_kernels

from vllm_shadowkv.integration.worker.planner import Planner


def run(worker: Any) -> int:
    """Runs it as a worker on CUDA does; returns how many plans of KV cache groups were made for it."""
    plans, add = 0, Planner.add

    def counting(self: Planner, *args: Any, **kwargs: Any) -> Any:
        nonlocal plans
        plans += 1
        return add(self, *args, **kwargs)

    Planner.add = counting  # type: ignore[method-assign]
    try:
        warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
    finally:
        Planner.add = add  # type: ignore[method-assign]
    return plans
