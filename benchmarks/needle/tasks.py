"""Retrieval tasks over a word-level vocabulary, each prompt a function of (family, length, seed).

A haystack is filler words with facts scattered in it; a question follows. The grammar:

    fact                    question             answer
    @ key v1 v2             ? key                key v1 v2               (a needle)
    @ key v1 v2 v3 v4       ? key                key v1 v2 v3 v4         (a long needle)
    # x y                   ! x                  x y z w u               (four hops)
    @ key v1 v2             & a b c d ? a        a v1 v2 b v1 v2 c v1 v2 d v1 v2
    @ key v1 v2, later      ? key                key w1 w2               (what was written last)
    @ key w1 w2

Every answer starts with an echo of the key. A server computes the first output token during
prefill, so without the echo the first value would never pass through the decode path.
"""

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

NUM_SPECIAL, NUM_KEYS, NUM_VALUES, NUM_FILLER = 16, 512, 256, 256
_NAMED = ["<pad>", "<s>", "</s>", "<unk>", "@", "#", "?", "!", "&"]
VOCAB: list[str] = (
    _NAMED
    + [f"<r{i}>" for i in range(len(_NAMED), NUM_SPECIAL)]
    + [f"k{i}" for i in range(NUM_KEYS)]
    + [f"v{i}" for i in range(NUM_VALUES)]
    + [f"w{i}" for i in range(NUM_FILLER)]
)
TOKEN_ID: dict[str, int] = {word: i for i, word in enumerate(VOCAB)}
KEYS = range(NUM_SPECIAL, NUM_SPECIAL + NUM_KEYS)
VALUES = range(KEYS.stop, KEYS.stop + NUM_VALUES)
FILLER = range(VALUES.stop, VALUES.stop + NUM_FILLER)
NEEDLE, ASSIGN, ASK, TRACE, LIST = (TOKEN_ID[w] for w in "@#?!&")

HOPS = 4
QUERIES = 4
QUESTION = -1
"""Stands for the question itself where a source would name a fact."""

FAMILIES = (
    "single",
    "multi_key",
    "mixed",
    "variable_tracking",
    "multi_value",
    "multi_query",
    "overwritten",
)


@dataclass(frozen=True)
class Prompt:
    """One question about one haystack, with its only right answer."""

    token_ids: list[int]
    text: str
    answer_ids: list[int]
    answer: str


class Question(NamedTuple):
    """A question, its answer, and where each answer token stands: (fact or QUESTION, offset)."""

    ask: list[int]
    answer: list[int]
    sources: list[tuple[int, int]]


class Draw(NamedTuple):
    """Facts and every question that can be asked about them."""

    facts: list[list[int]]
    questions: list[Question]
    run: int = 1
    """Facts come in runs of so many whose order in the haystack matters; otherwise they are in no particular order."""


def make_prompt(family: str, num_tokens: int, seed: int) -> Prompt:
    """Makes the prompt of exactly `num_tokens` tokens that belongs to these three arguments.

    Args:
        family: one of FAMILIES.
        num_tokens: length of the prompt, the question included, at least 64.
        seed: any integer.

    Raises:
        ValueError: the family is unknown or the prompt too short for its facts.
    """
    return make_prompts(family, num_tokens, seed, 1)[0]


def make_prompts(family: str, num_tokens: int, seed: int, count: int) -> list[Prompt]:
    """Makes up to `count` prompts that ask different questions about one haystack.

    Args:
        family, num_tokens, seed: as for `make_prompt`, whose prompt is the first one.
        count: most prompts; a haystack with fewer facts has fewer questions.

    Raises:
        ValueError: as `make_prompt`.
    """
    if num_tokens < 64:
        raise ValueError(f"num_tokens must be at least 64, got {num_tokens}")
    rng = random.Random(f"eval/{family}/{num_tokens}/{seed}")
    draw = draw_facts(family, num_tokens, rng)
    first = rng.choice(draw.questions)
    haystack, _ = scatter(draw, num_tokens - len(first.ask), rng)
    # Questions of one family are equally long, so every prompt has its length.
    others = [question for question in draw.questions if question is not first]
    questions = [first, *rng.sample(others, min(count - 1, len(others)))]
    return [
        Prompt(
            haystack + question.ask, detokenize(haystack + question.ask), question.answer, detokenize(question.answer)
        )
        for question in questions
    ]


