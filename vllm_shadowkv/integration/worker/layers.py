"""A worker's attention layers: their rotation, and the specs of the KV cache that they ask vLLM for."""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform

from vllm_shadowkv.integration.model.other_layers import foreign_pages, spec_dtype
from vllm_shadowkv.integration.model.rope import rotary_of, weight_after
from vllm_shadowkv.integration.refusals import check_positions
from vllm_shadowkv.integration.specs import ShadowSpec
from vllm_shadowkv.integration.worker.geometry import Geometry
from vllm_shadowkv.rotary import Rotary
from vllm_shadowkv.state.huge_pages import copy_in_huge_pages


@dataclass
class Layer:
    """An attention layer and its pseudo-layers, which vLLM owns, and what is known of its keys."""

    attention: Any
    exact: Any
    slots: Any
    rotary: Rotary = dataclasses.field(default_factory=Rotary.identity)
    cos_sin: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, 0))
    query_scales: Tensor | None = None

    @property
    def has_cache(self) -> bool:
        """Whether all three have their views of the same new pages."""
        caches = [layer.kv_cache for layer in (self.attention, self.exact, self.slots)]
        return caches[0].numel() > 0 and len({cache.data_ptr() for cache in caches}) == 1


class Layers:
    """The layers of one model in one worker that the backend serves.

    Attributes:
        by_name: in the order in which the model was built.
        seen: means of squared queries by layer, `[Hq, D]`, while somebody looks at them (`probe.py`); None: nobody.
    """

    def __init__(self, geometry: Geometry) -> None:
        """None yet."""
        self.by_name: dict[str, Layer] = {}
        self.seen: dict[str, Tensor] | None = None
        self._geometry = geometry
        self._parents: dict[str, weakref.ref[torch.nn.Module]] = {}

    def __len__(self) -> int:
        return len(self.by_name)

    @property
    def first(self) -> Layer:
        """The model's first layer."""
        return next(iter(self.by_name.values()))

    def add(self, parent: torch.nn.Module, layer: Layer) -> None:
        """Takes in a layer when its module is attached to its parent; vLLM finds the pseudo-layers from now on."""
        context = self._geometry.vllm_config.compilation_config.static_forward_context
        for pseudo in (layer.exact, layer.slots):
            context[pseudo.layer_name] = pseudo
        name = layer.attention.layer_name
        self._parents[name] = weakref.ref(parent)
        self.by_name[name] = layer

    def read_rotary(self, name: str) -> None:
        """Reads a layer's rotation, and what else happens to its keys; its parent is complete once weights are loaded.

        Raises:
            ValueError: a rotation, or a use of it, that is not supported.
            RuntimeError: the layer was never attached to a module.
        """
        layer = self.by_name.get(name)
        if layer is None:
            raise RuntimeError(f"shadowkv: the attention layer {name} was not attached to a module.")
        parent = self._parents[name]()
        assert parent is not None
        device = torch.device(current_platform.device_type)
        geometry = self._geometry
        layer.rotary = rotary_of(parent, name, geometry.layout.head_size, device, geometry.boundary.max_model_len)
        layer.attention.impl.key_weight = weight_after(parent)
        table = layer.rotary.cos_sin
        if table is not None:
            check_positions(len(table), geometry.boundary.max_model_len)
        if table is not None and not layer.cos_sin.numel():
            known = (other.cos_sin for other in self.by_name.values() if other.rotary.cos_sin is table)
            same = next((other for other in known if other.numel()), None)
            rows = table[: geometry.boundary.max_model_len]  # M-RoPE's table is for positions in videos too
            layer.cos_sin = copy_in_huge_pages(rows, torch.float32) if same is None else same
            # vLLM's sleep mode of level 2 brings back the model's buffers, and nothing else that was made with them.
            layer.attention.register_buffer("shadowkv_table", table, persistent=False)
            layer.attention.register_buffer("shadowkv_cos_sin", layer.cos_sin, persistent=False)

    def shadow_spec(self, spec: Any) -> ShadowSpec:
        """The shadow spec in place of vLLM's full-attention spec of a layer."""
        geometry = self._geometry
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.init}
        fields |= {"block_size": geometry.layout.block_size, "dtype": spec_dtype(spec.dtype, geometry.pages_are_zeroed)}
        return ShadowSpec(**fields, shadow_page_bytes=geometry.layout.page_bytes)

    def token_spec(self, spec: Any) -> Any:
        """Vllm's full-attention spec of one token, with the bytes that a sealed one takes."""
        layout = self._geometry.layout
        token_bytes = layout.page_bytes // layout.block_size
        return dataclasses.replace(spec, num_head_slots=1, tokens_per_state=1, state_content_bytes=token_bytes)

    def spec_fields(self, layer: Any) -> dict[str, Any]:
        """What the specs of a layer's pseudo-layers share. All layers are built by now, those of other backends too."""
        geometry = self._geometry
        ours = {name for one in self.by_name.values() for name in (one.exact.layer_name, one.slots.layer_name)}
        ours |= self.by_name.keys()
        foreign = foreign_pages(geometry.vllm_config, geometry.layout, ours, len(self))
        geometry.boundary = geometry.boundary.beside(geometry.slot_pages_per_request, foreign)
        return {
            "num_kv_heads": layer.num_kv_heads,
            "head_size": layer.head_size,
            "dtype": spec_dtype(layer.kv_cache_torch_dtype, geometry.pages_are_zeroed),
            "boundary": geometry.boundary,
        }
