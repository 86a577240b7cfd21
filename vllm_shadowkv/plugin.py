"""The entry point that vLLM calls in every process (`vllm.general_plugins`, `vllm/plugins/__init__.py`).

It only tells vLLM names, and Prometheus whom to ask: nothing is imported that is not used, no extension is loaded, no
device is touched. Whatever may be missing is found, and said, where the backend is resolved (`integration/backend.py`),
because vLLM merely logs a plugin that raises.
"""

from __future__ import annotations

from typing import Any

NAME = "SHADOWKV"
BACKEND = "vllm_shadowkv.integration.backend.ShadowKVBackend"


def register() -> None:
    """Makes `--attention-backend shadowkv` known to vLLM. Safe to call again."""
    from prometheus_client import REGISTRY
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_shadowkv.exposition import Collector

    if NAME in AttentionBackendEnum.__members__:
        return
    register_backend(NAME, BACKEND)
    # A spawned process unpickles the engine's configuration before it loads plugins, and an enum member pickles by a
    # value that the process does not know yet. So our member says how to get itself.
    AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (_member, ())
    # vLLM's CPU platform takes no backend but its own; it does honour an override of them.
    for cpu_backend in ("CPU_ATTN", "CPU_MLA", "AMX_MLA"):
        member = AttentionBackendEnum.__members__.get(cpu_backend)
        if member is not None and not member.is_overridden():
            register_backend(member, f"vllm_shadowkv.integration.platform.{cpu_backend}")
    REGISTRY.register(Collector())  # what `/metrics` and `LLM.get_metrics` read


def _member() -> Any:
    """The backend's enum member, in a process that may not have loaded plugins."""
    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[NAME]
