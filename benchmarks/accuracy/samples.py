"""What is asked: a context, a question about it, and the answer where it is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.needle.tasks import FAMILIES, make_prompts


@dataclass(frozen=True)
class Sample:
    """One question; a prompt is the context's tokens followed by the question's.

    Attributes:
        name: unique within a set.
        family: what results are grouped by.
        context: token ids, shared by neighbouring samples where they ask about the same thing.
        question: token ids.
        max_tokens: of the answer.
        answer: its token ids, where only one is right; otherwise None.
    """

    name: str
    family: str
    context: list[int]
    question: list[int]
    max_tokens: int
    answer: list[int] | None


def needles(num_tokens: int, haystacks: int, questions: int, families: tuple[str, ...] = FAMILIES) -> Iterator[Sample]:
    """`haystacks * questions` prompts of `num_tokens` tokens of every family of the needle model.

    Families take turns, so that a run that was cut short has some of each. A haystack of `single` holds one fact: there
    every question has a haystack of its own.
    """
    first_seed = 3_000_000  # beyond those of training, evaluation and the tests
    for haystack in range(haystacks):
        for family in families:
            asked, tries = 0, 0
            while asked < questions:
                seed = first_seed + haystack * questions + tries
                tries += 1
                for prompt in make_prompts(family, num_tokens, seed, questions - asked):
                    split = len(prompt.token_ids) - (6 if family == "multi_query" else 2)
                    yield Sample(
                        f"{family}-{num_tokens}-{haystack}-{asked}",
                        family,
                        prompt.token_ids[:split],
                        prompt.token_ids[split:],
                        len(prompt.answer_ids),
                        prompt.answer_ids,
                    )
                    asked += 1


def from_json_lines(path: Path, model: str, max_tokens: int) -> Iterator[Sample]:
    """Any other questions: lines `{"context": str, "question": str, "family"?: str, "max_tokens"?: int}`.

    The texts are tokenised apart, and only the context with the tokenizer's special tokens. A chat template is the
    file's business.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    for number, line in enumerate(path.read_text().splitlines()):
        item = json.loads(line)
        yield Sample(
            f"{path.stem}-{number}",
            item.get("family", path.stem),
            tokenizer(item["context"])["input_ids"],
            tokenizer(item["question"], add_special_tokens=False)["input_ids"],
            item.get("max_tokens", max_tokens),
            None,
        )
