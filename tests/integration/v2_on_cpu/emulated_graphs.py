"""Emulates CUDA graphs of decode steps (FULL_DECODE_ONLY) on the CPU.

A replay runs the captured forward pass once more, with the metadata objects of the capture: what is not a persistent
buffer is stale then, as in a real graph. It does not see what else breaks a real capture: host branches,
synchronisation and allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import cudagraph_utils

replays = 0
"""Steps that a graph has served in this process."""


class _Graph:
    def __init__(self, forward: Callable[[CUDAGraphMode], Any]) -> None:
        self._forward = forward

    def replay(self) -> None:
        global replays
        replays += 1
        self._forward(CUDAGraphMode.NONE)


@torch.inference_mode()
def _capture(manager: Any, create_forward: Callable[..., Any], progress_bar_desc: str = "") -> None:
    for description in manager._capture_descs.get(CUDAGraphMode.FULL, []):
        create_forward(description, warmup=True)(CUDAGraphMode.NONE)
        forward = create_forward(description, warmup=False)
        forward(CUDAGraphMode.NONE)
        manager.graphs[description] = _Graph(forward)
    manager._graphs_captured = True


def capture(runner: Any, sizes: Sequence[int] = (1, 2, 4, 8)) -> None:
    """Captures graphs of decode steps, in place of any from before.

    Args:
        runner: a V2 model runner with its KV cache.
        sizes: rows of the graphs; a step takes the next larger one.
    """
    runner.compilation_config.cudagraph_capture_sizes = list(sizes)
    runner.compilation_config.max_cudagraph_capture_size = max(sizes)
    type(current_platform).get_global_graph_pool = lambda self=None: None
    cudagraph_utils.CudaGraphManager.capture = _capture
    runner.cudagraph_manager = cudagraph_utils.ModelCudaGraphManager(
        runner.vllm_config, runner.device, CUDAGraphMode.FULL_DECODE_ONLY, runner.decode_query_len
    )
    runner.cudagraph_manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        None,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )
    assert runner.cudagraph_manager.graphs, "no graph was captured"
