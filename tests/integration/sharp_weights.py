"""Random weights with which attention is sharp, for models of any architecture.

With the usual initialisation it is nearly flat, and no error shows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Standard deviation of what a projection of normalised states gives. Logits of attention come out with one near 5.
ATTENTION, RESIDUAL, OUTPUT, USUAL = 2.2, 6.0, 2.0, 0.3
OUTPUTS = ("lm_head.weight", "output_layer.weight", "embed_out.weight", "output.weight", "gate.weight")
EYES = ("visual", "vision", "projector")
PROJECTIONS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "query_key_value.weight")
PROJECTIONS += ("wq.weight", "wk.weight", "wv.weight")


def fill(name: str, values: Tensor, generator: torch.Generator, tied: bool) -> None:
    """Random weights of the width that their place in the model asks for."""
    random = torch.randn(values.shape, generator=generator)
    if name.endswith(".bias"):
        # Of what looks at images small, or all of them would look alike.
        values.copy_(random * (0.05 if any(part in name for part in EYES) else 0.5))
    elif name.endswith(("query_layernorm.weight", "key_layernorm.weight")):  # after RoPE, in HunYuan
        values.copy_(ATTENTION + random.clamp(-2, 2) * 0.8)
    elif name.endswith(("q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight")):
        values.add_(ATTENTION - 1 + random * 0.2)  # from 1 on, and where a model adds 1 itself from 0
    elif name.endswith("post_attention_layernorm.weight"):  # of what attention gives, in Gemma 3
        values.add_(2 + random * 0.1)
    elif name.endswith("sinks"):  # of the size that sums of e^logit have
        values.copy_(10 + random * 3)
    elif values.dim() == 1:  # of another norm
        values.add_(random * 0.1)
    elif name.endswith(OUTPUTS) or (tied and "embed" in name):
        values.copy_(random * OUTPUT / math.sqrt(values.shape[-1]))
    elif name.endswith(("o_proj.weight", "dense.weight", "self_attn.out_proj.weight", "wo.weight")):
        values.copy_(random * RESIDUAL / math.sqrt(values.shape[-1]))
    elif "self_att" in name or name.endswith(PROJECTIONS):
        values.copy_(random * ATTENTION / math.sqrt(values.shape[-1]))
    else:
        values.copy_(random * USUAL / math.sqrt(values.shape[-1]))
