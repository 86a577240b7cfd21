"""Backend choice on vLLM's CPU platform, which would silently run CPU_ATTN whatever was asked for.

`CpuPlatform.get_attn_backend_cls` (`vllm/platforms/cpu.py`) returns the path of `CPU_ATTN`, or of an MLA backend.
`plugin.register` overrides those paths with attributes of this module, which answer by the current configuration.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_shadowkv.plugin import NAME


def __getattr__(name: str) -> Any:
    if name not in ("CPU_ATTN", "CPU_MLA", "AMX_MLA"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config and any(backend.name == NAME for backend in vllm_config.attention_config.backend_per_kind.values()):
        raise ValueError(
            "shadowkv cannot serve one kind of layers on the CPU, whose platform has one backend for all; drop "
            "--attention-config.backend_per_kind."
        )
    selected = vllm_config.attention_config.backend if vllm_config else None
    if selected is None or selected.name != NAME:
        return resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    if name != "CPU_ATTN":
        raise ValueError(
            "shadowkv does not support MLA models, whose keys are compressed already; use another --attention-backend."
        )
    return AttentionBackendEnum[NAME].get_class()
