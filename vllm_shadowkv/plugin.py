"""The entry point that vLLM calls in every process (`vllm.general_plugins`, `vllm/plugins/__init__.py`).

It only tells vLLM names, and Prometheus whom to ask: nothing is imported but vLLM's factory of connectors, which its
servers import anyway, no extension is loaded, no device is touched. Whatever may be missing is found, and said, where
the backend is resolved (`integration/backend.py`), because vLLM merely logs a plugin that raises.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from vllm_shadowkv.exposition import FOLDER, Collector, belong_to, owners

NAME = "SHADOWKV"
BACKEND = "vllm_shadowkv.integration.backend.ShadowKVBackend"
CONNECTOR = "ShadowKVConnector"
OF_CPU = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")
IN_PLACE_OF_OURS = (*OF_CPU, "FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV")
"""Backends that vLLM's CPU platform, or a model, chooses by itself; see `integration/platform.py`."""


def register() -> None:
    """Makes `--attention-backend shadowkv` and its KV connector known to vLLM. Safe to call again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    _register_backend()
    with contextlib.suppress(ValueError):  # it is known
        KVConnectorFactory.register_connector(CONNECTOR, "vllm_shadowkv.integration.connector", CONNECTOR)


def _register_backend() -> None:
    from prometheus_client import REGISTRY
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME in AttentionBackendEnum.__members__:
        return
    register_backend(NAME, BACKEND)
    # A spawned process unpickles the engine's configuration before it loads plugins, and an enum member pickles by a
    # value that the process does not know yet. So our member says how to get itself, and who asks for metrics there.
    AttentionBackendEnum[NAME].__reduce_ex__ = lambda _: (_member, (os.environ.get(FOLDER), os.getpid(), *owners))
    # What vLLM takes whatever was asked for; it does honour an override of it.
    for name in IN_PLACE_OF_OURS:
        member = AttentionBackendEnum.__members__.get(name)
        if member is not None and not member.is_overridden():
            register_backend(member, f"vllm_shadowkv.integration.platform.{name}")
    REGISTRY.register(Collector())  # what `/metrics` and `LLM.get_metrics` read


def platform() -> None:
    """No platform (`vllm.platform_plugins`): vLLM asks for one before it reads any configuration.

    General plugins come too late for `LLM(attention_config={"backend": "SHADOWKV"})`, which vLLM validates before it
    loads them. With VLLM_TARGET_DEVICE=cpu it does not ask.
    """
    _register_backend()


def _member(folder: str | None = None, *pids: int) -> Any:
    """The backend's enum member, in a process that may not have loaded plugins; of the rest see `belong_to`."""
    _register_backend()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    belong_to(folder, *pids)
    return AttentionBackendEnum[NAME]
