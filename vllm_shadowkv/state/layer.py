"""The memory of one attention layer, as the algorithm sees it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.rotary import Rotary


@dataclass(frozen=True)
class LayerMemory:
    """One layer's pages and host pool. N is the number of blocks.

    Attributes:
        layout: of the pages.
        rotary: the layer's rotation.
        cos_sin: fp32 `[max_position, rotary_dim]`, the rotation's table as kernels take it; no columns without RoPE.
        pages: uint8 `[N, page_bytes]`, the shadow group's view of the pool.
        exact_pages: uint8 `[N, page_bytes]`, the exact group's view.
        slot_pages: uint8 `[N, page_bytes]`, the slots group's view.
        host_pool: uint8 `[N, value_row_bytes]`.
        query_scales: fp32 `[Hkv * D]`, of `query_scales.py`; None: 1.
        sinks: float `[Hq]`, logits of keys whose values are nothing, which every query of a head sees; None: there are
            none.
    """

    layout: PageLayout
    rotary: Rotary
    cos_sin: Tensor
    pages: Tensor
    exact_pages: Tensor
    slot_pages: Tensor
    host_pool: Tensor
    query_scales: Tensor | None = None
    sinks: Tensor | None = None

    @cached_property
    def exact_views(self) -> tuple[Tensor, Tensor]:
        """K and V of the exact pages; see `PageLayout.exact_views`."""
        return self.layout.exact_views(self.exact_pages)

    def gather_exact(self, exact_row: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Copies of K and V of tokens `[start, end)` of one request, each contiguous `[end - start, Hkv, D]`.

        Args:
            exact_row: int32 `[max_pages]`, its exact pages.
            start: a multiple of a page's tokens.
            end: beyond the last token.
        """
        size = self.layout.exact_tokens
        pages = exact_row[start // size : -(-end // size)].long()
        # Gathering keeps the views' strides, and the libraries' kernels take the last dimension to be contiguous.
        keys, values = (
            view[pages].transpose(1, 2).flatten(0, 1)[: end - start].contiguous() for view in self.exact_views
        )
        return keys, values
