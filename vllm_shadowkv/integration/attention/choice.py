"""Which library attends over exact pages here."""

from __future__ import annotations

import logging

import torch
from vllm.platforms import current_platform

from vllm_shadowkv.integration.attention.library import AttentionLibrary
from vllm_shadowkv.page import PageLayout

logger = logging.getLogger("vllm.shadowkv")


def of_platform(layout: PageLayout, num_heads: int) -> AttentionLibrary:
    """For layers with these pages and `num_heads` query heads; another platform's modules need not import here.

    Raises:
        RuntimeError: there is none; one sentence.
    """
    if current_platform.is_cpu():
        from vllm_shadowkv.integration.attention.cpu import CpuAttention

        return CpuAttention(layout, num_heads)
    return of_cuda(layout, num_heads, torch.device(current_platform.device_type))


def of_cuda(layout: PageLayout, num_heads: int, device: torch.device) -> AttentionLibrary:
    """`of_platform` on CUDA."""
    try:
        from vllm_shadowkv.integration.attention.flash import FlashAttention

        return FlashAttention(layout, device)
    except ImportError as error:  # of a vLLM that was built without it, too
        from vllm_shadowkv.integration.attention.xformers import XformersAttention

        attention = XformersAttention(layout, num_heads, device)
        logger.warning("shadowkv computes prefills with xformers, which is slower: %s.", error)
        return attention
