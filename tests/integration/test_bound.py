"""When the host pool is made: with the KV cache, and not for one that vLLM throws away."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_refusals import runtime_of

from vllm_shadowkv.integration.pseudo_layers import SlotPages
from vllm_shadowkv.integration.worker.layers import Layer
from vllm_shadowkv.integration.worker.metering import Metering
from vllm_shadowkv.integration.worker.runtime import Runtime
from vllm_shadowkv.state.huge_pages import HUGE_PAGE


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    monkeypatch.setattr(Metering, "_make_meter", lambda self, *_: SimpleNamespace(num_blocks=0))
    made = runtime_of(monkeypatch)
    made.lay_out(num_heads=2, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    made.layers.by_name = {name: Layer(*(pseudo_layer(made) for _ in range(3))) for name in ("layers.0", "layers.1")}
    return made


def pseudo_layer(runtime: Runtime) -> SlotPages:
    layer = torch.nn.Module()
    layer.layer_name, layer.num_heads, layer.impl = "layer", 2, SimpleNamespace(runtime=runtime, sinks=None)  # type: ignore[assignment]
    return SlotPages(layer)


def give_caches(runtime: Runtime, num_blocks: int) -> None:
    """As vLLM does it: group by group, and the three layers share their pages."""
    layers, page_bytes = runtime.layers.by_name.values(), runtime.geometry.layout.page_bytes
    caches = [torch.zeros(num_blocks, 1, 1, page_bytes, dtype=torch.uint8) for _ in layers]
    for what in ("attention", "exact", "slots"):
        for layer, cache in zip(layers, caches, strict=True):
            assert runtime.memory._bound is None, "a layer has no cache yet"
            getattr(layer, what).bind_kv_cache(cache)


def take_caches(runtime: Runtime) -> None:
    for layer in runtime.layers.by_name.values():
        layer.attention.kv_cache = layer.exact.kv_cache = layer.slots.kv_cache = torch.tensor([])


def test_the_last_layers_cache_brings_the_host_pool(runtime: Runtime) -> None:
    give_caches(runtime, 6)
    assert runtime.memory._bound is not None
    for memory in runtime.memory._bound.memories.values():
        assert memory.host_pool.shape == (6, runtime.geometry.layout.value_row_bytes)
        assert memory.host_pool.is_contiguous()


def test_a_cache_to_measure_graphs_has_no_host_pool_and_is_let_go(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def measure(allocate: Callable[[], None]) -> int:
        allocate()
        bound = runtime.memory.bind()
        for memory in bound.memories.values():
            assert all(len(part) == 6 for part in runtime.geometry.layout.value_views(memory.host_pool))
            row, page = runtime.geometry.layout.value_row_bytes, HUGE_PAGE
            assert memory.host_pool.untyped_storage().nbytes() == row + page, "one row, which begins on a huge page"
            seen.extend((weakref.ref(memory.pages), weakref.ref(memory.host_pool)))
        take_caches(runtime)
        return 1 << 30

    assert runtime.memory.measured_bytes(functools.partial(measure, lambda: give_caches(runtime, 6)), "") <= 1 << 30
    gc.collect()
    assert seen
    assert not any(reference() is not None for reference in seen)
    give_caches(runtime, 9)
    assert all(len(memory.host_pool) == 9 for memory in runtime.memory.bind().memories.values())
    assert next(iter(runtime.memory.bind().memories.values())).host_pool.is_contiguous()


def test_a_measurement_that_fails_leaves_nothing_behind(runtime: Runtime) -> None:
    def measure() -> int:
        give_caches(runtime, 6)
        runtime.memory.bind()
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        runtime.memory.measured_bytes(measure, "")
    assert runtime.memory._bound is None
    take_caches(runtime)
    give_caches(runtime, 3)
    assert runtime.memory._bound is not None
