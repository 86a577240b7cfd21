"""The exact boundary: from which token on a request's keys and values are exact.

The manager in the scheduler frees exact pages by it, the metadata builder in the worker reads by it. Both must come to
the same answer from what each of them knows, so it is one function.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_shadowkv.config import ShadowKVConfig

MOST_DEFAULT_PREFILL_TOKENS = 16_384
"""A prompt's exact pages must fit beside all decoding requests, so a wide window costs requests: with twice this window
a pool of 64 GiB holds a request of 122,880 tokens less (tests/integration/test_capacity.py)."""


@dataclass(frozen=True)
class ExactBoundary:
    """The rule of the exact boundary. Lengths are in tokens.

    Attributes:
        block_size: tokens of a sealed block.
        exact_tokens: tokens of an exact page.
        dense_threshold: a request with fewer computed tokens is exact from its prefix hit on.
        prefill_exact_tokens: newest tokens kept exact while the prompt is computed; None: not yet resolved.
        decode_exact_tokens: newest tokens kept exact afterwards, beyond those of the open block.
        max_step_tokens: most tokens that one request can compute in one step.
        max_model_len: longest request.
        steps_in_flight: steps scheduled before the output of the first is known; 2 with asynchronous scheduling.
        other_pages: pages that the longest request needs beside the exact ones, and the null block.
    """

    block_size: int
    exact_tokens: int
    dense_threshold: int
    prefill_exact_tokens: int | None
    decode_exact_tokens: int
    max_step_tokens: int
    max_model_len: int
    steps_in_flight: int = 1
    other_pages: int = 0

    @classmethod
    def of(
        cls, config: ShadowKVConfig, max_step_tokens: int, max_model_len: int, steps_in_flight: int = 1
    ) -> ExactBoundary:
        """The rule that the settings ask for."""
        return cls(
            block_size=config.block_size,
            exact_tokens=config.exact_tokens_per_page,
            dense_threshold=config.dense_threshold,
            prefill_exact_tokens=config.prefill_exact_tokens,
            decode_exact_tokens=config.decode_exact_tokens,
            max_step_tokens=min(max_step_tokens, max_model_len),
            max_model_len=max_model_len,
            steps_in_flight=steps_in_flight,
        )

    def beside(self, slot_pages: int, foreign_pages: int = 0) -> ExactBoundary:
        """Counts what the longest request holds beside its exact pages: sealed blocks, slots, and the null block.

        Args:
            slot_pages: of a request.
            foreign_pages: what layers of other backends hold of the same pool.
        """
        return replace(self, other_pages=self.max_sealed_blocks + slot_pages + foreign_pages + 1)

    def of_length(self, max_model_len: int) -> ExactBoundary:
        """The rule where requests are at most so long; what is beside their exact pages shrinks by sealed blocks."""
        shorter = replace(self, max_model_len=max_model_len, max_step_tokens=min(self.max_step_tokens, max_model_len))
        return replace(shorter, other_pages=self.other_pages - self.max_sealed_blocks + shorter.max_sealed_blocks)

    def fit(self, num_blocks: int) -> ExactBoundary:
        """The rule for the longest requests that a pool of this size holds, which --max-model-len auto asks for."""
        if self.min_blocks <= num_blocks:
            return self
        lengths = range(1, self.max_model_len)
        longest = bisect.bisect_right(lengths, num_blocks, key=lambda length: self.of_length(length).min_blocks)
        return self.of_length(max(longest, 1))

    def resolve(self, num_blocks: int) -> ExactBoundary:
        """Fits the longest request, and sets a prefill window that was left open.

        It is `MOST_DEFAULT_PREFILL_TOKENS`, or less where half of the pool or what the longest request leaves is less.

        Args:
            num_blocks: blocks of the pool.

        Returns:
            The rule with `prefill_exact_tokens` set.
        """
        rule = self.fit(num_blocks)
        if rule.prefill_exact_tokens is not None:
            return rule
        tokens = min(num_blocks // 2, num_blocks - rule.other_pages) * rule.exact_tokens - rule._slack
        window = min(max(tokens, 0), rule.max_model_len, MOST_DEFAULT_PREFILL_TOKENS)
        return replace(rule, prefill_exact_tokens=window // rule.block_size * rule.block_size)

    def exact_start(self, computed: int, prefilling: bool, hit: int = 0) -> int:
        """First exact token of a request.

        Args:
            computed: tokens computed before this step.
            prefilling: whether this step still computes the prompt.
            hit: tokens of the prefix-cache hit, which have no exact pages; a multiple of `block_size`.

        Returns:
            A multiple of `block_size`, at least `hit` and at most `computed` rounded down to a block.
        """
        if computed < self.dense_threshold:
            return hit
        assert self.prefill_exact_tokens is not None, "resolve() comes first"
        window = self.decode_exact_tokens
        if prefilling:  # not less than decode will want, for what has been freed does not come back
            window = max(window, self.prefill_exact_tokens)
        return max((computed - window) // self.block_size * self.block_size, hit)

    def exact_starts(self, computed: Tensor, prefilling: Tensor, hit: Tensor) -> Tensor:
        """`exact_start` of many requests, on any device.

        Args:
            computed: int32 `[n]`.
            prefilling: bool `[n]`.
            hit: int32 `[n]`.

        Returns:
            int32 `[n]`.
        """
        assert self.prefill_exact_tokens is not None, "resolve() comes first"
        window = torch.where(
            prefilling, max(self.decode_exact_tokens, self.prefill_exact_tokens), self.decode_exact_tokens
        )
        start = (computed - window).div(self.block_size, rounding_mode="floor") * self.block_size
        return torch.where(computed < self.dense_threshold, hit, torch.maximum(start, hit)).int()

    def reads_sealed(self, num_tokens: int, hit: int) -> bool:
        """Whether a request may attend to sealed blocks in a step that ends at `num_tokens`."""
        return hit > 0 or num_tokens > max(self.dense_threshold, self.block_size)

    @property
    def min_blocks(self) -> int:
        """Blocks without which the longest request cannot be served, the null block included."""
        return self.max_exact_pages + self.other_pages

    @property
    def max_sealed_blocks(self) -> int:
        """Shadow pages of the longest request, its open block's included."""
        return -(-self.max_model_len // self.block_size)

    @property
    def max_exact_pages(self) -> int:
        """Most exact pages that one request can hold, with `prefill_exact_tokens` as low as it may be resolved."""
        window = max(self.prefill_exact_tokens or 0, self.dense_threshold, self.decode_exact_tokens)
        tokens = min(window + self._slack, self.max_model_len)
        return -(-tokens // self.exact_tokens)

    @property
    def _slack(self) -> int:
        """Exact tokens beside the window: the steps in flight, the one whose freeing lags, and two cut blocks."""
        return (self.steps_in_flight + 1) * self.max_step_tokens + 2 * self.block_size
