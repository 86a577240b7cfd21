from itertools import pairwise

import pytest

from benchmarks.needle.tasks import FAMILIES, HOPS, TOKEN_ID, VOCAB, Prompt, make_prompt

LENGTHS = (64, 1000, 4096)
# One prompt of this family never changes: an accuracy is only comparable on the same prompts.
PINNED = (
    "variable_tracking",
    64,
    7,
    "k508 k136 k384 k50 k445",
)


def solve(prompt: Prompt) -> str:
    """Answers by the rules of the grammar, from nothing but the text."""
    words = prompt.text.split()
    needles: dict[str, list[str]] = {}
    assigned: dict[str, str] = {}
    written: dict[str, int] = {}
    for i, word in enumerate(words):
        if word == "@":
            values = []
            for value in words[i + 2 : i + 6]:
                if not value.startswith("v"):
                    break
                values.append(value)
            written[words[i + 1]] = written.get(words[i + 1], 0) + 1
            needles[words[i + 1]] = values
        if word == "#":
            assert words[i + 1] not in assigned, "a variable is assigned once"
            assigned[words[i + 1]] = words[i + 2]

    assert len(set(written.values())) <= 1, "every key is written equally often"
    if "&" in words:
        listed = words[words.index("&") + 1 : words.index("?")]
        assert words[-1] == listed[0]
        return " ".join(word for key in listed for word in (key, *needles[key]))
    kind, key = words[-2:]
    if kind == "?":
        return " ".join((key, *needles[key]))
    assert kind == "!"
    trace = [key]
    for _ in range(HOPS):
        trace.append(assigned[trace[-1]])
    return " ".join(trace)


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answer_follows_from_the_prompt(family: str, num_tokens: int) -> None:
    for seed in range(20):
        prompt = make_prompt(family, num_tokens, seed)
        assert solve(prompt) == prompt.answer


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_length_is_exact_and_text_matches_ids(family: str, num_tokens: int) -> None:
    prompt = make_prompt(family, num_tokens, 3)
    assert len(prompt.token_ids) == num_tokens
    assert [TOKEN_ID[word] for word in prompt.text.split(" ")] == prompt.token_ids
    assert [TOKEN_ID[word] for word in prompt.answer.split(" ")] == prompt.answer_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_starts_with_the_last_token_of_the_prompt(family: str) -> None:
    prompt = make_prompt(family, 256, 0)
    assert prompt.answer_ids[0] == prompt.token_ids[-1]
    assert len(prompt.answer_ids) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_a_function_of_its_arguments(family: str) -> None:
    assert make_prompt(family, 512, 5) == make_prompt(family, 512, 5)
    assert make_prompt(family, 512, 5) != make_prompt(family, 512, 6)
    assert make_prompt(family, 512, 5).text not in make_prompt(family, 513, 5).text


def test_families_differ_at_the_same_seed() -> None:
    prompts = {make_prompt(family, 512, 0).text for family in FAMILIES}
    assert len(prompts) == len(FAMILIES)


def test_prompts_never_change() -> None:
    family, num_tokens, seed, answer = PINNED
    assert make_prompt(family, num_tokens, seed).answer == answer


def test_mixed_asks_both_kinds() -> None:
    asked = {make_prompt("mixed", 512, seed).text.split()[-2] for seed in range(20)}
    assert asked == {"?", "!"}


def test_overwritten_keys_are_written_twice() -> None:
    words = make_prompt("overwritten", 512, 0).text.split()
    keys = [key for sign, key in pairwise(words) if sign == "@"]
    assert {keys.count(key) for key in keys} == {2}


def test_vocabulary_has_distinct_words() -> None:
    assert len(VOCAB) == len(TOKEN_ID) == 1040


def test_refuses_what_it_cannot_make() -> None:
    with pytest.raises(ValueError, match=r"family must be one of .*'other'"):
        make_prompt("other", 512, 0)
    with pytest.raises(ValueError, match="at least 64, got 63"):
        make_prompt("single", 63, 0)
