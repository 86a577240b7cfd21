"""Statistics of two backends that answered identical prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Flips:
    """How paired answers differ.

    Attributes:
        prompts: how many both answered.
        baseline, candidate: right answers of each.
        lost: right only with the baseline.
        won: right only with the candidate.
    """

    prompts: int
    baseline: int
    candidate: int
    lost: int
    won: int

    @classmethod
    def of(cls, baseline: Sequence[bool], candidate: Sequence[bool]) -> Flips:
        """Counts them; both sequences have one entry per prompt, in the same order."""
        pairs = list(zip(baseline, candidate, strict=True))
        return cls(
            len(pairs),
            sum(baseline),
            sum(candidate),
            sum(one and not other for one, other in pairs),
            sum(other and not one for one, other in pairs),
        )

    @property
    def points(self) -> float:
        """Percentage points that the candidate is above the baseline."""
        return 100 * (self.candidate - self.baseline) / self.prompts

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test, two-sided: how often equally likely losses and gains would be as lopsided."""
        flips, fewer = self.lost + self.won, min(self.lost, self.won)
        return min(1.0, 2 * sum(math.comb(flips, i) for i in range(fewer + 1)) / 2**flips)


def most_lost(prompts: int, rate: float, confidence: float = 0.999) -> int:
    """The bound of a guard: fewest losses that are not to be expected.

    Args:
        prompts: how many are asked.
        rate: share of them that a correct build is known to lose.
        confidence: how sure a failing guard is that something broke.

    Returns:
        The smallest n with P(losses <= n) >= confidence, for binomial losses.
    """
    below = 0.0
    for losses in range(prompts + 1):
        below += math.comb(prompts, losses) * rate**losses * (1 - rate) ** (prompts - losses)
        if below >= confidence:
            return losses
    return prompts


def divergence(baseline: Mapping[int, float], candidate: Mapping[int, float]) -> float:
    """Kullback-Leibler divergence of the candidate's next token from the baseline's, in nats.

    Args:
        baseline, candidate: log-probabilities of the likeliest tokens of each.

    Returns:
        That of the distributions over the tokens which both report, and all the others together. It is never above that
        of the full distributions, and equal to it where both report every token.
    """
    shared = baseline.keys() & candidate.keys()
    terms = [(math.exp(baseline[token]), math.exp(candidate[token])) for token in shared]
    terms.append(tuple(max(0.0, 1 - sum(side)) for side in zip(*terms, strict=True)) if terms else (1.0, 1.0))
    tiny = 1e-12
    return max(0.0, sum(p * math.log(p / max(q, tiny)) for p, q in terms if p > tiny))
