"""The forward pass of a layer: write the new tokens to exact pages, then attend, each row in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl

from vllm_shadowkv.integration.refusals import check_layer
from vllm_shadowkv.integration.worker.runtime import Runtime
from vllm_shadowkv.integration.worker.step import Step
from vllm_shadowkv.state.prefill import attend_prefill


class ShadowKVImpl(AttentionImpl[Step]):
    """ShadowKV attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        chunk_lookback: int = -1,
        **unknown: Any,
    ) -> None:
        """VLLM constructs it; `vllm/model_executor/layers/attention/attention.py`.

        With a `chunk_lookback` that is not -1, none, vLLM has refused every backend but Triton's by now.

        Raises:
            ValueError: the engine, the model or the layer is not supported; one sentence says what and what to do.
        """
        vllm_config = get_current_vllm_config()
        check_layer(attn_type, alibi_slopes, logits_soft_cap, kv_sharing_target_layer_name)
        if unknown:
            raise ValueError(
                f"shadowkv does not support layers with {', '.join(unknown)}; use another --attention-backend."
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sinks = None if sinks is None else sinks.detach()  # a parameter of the model, which has no weights yet
        self.runtime = Runtime.of(vllm_config)
        self.runtime.lay_out(num_heads, self.num_kv_heads, head_size, vllm_config.model_config.dtype)
        self.key_weight: Tensor | None = None  # read with the rotation
        self.layer_name: str | None = None  # set when it is attached to its parent (pseudo_layers.py)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Reads the layer's rotation, now that the model is complete."""
        assert self.layer_name is not None, "the layer was not attached to a module"
        self.runtime.layers.read_rotary(self.layer_name)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the step's tokens.

        Args:
            layer: the attention module.
            query: float `[tokens, Hq, D]`, post-RoPE; may be padded, as the next two.
            key: float `[tokens, Hkv, D]`, post-RoPE.
            value: float `[tokens, Hkv, D]`.
            kv_cache: the layer's cache; `Memory.bind` reads it from the layers.
            attn_metadata: the step's plan; None while vLLM profiles, and while `probe.py` looks at queries.
            output: float `[tokens, Hq, D]`, written.
            output_scale: must be None, as the next.
            output_block_scale: for quantised outputs.

        Returns:
            `output`.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("shadowkv does not support fused quantisation of the attention output.")
        assert self.layer_name is not None
        if attn_metadata is None:
            self.runtime.memory.rehearse(query)
            if self.runtime.layers.seen is not None:
                weight = 1 if self.key_weight is None else self.key_weight.float()
                self.runtime.layers.seen[self.layer_name] = (query.float() * weight).square().mean(0)
            return output.fill_(0)
        step, bound = attn_metadata, self.runtime.memory.bind()
        memory = bound.memories[self.layer_name]
        query, key, out = query[: step.num_tokens], key[: step.num_tokens], output[: step.num_tokens]
        if self.key_weight is not None:  # a key is turned back without it, so queries carry it
            weight = self.key_weight.float()
            query = (query * weight).to(query.dtype)
            key = (key / weight.where(weight != 0, 1)).to(key.dtype)  # where it is 0, so is the key
        attention = self.runtime.attention
        attention.write(memory, key, value[: step.num_tokens], step.slot_mapping)
        if step.is_empty:  # vLLM's dummy rows, whose output goes through the rest of the model
            out.zero_()
        if step.dense is not None:
            tokens = step.dense.tokens
            rows_query = query if tokens is None else query[tokens]
            rows_out = out if tokens is None else torch.empty_like(rows_query)
            attention.attend_dense(memory, step.dense, rows_query, self.scale, rows_out)
            if tokens is not None:
                out[tokens] = rows_out
        for number, batch in enumerate(step.decode):
            if number:  # what the token before has in slots may be evicted again
                bound.state.start_step()
            rows_query = query if batch.tokens is None else query[batch.tokens]
            rows_out = out if batch.tokens is None else torch.empty_like(rows_query)
            bound.workspace.attend(
                memory, bound.state, batch.rows, rows_query, self.scale, rows_out, bound.slots.tensor
            )
            if batch.tokens is not None:
                out[batch.tokens] = rows_out
        for row in step.prefills:
            attend_prefill(
                memory,
                attention,
                query[row.tokens],
                row.block_row,
                row.exact_row,
                row.exact_start,
                row.seq_len,
                self.scale,
                out[row.tokens],
            )
        return output
