"""A kernel in PyTorch in the place of xformers', which run on CUDA only; all above it is xformers' own.

It takes what xformers has validated, and refuses what neither of the two kernels that CUDA has would take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias, cutlass, flash
from xformers.ops.fmha.common import Context, Inputs

PADDED = 32
"""CUTLASS's kernel gives a log-sum-exp of a multiple of this."""


def install() -> None:
    """Makes xformers choose the kernel below."""
    fmha._dispatch_fw = lambda inputs, needs_gradient: Kernel


def reasons(operator: Any, inputs: Inputs) -> list[str]:
    """Why xformers' kernel would not take this on a CUDA device."""
    here = ("device=", "operator wasn't built", "bf16 is only supported on A100+")
    return [reason for reason in operator.not_supported_reasons(inputs) if not reason.startswith(here)]


class Kernel:
    """Stands where `xformers.ops.fmha.cutlass.FwOp` does."""

    @staticmethod
    def apply(inputs: Inputs, needs_gradient: bool) -> tuple[Tensor, Context]:
        """Output `[1, T, G, H, D]` and log-sum-exp `[1, G, H, T padded]`."""
        assert needs_gradient
        for operator in (cutlass.FwOp, flash.FwOp):
            if wrong := reasons(operator, inputs):
                raise NotImplementedError(f"{operator.NAME}: {wrong}")
        query, keys, values = (x[0].float().movedim(0, 2) for x in (inputs.query, inputs.key, inputs.value))
        logits = query @ keys.mT * inputs.scale_float
        if inputs.attn_bias is not None:
            assert isinstance(inputs.attn_bias, attn_bias.LowerTriangularFromBottomRightMask)
            logits = logits + inputs.attn_bias.materialize(logits.shape[-2:])
        lse = torch.full((*logits.shape[:2], -(-logits.shape[2] // PADDED) * PADDED), torch.inf)
        lse[..., : logits.shape[2]] = logits.logsumexp(-1)
        out = (logits.softmax(-1) @ values).movedim(2, 0).to(inputs.query.dtype)
        return out[None].contiguous(), Context(out=out, lse=lse[None])
