"""Makes a request decode given tokens, by vLLM's seam for logits processors.

So a backend's next-token distributions can be read along another backend's trajectory, through its decode steps. vLLM
reports log-probabilities from before any processor, so they stay the model's own. For a server:
`vllm serve MODEL --logits-processors benchmarks.accuracy.forced:Forced`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

KEY = "forced_token_ids"
"""In a request's `extra_args`, or `vllm_xargs` of the API."""


class Forced(AdapterLogitsProcessor):
    """Leaves a request that has `forced_token_ids` one choice per step; others are left alone."""

    def is_argmax_invariant(self) -> bool:
        """No: it decides the token."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Tensor], Tensor] | None:
        """The processor of one request, or None."""
        forced = (params.extra_args or {}).get(KEY)
        if not forced:
            return None

        def force(output_ids: list[int], logits: Tensor) -> Tensor:
            if len(output_ids) < len(forced):
                token = int(forced[len(output_ids)])
                logits.fill_(-float("inf"))
                logits[token] = 0.0
            return logits

        return force
