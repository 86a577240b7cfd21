"""One worker's shadowkv: the parts, and how vLLM's calls find them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_shadowkv.integration.attention import choice
from vllm_shadowkv.integration.attention.library import AttentionLibrary
from vllm_shadowkv.integration.compat import bound_kv_cache_memory
from vllm_shadowkv.integration.worker.geometry import Geometry
from vllm_shadowkv.integration.worker.layers import Layers
from vllm_shadowkv.integration.worker.memory import Memory
from vllm_shadowkv.integration.worker.metering import Metering
from vllm_shadowkv.integration.worker.planner import Planner
from vllm_shadowkv.integration.worker.probe import probe


class Runtime:
    """Everything of one model in one worker process. Layers share it.

    Attributes:
        geometry: sizes, and the settings that they follow from.
        layers: and their rotation.
        memory: of the layers.
        metering: what is counted.
    """

    _latest: weakref.ref[Runtime] | None = None
    """The model's layers own it: with them it goes, and its memory."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Reads and checks the settings. `of` calls it for the model's first layer."""
        self.geometry = Geometry(vllm_config)
        self.layers = Layers(self.geometry)
        self.metering = Metering(self.geometry)
        self.memory = Memory(self.geometry, self.layers, self.metering)
        self._attention: AttentionLibrary | None = None
        self._planner: Planner | None = None
        bound_kv_cache_memory(_measured_bytes)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Runtime:
        """The runtime of the model that is being built.

        Raises:
            ValueError: it is a draft model, which runs several steps within one of ours.
        """
        drafts = vllm_config.speculative_config
        if drafts and drafts.uses_draft_model() and vllm_config.model_config is drafts.draft_model_config:
            raise ValueError(
                "shadowkv does not serve the draft model; name another backend for it, as attention_backend in "
                "--speculative-config."
            )
        latest = cls._of(vllm_config)
        if latest is None:
            latest = cls(vllm_config)
            cls._latest = weakref.ref(latest)
        return latest

    @classmethod
    def _of(cls, vllm_config: VllmConfig) -> Runtime | None:
        """The latest one, if it is this engine's."""
        latest = cls._latest() if cls._latest else None
        context = vllm_config.compilation_config.static_forward_context
        ours = latest is not None and latest.geometry.vllm_config.compilation_config.static_forward_context is context
        return latest if ours else None

    @classmethod
    def latest(cls) -> Runtime:
        """The runtime of the model that was built last; vLLM asks for specs without a configuration at hand."""
        latest = cls._latest() if cls._latest else None
        if latest is None:
            raise RuntimeError("shadowkv: a KV cache spec was asked for before any attention layer was built.")
        return latest

    def lay_out(self, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
        """Makes room for a layer of this shape; what all layers share is made for the first.

        Raises:
            ValueError: a shape that is not supported, or not that of the layers before.
            RuntimeError: no library attends over exact pages here.
        """
        if self.geometry.fit(num_heads, num_kv_heads, head_size, dtype):
            self._attention = choice.of_platform(self.geometry.layout, num_heads)
            self.memory.reserve(num_heads)

    @property
    def attention(self) -> AttentionLibrary:
        """The platform's attention over exact pages."""
        assert self._attention is not None, "no layer was built"
        return self._attention

    @property
    def planner(self) -> Planner:
        """Of the worker's steps; made for the first one, when it is known what layers the model has beside ours."""
        if self._planner is None:
            self._planner = Planner(self.geometry, self.memory, self.attention, self.metering.steps)
        return self._planner


def _measured_bytes(worker: Any, measure: Callable[[], int]) -> int:
    """`compat.bound_kv_cache_memory` calls it in every worker; other backends' workers are left alone."""
    runtime = Runtime._of(worker.vllm_config)
    if runtime is None:
        return measure()
    # The worker's own configuration: a model may be built with a copy of it, which gets another id.
    server = worker.vllm_config.instance_id.partition("_dp")[0]  # data parallel engines of Ray's are one server
    available = runtime.memory.measured_bytes(measure, server)
    probe(worker, runtime.layers)
    return available
