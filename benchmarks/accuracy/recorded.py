"""Keeps the distributions of the next token along forced tokens, over the whole vocabulary.

vLLM's own way, `logprobs=-1`, makes an object of every token of the vocabulary in every step, which takes longer than
the model does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams

from benchmarks.accuracy.forced import KEY, Forced


class Recorded(Forced):
    """`Forced`, which keeps what it sees; for an engine in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`)."""

    _seen: ClassVar[dict[tuple[int, ...], dict[int, Tensor]]] = {}

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Tensor], Tensor] | None:
        """The processor of one request, or None."""
        force = super().new_req_logits_processor(params)
        if force is None:
            return None
        # By place: a request that was preempted has another processor afterwards.
        steps = self._seen.setdefault(tuple((params.extra_args or {})[KEY]), {})

        def record(output_ids: list[int], logits: Tensor) -> Tensor:
            steps[len(output_ids)] = logits.float().log_softmax(-1)
            return force(output_ids, logits)

        return record

    @classmethod
    def take(cls, forced: list[int]) -> Tensor:
        """Log-probabilities along these tokens, float32 `[len(forced), vocabulary]`; they are not kept any longer."""
        steps = cls._seen.pop(tuple(forced))
        return torch.stack([steps[place] for place in range(len(forced))])
