"""How large everything of a worker is: what the settings say, and what follows for the shape of the model's layers."""

from __future__ import annotations

import logging

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.integration.model.other_layers import may_have_layers_beside
from vllm_shadowkv.integration.refusals import check_cuda_shape, check_engine
from vllm_shadowkv.page import PageLayout, plan_page
from vllm_shadowkv.state.boundary import ExactBoundary

logger = logging.getLogger("vllm.shadowkv")


class Geometry:
    """Sizes of one model in one worker.

    Attributes:
        vllm_config: of the engine.
        config: the settings, checked.
        boundary: the rule of exact pages, with what is known so far of the pages beside them.
        layers_beside: the model has layers of other backends.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Reads and checks the settings.

        Raises:
            ValueError: a setting of ours or of the engine that does not work; one sentence.
        """
        self.vllm_config = vllm_config
        self.config = ShadowKVConfig.from_vllm(vllm_config.additional_config)
        check_engine(vllm_config, self.config)
        self._warn_of_small_pieces()
        # vLLM pads states to pages of so many tokens, and keeps some as far apart.
        if vllm_config.model_config.is_hybrid:
            vllm_config.cache_config.block_size = self.config.block_size
            vllm_config.cache_config.user_specified_block_size = True  # so it chooses no other
        self.boundary = ExactBoundary.of(
            self.config,
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.model_config.max_model_len,
            vllm_config.max_concurrent_batches,
        )
        self.layers_beside = may_have_layers_beside(vllm_config)
        self._shape: tuple[int, int, int, torch.dtype] | None = None
        self._layout: PageLayout | None = None

    def _warn_of_small_pieces(self) -> None:
        piece = self.vllm_config.scheduler_config.long_prefill_token_threshold
        if current_platform.is_cuda() and 0 < piece < self.config.block_size:
            logger.warning(
                "shadowkv: --long-prefill-token-threshold %d computes prompts in small pieces, and each brings the "
                "values of all sealed context before it over the link again; set it to %d or more.",
                piece,
                self.config.block_size,
            )

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
    def max_drafts(self) -> int:
        """Most tokens that speculative decoding drafts for a request and step."""
        speculative = self.vllm_config.speculative_config
        return speculative.num_speculative_tokens if speculative else 0

    @property
    def pages_are_zeroed(self) -> bool:
        """Whether vLLM zeroes pages that it gives away, between a step's scheduling and its planning.

        Known for certain once the model is built.
        """
        return self.layers_beside

    @property
    def saves_blocks(self) -> bool:
        """Whether a KV connector takes sealed blocks, as soon as the scheduler may think that they are."""
        return self.vllm_config.kv_transfer_config is not None

    @property
    def has_resident_pages(self) -> bool:
        """Whether exact pages of sealed blocks are of use until something is written to them.

        Other layers write to pages that they share with ours, and vLLM zeroes those, unseen by our epochs.
        """
        return self.config.resident_pages and not self.pages_are_zeroed

    @property
    def max_rows(self) -> int:
        """Most rows of a step, with what a graph pads it to."""
        graphs = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        return max(self.vllm_config.scheduler_config.max_num_seqs, graphs)

    def fit(self, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> bool:
        """Plans the page for a layer's shape; all layers must have the same one.

        Returns:
            Whether this is the first layer.

        Raises:
            ValueError: a shape that is not supported, or not that of the layers before.
        """
        shape = (num_heads, num_kv_heads, head_size, dtype)
        if self._shape is None:
            self._layout = plan_page(self.config, num_kv_heads, head_size, dtype)
            self._shape = shape
            if current_platform.is_cuda():
                check_cuda_shape(num_heads, num_kv_heads, self.slot_pages_per_request * self._layout.slots_per_page)
            self.boundary = self.boundary.beside(self.slot_pages_per_request)
            return True
        if shape != self._shape:
            raise ValueError(
                f"shadowkv needs equal attention layers, got (query heads, KV heads, head size, dtype) {shape} after "
                f"{self._shape}; use another --attention-backend for this model."
            )
        return False
