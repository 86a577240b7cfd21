"""Runs the model once on random input, to see how large its queries are in each channel of a key (docs/adr/0016)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.distributed import get_pp_group

from vllm_shadowkv.integration.worker.layers import Layers
from vllm_shadowkv.query_scales import query_scales

TOKENS = 256
"""Half as many are nearly as good as four times as many, on a real decoder."""


def probe(worker: Any, layers: Layers) -> None:
    """Gives the layers their scales of queries; those of random tokens are as good as those of text.

    The run is vLLM's own, by which it measures memory and warms up: no KV cache is needed, and attention gives zeros.
    All workers of a model must call it, for it communicates. The input is the same in each and every time.

    Args:
        worker: vLLM's, with its weights loaded and its largest step run, for a run may compile the model.
        layers: of the worker's model.
    """
    runner = worker.model_runner
    options: dict[str, Any] = {"cudagraph_runtime_mode": CUDAGraphMode.NONE}
    if worker.use_v2_model_runner:
        options = {"skip_attn": True, "is_profile": True}
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    layers.seen = {}
    try:
        with torch.random.fork_rng(gpus), set_current_vllm_config(worker.vllm_config):
            torch.manual_seed(0)
            tokens = min(TOKENS, runner.max_num_tokens)
            with _random(_hidden_states(worker, tokens)):
                runner._dummy_run(tokens, randomize_inputs=True, skip_eplb=True, **options)
        for name, mean_squares in layers.seen.items():
            layer = layers.by_name[name]
            layer.query_scales = query_scales(mean_squares, layer.attention.num_kv_heads, layer.rotary)
    finally:
        layers.seen = None


def _hidden_states(worker: Any, tokens: int) -> list[Tensor]:
    """The runner's buffers that this rank's layers read and that vLLM leaves at zero in such a run.

    They hold what the ranks before would send, and, in the V2 runner, what stands for embeddings with images.
    """
    runner = worker.model_runner
    if get_pp_group().is_first_rank:
        needs_embeddings = worker.use_v2_model_runner and runner.uses_inputs_embeds
        return [runner.model_state.dummy_inputs_embeds(tokens)] if needs_embeddings else []
    if runner.intermediate_tensors is None:  # as the V1 runner makes them in its first step
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=worker.model_config.dtype, device=worker.device
        )
    return list(runner.intermediate_tensors.tensors.values())


@contextmanager
def _random(buffers: list[Tensor]) -> Iterator[None]:
    """Fills buffers with normal numbers, and with zeros after."""
    for buffer in buffers:
        buffer.normal_()
    try:
        yield
    finally:
        for buffer in buffers:
            buffer.zero_()
