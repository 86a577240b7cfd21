"""Training batches: one haystack and many questions in every sequence."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from .tasks import QUESTION, draw_facts, scatter


class Mix(NamedTuple):
    """What the sequences of a batch are about."""

    family_weights: dict[str, int]
    sparse_share: float
    """Share of the sequences whose haystack holds only a few facts."""
    least_density: float
    """Of the other sequences, see `draw_facts`."""
    asked_share: float
    """Most of a sequence that its questions and answers take."""


BROAD = Mix(
    {"single": 1, "multi_key": 5, "mixed": 4, "variable_tracking": 5, "multi_value": 3, "multi_query": 4},
    sparse_share=0.35,
    least_density=0.3,
    asked_share=1 / 3,
)
SETTLED = BROAD._replace(family_weights=BROAD.family_weights | {"overwritten": 5})
HARD = Mix(
    {
        "single": 1,
        "multi_key": 5,
        "mixed": 4,
        "variable_tracking": 4,
        "multi_value": 8,
        "multi_query": 6,
        "overwritten": 4,
    },
    sparse_share=0.15,
    least_density=0.7,
    asked_share=1 / 4,
)


class Batch(NamedTuple):
    """B sequences of T tokens with up to Q answer tokens each; all int64.

    Where a sequence has fewer than Q answer tokens, `targets` is -100 and `sources` is -1.
    """

    token_ids: Tensor
    """[B, T]"""
    positions: Tensor
    """[B, T], with gaps if the batch was made with a `span`"""
    wanted: Tensor
    """[B, Q], the index whose output is to be the target"""
    targets: Tensor
    """[B, Q]"""
    sources: Tensor
    """[B, Q], the index where the target stands in the sequence; -1 for the echoed first key"""


def make_batch(batch_size: int, num_tokens: int, max_questions: int, span: int, mix: Mix, rng: random.Random) -> Batch:
    """Makes a batch of the training distribution.

    Args:
        batch_size: sequences, B.
        num_tokens: length of each, T.
        max_questions: most questions a sequence asks; fewer where they do not fit or are not there.
        mix: what they are about.
        rng: the source of every choice.
        span: the last position is drawn from [num_tokens, span]; what exceeds num_tokens goes
            into three gaps, so that distances are learned that no sequence is long enough for.
    """
    sequences = [_sequence(num_tokens, max_questions, mix, rng) for _ in range(batch_size)]
    most = max(len(wanted) for _, wanted, _, _ in sequences)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (most - len(row)) for row in rows])

    token_ids, wanted, targets, sources = zip(*sequences, strict=True)
    return Batch(
        torch.tensor(token_ids),
        torch.stack([_positions(num_tokens, span, rng) for _ in sequences]),
        padded(wanted, 0),
        padded(targets, -100),
        padded(sources, -1),
    )


def _positions(num_tokens: int, span: int, rng: random.Random) -> Tensor:
    positions = torch.arange(num_tokens)
    extra = rng.randint(0, span - num_tokens)
    for share in (0.5, 0.3, 0.2):
        positions[rng.randrange(num_tokens) :] += int(extra * share)
    return positions


def _sequence(
    num_tokens: int, max_questions: int, mix: Mix, rng: random.Random
) -> tuple[list[int], list[int], list[int], list[int]]:
    family = rng.choices(list(mix.family_weights), list(mix.family_weights.values()))[0]
    sparse = rng.random() < mix.sparse_share
    density = rng.uniform(0.0, 0.1) if sparse else rng.uniform(mix.least_density, 1.0)
    room = int(num_tokens * mix.asked_share)
    draw = draw_facts(family, num_tokens - room, rng, density)
    asked = []
    for question in rng.sample(draw.questions, min(max_questions, len(draw.questions))):
        room -= len(question.ask) + len(question.answer)
        if room < 0:
            break
        asked.append(question)

    asked_tokens = sum(len(q.ask) + len(q.answer) for q in asked)
    tokens, starts = scatter(draw, num_tokens - asked_tokens, rng)
    wanted, targets, sources = [], [], []
    for question in asked:
        begin = len(tokens)
        tokens += question.ask
        wanted += range(len(tokens) - 1, len(tokens) - 1 + len(question.answer))
        tokens += question.answer
        targets += question.answer
        at = [(begin if f == QUESTION else starts[f]) + offset for f, offset in question.sources]
        sources += [-1, *at[1:]]
    return tokens, wanted, targets, sources
