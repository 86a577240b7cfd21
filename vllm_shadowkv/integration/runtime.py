"""One worker's shadowkv: its layers, their memory, and the state of the blocks."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook
from vllm import envs
from vllm.platforms import current_platform

from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.integration import exact_attention
from vllm_shadowkv.integration.bound import Bound, Layer, make_bound
from vllm_shadowkv.integration.compat import bound_kv_cache_memory
from vllm_shadowkv.integration.layers import ExactPages, SlotPages
from vllm_shadowkv.integration.machine import bound_bytes
from vllm_shadowkv.integration.other_layers import foreign_pages, spec_dtype
from vllm_shadowkv.integration.planner import Planner
from vllm_shadowkv.integration.refusals import check_cuda_shape, check_engine
from vllm_shadowkv.integration.rope import rotary_of
from vllm_shadowkv.integration.specs import ShadowSpec
from vllm_shadowkv.metrics import Meter, labels_of
from vllm_shadowkv.page import PageLayout, plan_page
from vllm_shadowkv.rotary import Rotary
from vllm_shadowkv.state.boundary import ExactBoundary
from vllm_shadowkv.state.capacity import Capacity
from vllm_shadowkv.state.decode import DecodeWorkspace
from vllm_shadowkv.state.huge_pages import copy_in_huge_pages
from vllm_shadowkv.state.low_rank import factorise, mix
from vllm_shadowkv.state.prefill import TILE_BLOCKS, TILES
from vllm_shadowkv.state.seal import BLOCKS_AT_ONCE
from vllm_shadowkv.state.slot_counts import SlotCounts

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig

    from vllm_shadowkv.integration.exact_attention import ExactBackend

logger = logging.getLogger("vllm.shadowkv")


class Runtime:
    """Everything of one model in one worker process. Layers share it."""

    _latest: weakref.ref[Runtime] | None = None
    """The model's layers own it: with them it goes, and its memory."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Reads and checks the settings. `of` calls it for the model's first layer."""
        self.vllm_config = vllm_config
        self.config = ShadowKVConfig.from_vllm(vllm_config.additional_config)
        check_engine(vllm_config, self.config)
        self.boundary = ExactBoundary.of(
            self.config,
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.model_config.max_model_len,
            vllm_config.max_concurrent_batches,
        )
        self._shape: tuple[int, int, int, torch.dtype] | None = None
        self._layout: PageLayout | None = None
        self._workspace: DecodeWorkspace | None = None
        self._attention: ExactBackend | None = None
        self._rehearsed = current_platform.is_cpu()  # where vLLM does not measure
        self._layers: dict[str, Layer] = {}
        self._parents: dict[str, weakref.ref[torch.nn.Module]] = {}
        self._bound: Bound | None = None
        self._bound_to: tuple[int, torch.Size] | None = None
        self._measuring = False
        self._slots: SlotCounts | None = None
        self._meter: Meter | None = None
        self.planner = Planner(self)
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
        ours = latest is not None and latest.vllm_config.compilation_config.static_forward_context is context
        return latest if ours else None

    @classmethod
    def latest(cls) -> Runtime:
        """The runtime of the model that was built last; vLLM asks for specs without a configuration at hand."""
        latest = cls._latest() if cls._latest else None
        if latest is None:
            raise RuntimeError("shadowkv: a KV cache spec was asked for before any attention layer was built.")
        return latest

    # -- Layers
    # ---------------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> PageLayout:
        """The layout of every layer's pages."""
        assert self._layout is not None, "no layer was built"
        return self._layout

    @property
    def slot_pages_per_request(self) -> int:
        """Slot pages that hold `slot_chunks` chunks per KV head."""
        return self.layout.slot_pages(self.config.slot_chunks)

    @property
    def capacity(self) -> Capacity:
        """What this worker's pool holds."""
        return Capacity(self.layout, len(self._layers), self.boundary, self.slot_pages_per_request)

    @property
    def attention(self) -> ExactBackend:
        """The platform's attention over exact pages."""
        assert self._attention is not None, "no layer was built"
        return self._attention

    def lay_out(self, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
        """Plans the page for a layer's shape; all layers must have the same one.

        Raises:
            ValueError: a shape that is not supported, or not that of the layers before.
        """
        shape = (num_heads, num_kv_heads, head_size, dtype)
        if self._shape is None:
            self._layout = plan_page(self.config, num_kv_heads, head_size, dtype)
            self._shape = shape
            if current_platform.is_cuda():
                check_cuda_shape(num_heads, num_kv_heads, self.slot_pages_per_request * self._layout.slots_per_page)
            self._attention = exact_attention.of_platform(self._layout, num_heads)
            # Before vLLM measures how much memory is left for its KV cache.
            self._workspace = DecodeWorkspace(
                self.config,
                self._layout,
                num_heads,
                self._max_rows(),
                self.boundary.max_sealed_blocks,
                torch.device(current_platform.device_type),
            )
            self.boundary = self.boundary.beside(self.slot_pages_per_request)
        elif shape != self._shape:
            raise ValueError(
                f"shadowkv needs equal attention layers, got (query heads, KV heads, head size, dtype) {shape} after "
                f"{self._shape}; use another --attention-backend for this model."
            )

    def add_layer(self, parent: torch.nn.Module, attention: Any) -> None:
        """Takes in a layer when its module is attached to its parent."""
        name = attention.layer_name
        exact, slots = ExactPages(attention), SlotPages(attention)
        context = self.vllm_config.compilation_config.static_forward_context
        context[exact.layer_name], context[slots.layer_name] = exact, slots
        self._parents[name] = weakref.ref(parent)
        self._layers[name] = Layer(attention, exact, slots, Rotary.identity(), torch.empty(0, 0))

    def read_rotary(self, name: str) -> None:
        """Reads a layer's rotation; its parent is complete once weights are loaded.

        Raises:
            ValueError: a rotation, or a use of it, that is not supported.
            RuntimeError: the layer was never attached to a module.
        """
        layer = self._layers.get(name)
        if layer is None:
            raise RuntimeError(f"shadowkv: the attention layer {name} was not attached to a module.")
        parent = self._parents[name]()
        assert parent is not None
        device = torch.device(current_platform.device_type)
        layer.rotary = rotary_of(parent, name, self.layout.head_size, device, self.boundary.max_model_len)
        table = layer.rotary.cos_sin
        if table is not None and not layer.cos_sin.numel():
            known = (other.cos_sin for other in self._layers.values() if other.rotary.cos_sin is table)
            same = next((other for other in known if other.numel()), None)
            layer.cos_sin = copy_in_huge_pages(table, torch.float32) if same is None else same
            # vLLM's sleep mode of level 2 brings back the model's buffers, and nothing else that was made with them.
            layer.attention.register_buffer("shadowkv_table", table, persistent=False)
            layer.attention.register_buffer("shadowkv_cos_sin", layer.cos_sin, persistent=False)

    def shadow_spec(self, spec: Any) -> ShadowSpec:
        """The shadow spec in place of vLLM's full-attention spec of a layer."""
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.init}
        fields |= {"block_size": self.layout.block_size, "dtype": spec_dtype(self.vllm_config, spec.dtype)}
        return ShadowSpec(**fields, shadow_page_bytes=self.layout.page_bytes)

    def spec_fields(self, layer: Any) -> dict[str, Any]:
        """What the specs of a layer's pseudo-layers share. All layers are built by now, those of other backends too."""
        ours = {name for one in self._layers.values() for name in (one.exact.layer_name, one.slots.layer_name)}
        foreign = foreign_pages(self.vllm_config, self.layout, ours | self._layers.keys(), len(self._layers))
        self.boundary = self.boundary.beside(self.slot_pages_per_request, foreign)
        return {
            "num_kv_heads": layer.num_kv_heads,
            "head_size": layer.head_size,
            "dtype": spec_dtype(self.vllm_config, layer.kv_cache_torch_dtype),
            "boundary": self.boundary,
        }

    @property
    def num_layers(self) -> int:
        """Attention layers of this worker that the backend serves."""
        return len(self._layers)

    @property
    def max_drafts(self) -> int:
        """Most tokens that speculative decoding drafts for a request and step."""
        speculative = self.vllm_config.speculative_config
        return speculative.num_speculative_tokens if speculative else 0

    def _max_rows(self) -> int:
        """Most rows of a step, with what a graph pads it to."""
        graphs = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        return max(self.vllm_config.scheduler_config.max_num_seqs, graphs)

    # -- Memory
    # ---------------------------------------------------------------------------------------------------------

    def bound_bytes(self, available: int) -> int:
        """Bounds the bytes of the KV cache by what the host pool can back; see `machine.bound_bytes`."""
        return bound_bytes(available, self.capacity, self.config.host_memory_gib, self.vllm_config)

    def measured_bytes(self, measure: Callable[[], int]) -> int:
        """Bytes of the KV cache: what vLLM measures, bounded.

        On CUDA it captures graphs to measure them, over a KV cache that it then throws away. No host pool is made for
        that one, and what was bound to it is let go before vLLM allocates the real one.
        """
        self._measuring = True
        try:
            available = measure()
        finally:
            self._measuring, self._bound, self._bound_to = False, None, None
            torch.cuda.empty_cache()  # vLLM has done so while this was still held; without CUDA it does nothing
        return self.bound_bytes(available)

    def rehearse(self, query: Tensor) -> None:
        """Takes, once, the memory of sealing and of a prefill over sealed blocks, while vLLM measures the peak.

        Args:
            query: of the largest step, `[tokens, Hq, D]`.
        """
        if self._rehearsed:
            return
        self._rehearsed = True
        layout = self.layout
        if layout.rank:
            keys = torch.zeros(
                BLOCKS_AT_ONCE, layout.block_size, layout.width, dtype=torch.float32, device=query.device
            )
            mix(factorise(keys, layout.rank))
            del keys
        tiles = (TILES, TILE_BLOCKS, layout.block_size, layout.num_kv_heads, layout.head_size)
        _ = [torch.empty(tiles, dtype=layout.dtype, device=query.device) for _ in range(2)]
        _ += [torch.empty_like(query) for _ in range(3)]  # one part, another, and both merged

    def bind(self) -> Bound:
        """The memory that vLLM has allocated, and ours beside it; made anew whenever vLLM has allocated anew.

        Raises:
            MemoryError: the host pool does not fit.
        """
        first = next(iter(self._layers.values())).attention.kv_cache
        key = (first.data_ptr(), first.shape)
        if self._bound is None or self._bound_to != key:
            assert self._workspace is not None
            self._bound = None  # frees the old pool before the new one is measured
            self._slots = self._slots or SlotCounts(first.device)
            self._meter = self._meter or self._make_meter(self._slots)
            self._meter.num_blocks = first.shape[0]
            self._bound = make_bound(
                self._layers,
                self.layout,
                self.boundary.resolve(first.shape[0]),
                self._workspace,
                self._slots,
                self._max_rows(),
                throw_away=self._measuring,
            )
            self._bound_to = key
        return self._bound

    def bind_early(self) -> None:
        """Binds once all layers have their caches: the host pool takes its time at start-up, not of a request."""
        if not self._measuring and all(layer.has_cache for layer in self._layers.values()):
            self.bind()

    def _make_meter(self, slots: SlotCounts) -> Meter:
        return Meter(
            self.planner.counts,
            slots,
            self.layout,
            len(self._layers),
            labels=labels_of(self.vllm_config),
            first_rank=self.vllm_config.parallel_config.rank == 0,
            log_seconds=envs.VLLM_LOG_STATS_INTERVAL,
        )


def _measured_bytes(vllm_config: VllmConfig, measure: Callable[[], int]) -> int:
    """`compat.bound_kv_cache_memory` calls it in every worker; other backends' workers are left alone."""
    runtime = Runtime._of(vllm_config)
    return measure() if runtime is None else runtime.measured_bytes(measure)


def _on_registration(parent: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
    """Learns an attention layer's name and parent, which vLLM never tells its implementation."""
    from vllm_shadowkv.integration.impl import ShadowKVImpl

    attention: Any = module
    impl = getattr(attention, "impl", None)
    if isinstance(impl, ShadowKVImpl) and impl.layer_name is None:
        impl.layer_name = attention.layer_name
        impl.runtime.add_layer(parent, attention)


register_module_module_registration_hook(_on_registration)
