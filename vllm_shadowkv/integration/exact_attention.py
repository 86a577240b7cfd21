"""Which library attends over exact pages here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm_shadowkv.integration.cpu_attention import CpuAttention
    from vllm_shadowkv.integration.flash_attention import FlashAttention
    from vllm_shadowkv.integration.xformers_attention import XformersAttention
    from vllm_shadowkv.page import PageLayout

    CudaBackend = FlashAttention | XformersAttention
    ExactBackend = CpuAttention | CudaBackend

logger = logging.getLogger("vllm.shadowkv")


def of_platform(layout: PageLayout, num_heads: int) -> ExactBackend:
    """For layers with these pages and `num_heads` query heads; another platform's modules need not import here.

    Raises:
        RuntimeError: there is none; one sentence.
    """
    if current_platform.is_cpu():
        from vllm_shadowkv.integration.cpu_attention import CpuAttention

        return CpuAttention(layout, num_heads)
    return of_cuda(layout, num_heads, torch.device(current_platform.device_type))


def of_cuda(layout: PageLayout, num_heads: int, device: torch.device) -> CudaBackend:
    """`of_platform` on CUDA."""
    try:
        from vllm_shadowkv.integration.flash_attention import FlashAttention

        return FlashAttention(layout, device)
    except ImportError as error:  # of a vLLM that was built without it, too
        from vllm_shadowkv.integration.xformers_attention import XformersAttention

        attention = XformersAttention(layout, num_heads, device)
        logger.warning("shadowkv computes prefills with xformers, which is slower: %s.", error)
        return attention
