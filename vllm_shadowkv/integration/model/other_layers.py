"""Layers of other backends beside ours: with windows or chunks, with a state of fixed size, those of a draft model.

They share our pool of pages; `state/layers_beside.py` says how.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Set
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.state.layers_beside import check_state, groups

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def foreign_pages(vllm_config: VllmConfig, layout: PageLayout, ours: Set[str], num_layers: int) -> int:
    """Blocks of the pool that other layers hold for the longest request, at most.

    Args:
        vllm_config: of the engine, with all its layers.
        layout: of our pages.
        ours: names of our layers and pseudo-layers.
        num_layers: our attention layers.

    Raises:
        ValueError: their pages do not fit ours.
    """
    others: Counter[Any] = Counter()
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if name not in ours and isinstance(layer, AttentionLayerBase):
            spec = layer.get_kv_cache_spec(vllm_config)
            others.update([] if spec is None else [spec])
    pages = 0
    for spec, count in others.items():
        # Pages of a request are vLLM's to say, whose managers admit by it; `LayersBeside` says the same without vLLM.
        if isinstance(spec, MambaSpec):
            check_state(layout, spec.state_content_size_bytes)
            spec = dataclasses.replace(spec, page_size_padded=layout.page_bytes)
        else:
            ratio = _pages_in(layout, spec.page_size_bytes, spec.block_size)
            spec = spec.copy_with_new_block_size(spec.block_size * ratio)
        pages += groups(count, num_layers) * -(-spec.max_memory_usage_bytes(vllm_config) // layout.page_bytes)
    return pages


def _pages_in(layout: PageLayout, page_bytes: int, page_tokens: int) -> int:
    """How many pages of another layer a page of ours is."""
    ratio, rest = divmod(layout.page_bytes, page_bytes)
    if rest:
        # Tokens of ours that fill whole pages of theirs; block_size / compression is a multiple of 16.
        token_bytes = layout.page_bytes // layout.exact_tokens
        tokens = math.lcm(16, page_bytes // math.gcd(page_bytes, token_bytes))
        raise ValueError(
            f"shadowkv's pages of {layout.page_bytes} bytes are not a multiple of those of the other "
            f"layers ({page_bytes} bytes, {page_tokens} tokens); set shadowkv.block_size and "
            f"shadowkv.compression so that block_size / compression (now {layout.exact_tokens}) is a "
            f"multiple of {tokens}, or use another --attention-backend for this model."
        )
    return ratio


def spec_dtype(dtype: torch.dtype, layers_beside: bool) -> torch.dtype:
    """The dtype that our specs name: the keys', or bytes where there are other layers.

    What is left of our bytes in a page that such a layer gets may be NaN to it. Where dtypes differ, vLLM zeroes pages
    before they are used (`KVCacheConfig.needs_kv_cache_zeroing`).
    """
    return torch.uint8 if layers_beside else dtype


def may_have_layers_beside(vllm_config: VllmConfig) -> bool:
    """Whether there are, or may be, layers of other backends, as far as the configuration tells.

    Of a model's own layers this process sees those that it builds. All stages of a pipeline must say the same of ours,
    and one may have all the windows: there the model's configuration decides, if it names any.
    """
    drafts = vllm_config.speculative_config
    drafted = drafts is not None and drafts.uses_draft_model()
    if drafted or vllm_config.attention_config.backend_per_kind or vllm_config.model_config.is_hybrid:
        return True
    staged = vllm_config.parallel_config.pipeline_parallel_size > 1
    return staged and _names_windows(vars(vllm_config.model_config.hf_text_config))


def _names_windows(config: dict[str, Any]) -> bool:
    return any(value and ("window" in name or "chunk" in name) for name, value in config.items())


def check_group(layer_names: list[str], num_layers: int) -> None:
    """Refuses a KV cache group that does not hold all our layers: they share one block table.

    Raises:
        ValueError: vLLM splits them where there are fewer of another kind.
    """
    if len(layer_names) != num_layers:
        raise ValueError(
            f"shadowkv needs its {num_layers} layers in one KV cache group, vLLM makes groups of {len(layer_names)} "
            "because the layers of another backend (sliding windows, a draft model) are fewer; use another "
            "--attention-backend, or a draft model of as many layers."
        )
