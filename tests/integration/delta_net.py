"""Gated delta nets in float32, by Transformers' functions, for vLLM's for the CPU take bf16 alone.

In bf16 a tiny random model says something else after a few tokens for the last bit of a state. So both sides are
compared with this core, which reads vLLM's metadata and states.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus


def install() -> None:
    """Puts it in the place of vLLM's, before that is registered as an op."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    # The op's schema is made of them.
    _core.__annotations__ = get_type_hints(gdn_attention.cpu_gdn_attention_core) | {"return": None}
    gdn_attention.cpu_gdn_attention_core = _core


def _core(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: Any) -> None:
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import _resolve_layer_name

    context, name = get_forward_context(), _resolve_layer_name(layer_name)
    if context.attn_metadata is None:
        return
    metadata, layer = context.attn_metadata[name], context.no_compile_layers[name]
    ends = metadata.non_spec_query_start_loc.tolist()
    decodes, known = metadata.num_decodes, metadata.has_initial_state
    for row, state in enumerate(metadata.non_spec_state_indices_tensor[: len(ends) - 1].tolist()):
        tokens = slice(ends[row], ends[row + 1])
        fresh = row >= decodes and not known[row]
        core_attn_out[tokens] = _sequence(layer, state, fresh, mixed_qkv[tokens], b[tokens], a[tokens])


def _sequence(layer: Any, state: int, fresh: bool, mixed_qkv: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """One request's new tokens, `[tokens, heads, head_size]`; its states are read, if it is not `fresh`, and kept."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import (
        _conv_buffer_view,
        _ssm_state_view,
        _unpacked_conv_weight,
    )

    before, memory = _conv_buffer_view(layer)[state], _ssm_state_view(layer)[state]
    if fresh:
        before.zero_()
        memory.zero_()
    weight = _unpacked_conv_weight(layer)
    inputs = torch.cat([before, mixed_qkv.T], dim=1)  # [channels, width - 1 + tokens]
    before.copy_(inputs[:, -before.shape[1] :])
    mixed = silu(conv1d(inputs[None], weight[:, None], layer.conv1d.bias, groups=len(weight)))[0]
    query, key, value = layer.rearrange_mixed_qkv(mixed.T)
    repeats = value.shape[2] // key.shape[2]
    decay = -layer.A_log.float().exp() * softplus(a.float() + layer.dt_bias)
    found, last = torch_chunk_gated_delta_rule(
        query.repeat_interleave(repeats, dim=2),
        key.repeat_interleave(repeats, dim=2),
        value,
        decay[None],
        b.sigmoid()[None],
        initial_state=memory[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    memory.copy_(last[0])
    return found[0]
