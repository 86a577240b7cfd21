"""How large queries are in each channel of a key, by which keys are weighed (docs/adr/0016)."""

import torch
from torch import Tensor

from vllm_shadowkv.rotary import Rotary, pairs

SMALLEST = 0.1
"""Of the mean scale. What the queries that were seen hardly look at, others may."""


def query_scales(mean_squares: Tensor, num_kv_heads: int, rotary: Rotary) -> Tensor:
    """Root mean squares of queries, relative to the mean of all channels.

    What a key has in a channel matters as much as the queries that meet it are large there. A pair of channels that
    RoPE turns has one scale, because a query meets keys of all positions: relative to the key it may have turned by any
    angle.

    Args:
        mean_squares: float `[Hq, D]`, means over tokens of squared queries, before or after RoPE.
        num_kv_heads: each of them is shared by as many query heads.
        rotary: the layer's rotation.

    Returns:
        fp32 `[Hkv * D]`, at least `SMALLEST`; 1 where the queries are all 0 or not all finite.
    """
    squares = mean_squares.float().unflatten(0, (num_kv_heads, -1)).mean(1)
    first, second = pairs(rotary, squares)
    mean = (first + second) / 2
    first.copy_(mean)
    second.copy_(mean)
    scales = squares.flatten().sqrt()
    usable = (scales.mean() > 0) & scales.isfinite().all()
    return torch.where(usable, (scales / scales.mean()).clamp_min(SMALLEST), 1)
