"""Backends that vLLM would silently run in place of ours, whatever was asked for.

`CpuPlatform.get_attn_backend_cls` (`vllm/platforms/cpu.py`) returns the path of `CPU_ATTN`, or of an MLA backend, and a
model whose values have another head size than its keys takes a backend of its own (`vllm/model_executor/models/
mimo_v2.py`). `plugin.register` overrides those paths with attributes of this module, which answer by the current
configuration.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_shadowkv.integration import refusals
from vllm_shadowkv.plugin import IN_PLACE_OF_OURS, NAME, OF_CPU


def __getattr__(name: str) -> Any:
    if name not in IN_PLACE_OF_OURS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    vllm_config = get_current_vllm_config_or_none()
    of_cpu = name in OF_CPU
    per_kind = vllm_config.attention_config.backend_per_kind.values() if vllm_config else ()
    one_kind = any(backend.name == NAME for backend in per_kind)
    if one_kind and of_cpu:
        raise ValueError(
            "shadowkv cannot be asked for one kind of layers on the CPU, whose platform has one backend for all; use "
            "--attention-backend shadowkv, which leaves layers with windows to vLLM's own, in place of "
            "--attention-config.backend_per_kind."
        )
    selected = vllm_config.attention_config.backend if vllm_config else None
    if not one_kind and (selected is None or selected.name != NAME):
        return resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    if name == "CPU_ATTN":
        return AttentionBackendEnum[NAME].get_class()
    raise ValueError(refusals.MLA if of_cpu else refusals.OWN_BACKEND)