def draw_facts(family: str, num_tokens: int, rng: random.Random, density: float = 1.0) -> Draw:
    """Draws the facts of a family for a haystack of about `num_tokens` tokens.

    Args:
        family: one of FAMILIES.
        num_tokens: what the number of facts grows with.
        rng: the source of every choice.
        density: share of the family's usual number of facts, in (0, 1]; at least one is kept.
    """

    def count(per_tokens: int, most: int) -> int:
        return max(1, round(density * min(most, num_tokens // per_tokens)))

    keys = rng.sample(KEYS, NUM_KEYS)
    if family == "single":
        return _needles(keys[:1], 2, rng)
    if family == "multi_key":
        return _needles(keys[: count(8, 480)], 2, rng)
    if family == "multi_value":
        return _needles(keys[: count(12, 480)], 4, rng)
    if family == "variable_tracking":
        return _chains(keys, count(64, 96))
    if family == "mixed":
        needles = _needles(keys[: count(16, 240)], 2, rng)
        chains = _chains(keys[len(needles.facts) :], count(128, 48))
        return _join(needles, chains)
    if family == "overwritten":
        return _overwritten(keys[: count(16, 240)], rng)
    if family == "multi_query":
        num_needles = max(QUERIES, count(8, 480))
        return _queries(_needles(keys[:num_needles], 2, rng), rng)
    raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")


def scatter(draw: Draw, num_tokens: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Spreads a draw's facts over filler; returns the haystack and where each fact starts in it."""
    facts = draw.facts
    num_filler = num_tokens - sum(map(len, facts))
    if num_filler < 0:
        raise ValueError(f"facts need {num_tokens - num_filler} tokens, got room for {num_tokens}")
    order = list(range(len(facts))) + [-1] * num_filler
    rng.shuffle(order)
    if draw.run > 1:
        places = [order.index(fact) for fact in range(len(facts))]
        for start in range(0, len(facts), draw.run):
            for fact, place in enumerate(sorted(places[start : start + draw.run]), start):
                order[place] = fact
    filler = iter(rng.choices(FILLER, k=num_filler))
    haystack: list[int] = []
    starts = [0] * len(facts)
    for item in order:
        if item < 0:
            haystack.append(next(filler))
        else:
            starts[item] = len(haystack)
            haystack += facts[item]
    return haystack, starts


def detokenize(token_ids: list[int]) -> str:
    """The text of token ids: their words with one space between."""
    return " ".join(VOCAB[i] for i in token_ids)


def _needles(keys: list[int], num_values: int, rng: random.Random) -> Draw:
    facts, questions = [], []
    for i, key in enumerate(keys):
        values = rng.sample(VALUES, num_values)
        facts.append([NEEDLE, key, *values])
        sources = [(QUESTION, 1), *((i, 2 + j) for j in range(num_values))]
        questions.append(Question([ASK, key], [key, *values], sources))
    return Draw(facts, questions)


def _overwritten(keys: list[int], rng: random.Random) -> Draw:
    """Every key is written twice; only a model that knows what came later can answer."""
    facts, questions = [], []
    for i, key in enumerate(keys):
        values = rng.sample(VALUES, 4)
        facts += [[NEEDLE, key, *values[:2]], [NEEDLE, key, *values[2:]]]
        sources = [(QUESTION, 1), (2 * i + 1, 2), (2 * i + 1, 3)]
        questions.append(Question([ASK, key], [key, *values[2:]], sources))
    return Draw(facts, questions, run=2)


def _chains(keys: list[int], num_chains: int) -> Draw:
    facts, questions = [], []
    for c in range(num_chains):
        chain = keys[c * (HOPS + 1) : (c + 1) * (HOPS + 1)]
        sources = [(QUESTION, 1), *((c * HOPS + hop, 2) for hop in range(HOPS))]
        facts += [[ASSIGN, x, y] for x, y in pairwise(chain)]
        questions.append(Question([TRACE, chain[0]], chain, sources))
    return Draw(facts, questions)


def _join(first: Draw, second: Draw) -> Draw:
    """Both draws' facts; questions alternate so that either kind is asked equally often."""
    shift = len(first.facts)
    shifted = [
        q._replace(sources=[(f if f == QUESTION else f + shift, at) for f, at in q.sources]) for q in second.questions
    ]
    few = min(len(first.questions), len(shifted))
    return Draw(first.facts + second.facts, first.questions[:few] + shifted[:few])


def _queries(needles: Draw, rng: random.Random) -> Draw:
    """Questions for QUERIES needles at a time, each needle asked for once."""
    singles = rng.sample(needles.questions, len(needles.questions))
    questions = []
    for i in range(0, len(singles) - QUERIES + 1, QUERIES):
        group = singles[i : i + QUERIES]
        keys = [q.answer[0] for q in group]
        answer = [token for q in group for token in q.answer]
        sources = [source for q in group for source in q.sources]
        for j in range(QUERIES):
            sources[j * len(group[0].answer)] = (QUESTION, 1 + j)
        questions.append(Question([LIST, *keys, ASK, keys[0]], answer, sources))
    return Draw(needles.facts, questions)
