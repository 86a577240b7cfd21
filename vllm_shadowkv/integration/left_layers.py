"""Layers that stay with vLLM's own backend although ours is asked for: with windows that requests exceed, or chunks.

vLLM's selector tells layers with a window from others only if it is asked to (`backend_per_kind`), its CPU platform not
even then, and neither says how long the window is. So the choice is made where a layer's implementation is built, which
is told. The layer has named our backend by then; it gets the other one when it is attached to its parent
(`pseudo_layers.py`), before vLLM asks for specs and builders.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend

from vllm_shadowkv.integration.refusals import check_chunks
from vllm_shadowkv.integration.worker.impl import ShadowKVImpl
from vllm_shadowkv.integration.worker.runtime import Runtime
from vllm_shadowkv.plugin import NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_LEFT = "shadowkv_left"
"""Attribute of another backend's implementation."""


@dataclass(frozen=True)
class _Left:
    backend: Any
    runtime: Runtime  # which a model without any layer of ours would lose


def make_impl(chunked: bool, *args: Any, **kwargs: Any) -> Any:
    """What vLLM takes for the constructor of our implementation; a window that no request exceeds is full attention.

    Args:
        chunked: the layer attends in chunks.
        args, kwargs: as of `ShadowKVImpl`.

    Raises:
        ValueError: see `ShadowKVImpl` and `refusals.check_chunks`.
    """
    vllm_config = get_current_vllm_config()
    bound = inspect.signature(ShadowKVImpl).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    window = given["sliding_window"]
    windowed = window is not None and window < vllm_config.model_config.max_model_len
    if given["attn_type"] != "decoder" or not (chunked or windowed):
        return ShadowKVImpl(*args, **kwargs)
    if chunked:
        check_chunks(vllm_config)
    runtime = Runtime.of(vllm_config)
    runtime.geometry.layers_beside = True
    has_sink = given["sinks"] is not None
    backend = _of_vllm(vllm_config, given["head_size"], given["kv_cache_dtype"], has_sink, windowed)
    impl = backend.get_impl_cls()(*args, **kwargs)
    setattr(impl, _LEFT, _Left(backend, runtime))
    return impl


def _of_vllm(vllm_config: VllmConfig, head_size: int, kv_cache_dtype: str, has_sink: bool, windowed: bool) -> Any:
    """The backend that vLLM takes for such a layer where ours is not asked for."""
    asked = vllm_config.attention_config
    others = copy.copy(asked)
    others.backend = None
    others.backend_per_kind = {kind: named for kind, named in asked.backend_per_kind.items() if named.name != NAME}
    vllm_config.attention_config = others
    try:
        return get_attn_backend(
            head_size, torch.get_default_dtype(), kv_cache_dtype, has_sink=has_sink, has_sliding_window=windowed
        )
    finally:
        vllm_config.attention_config = asked


def give_back(attention: Any) -> None:
    """Gives an attention module that was left to another backend that backend, in place of ours.

    Args:
        attention: any module.
    """
    left = getattr(getattr(attention, "impl", None), _LEFT, None)
    if left is not None:
        backend = left.backend
        attention.backend = AttentionBackendEnum[backend.get_name()]
        if isinstance(attention, ChunkedLocalAttention):
            backend = create_chunked_local_attention_backend(backend, attention.attention_chunk_size)
        attention.attn_backend = backend
