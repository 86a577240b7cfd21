"""Runs the model once on random input, to see how large its queries are in each channel of a key (docs/adr/0016)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.platforms import current_platform

from vllm_shadowkv.integration.worker.layers import Layers
from vllm_shadowkv.query_scales import query_scales

TOKENS = 256
"""Half as many are nearly as good as four times as many, on a real decoder."""


def probe(worker: Any, layers: Layers) -> None:
    """Gives the layers their scales of queries; those of random tokens are as good as those of text.

    The run is vLLM's own, by which it measures memory and warms up: no KV cache is needed, and attention gives zeros.
    All workers of a model must call it, for it communicates. The input is the same in each and every time. Models in
    which that run reads memory that nobody has written keep no scales.

    Args:
        worker: vLLM's, with its weights loaded and its largest step run, for a run may compile the model.
        layers: of the worker's model.
    """
    if _reads_anything(worker.vllm_config.compilation_config.static_forward_context, layers):
        return
    runner = worker.model_runner
    options = {"skip_attn": True} if worker.use_v2_model_runner else {}
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    layers.seen = {}
    try:
        with torch.random.fork_rng(gpus), set_current_vllm_config(worker.vllm_config):
            torch.manual_seed(0)
            tokens = min(TOKENS, runner.max_num_tokens)
            with _random(_hidden_states(worker, tokens)):
                runner._dummy_run(tokens, is_profile=True, randomize_inputs=True, skip_eplb=True, **options)
        for name, mean_squares in layers.seen.items():
            layer = layers.by_name[name]
            layer.query_scales = query_scales(mean_squares, layer.attention.num_kv_heads, layer.rotary)
    finally:
        layers.seen = None


def _reads_anything(context: dict[str, Any], layers: Layers) -> bool:
    """Whether layers of the model give, in such a run, memory as it was: those with a state, vLLM's own on the CPU."""
    ours = {one.layer_name for layer in layers.by_name.values() for one in (layer.attention, layer.exact, layer.slots)}
    others = [layer for name, layer in context.items() if name not in ours and isinstance(layer, AttentionLayerBase)]
    return any(isinstance(layer, MambaBase) or current_platform.is_cpu() for layer in others)


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
