"""A worker's memory over time: what it takes while vLLM measures, and what it binds when vLLM has allocated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vllm.platforms import current_platform

from vllm_shadowkv.integration.refusals import check_served
from vllm_shadowkv.integration.worker.bound import Bound, make_bound
from vllm_shadowkv.integration.worker.geometry import Geometry
from vllm_shadowkv.integration.worker.layers import Layers
from vllm_shadowkv.integration.worker.machine import bound_bytes
from vllm_shadowkv.integration.worker.metering import Metering
from vllm_shadowkv.state.capacity import Capacity
from vllm_shadowkv.state.decode import DecodeWorkspace
from vllm_shadowkv.state.low_rank import factorise, mix
from vllm_shadowkv.state.prefill import TILE_BLOCKS, TILES
from vllm_shadowkv.state.promised_memory import Promise
from vllm_shadowkv.state.seal import BLOCKS_AT_ONCE


class Memory:
    """The memory of one model in one worker."""

    def __init__(self, geometry: Geometry, layers: Layers, metering: Metering) -> None:
        """Takes nothing yet."""
        self._geometry, self._layers, self._metering = geometry, layers, metering
        self._workspace: DecodeWorkspace | None = None
        self._rehearsed = current_platform.is_cpu()  # where vLLM does not measure
        self._measuring = False
        self._bound: Bound | None = None
        self._bound_to: tuple[int, torch.Size] | None = None
        self._promise: Promise | None = None

    @property
    def capacity(self) -> Capacity:
        """What this worker's pool holds."""
        geometry = self._geometry
        return Capacity(geometry.layout, len(self._layers), geometry.boundary, geometry.slot_pages_per_request)

    def reserve(self, num_heads: int) -> None:
        """Takes the decode kernels' scratch memory, before vLLM measures how much is left for its KV cache.

        Args:
            num_heads: query heads of a layer.
        """
        geometry = self._geometry
        self._workspace = DecodeWorkspace(
            geometry.config,
            geometry.layout,
            num_heads,
            geometry.max_rows,
            geometry.boundary.max_sealed_blocks,
            torch.device(current_platform.device_type),
        )

    def rehearse(self, query: Tensor) -> None:
        """Takes, once, the memory of sealing and of a prefill over sealed blocks, while vLLM measures the peak.

        Args:
            query: of the largest step, `[tokens, Hq, D]`.
        """
        if self._rehearsed:
            return
        self._rehearsed = True
        layout = self._geometry.layout
        if layout.rank:
            keys = torch.zeros(
                BLOCKS_AT_ONCE, layout.block_size, layout.width, dtype=torch.float32, device=query.device
            )
            mix(factorise(keys, layout.rank), layout.leading_rank)
            del keys
        tiles = (TILES, TILE_BLOCKS, layout.block_size, layout.num_kv_heads, layout.head_size)
        _ = [torch.empty(tiles, dtype=layout.dtype, device=query.device) for _ in range(2)]
        _ += [torch.empty_like(query) for _ in range(3)]  # one part, another, and both merged

    def bound_bytes(self, available: int, server: str = "") -> int:
        """Bounds the bytes of the KV cache by what the host pool can back; see `machine.bound_bytes`."""
        geometry, self._promise = self._geometry, None
        bound, self._promise = bound_bytes(
            available, self.capacity, geometry.config.host_memory_gib, geometry.vllm_config, server
        )
        return bound

    def measured_bytes(self, measure: Callable[[], int], server: str) -> int:
        """Bytes of the KV cache: what vLLM measures, bounded.

        On CUDA it captures graphs to measure them, over a KV cache that it then throws away. No host pool is made for
        that one, and what was bound to it is let go before vLLM allocates the real one.

        Args:
            measure: vLLM's own.
            server: the same in all workers of a server.

        Raises:
            ValueError: no layer of the model is ours.
        """
        check_served(len(self._layers), self._geometry.vllm_config.parallel_config.pipeline_parallel_size)
        self._measuring = True
        try:
            available = measure()
        finally:
            self._measuring, self._bound, self._bound_to = False, None, None
            torch.cuda.empty_cache()  # vLLM has done so while this was still held; without CUDA it does nothing
        return self.bound_bytes(available, server)

    def bind(self) -> Bound:
        """The memory that vLLM has allocated, and ours beside it; made anew whenever vLLM has allocated anew.

        Raises:
            MemoryError: the host pool does not fit.
        """
        cache = self._layers.first.attention.kv_cache
        key = (cache.data_ptr(), cache.shape)
        if self._bound is None or self._bound_to != key:
            assert self._workspace is not None
            self._bound = None  # frees the old pool before the new one is measured
            self._bound = make_bound(
                self._layers.by_name,
                self._geometry.layout,
                self._geometry.boundary.resolve(cache.shape[0]),
                self._workspace,
                self._metering.of_pool(cache.shape[0], len(self._layers), cache.device),
                self._geometry.max_rows,
                throw_away=self._measuring,
            )
            self._bound_to = key
        return self._bound

    def bind_early(self) -> None:
        """Binds once all layers have their caches: the host pool takes its time at start-up, not of a request."""
        if not self._measuring and all(layer.has_cache for layer in self._layers.by_name.values()):
            self.bind()
