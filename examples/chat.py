"""A chat over one document. Each turn finds the turns before it in the prefix cache, sealed.

usage: chat.py [--model MODEL --document FILE]

Without arguments the needle model of this repository answers three questions whose answers are known; run it from the
root of a checkout. With a model, questions are read from the terminal until an empty one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

# The needle model has no chat template: what is said comes one after the other.
PLAIN = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def main() -> int:
    """Returns the process's exit code: 1 where an answer is known and another was given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or directory, with a chat template")
    parser.add_argument("--document", type=Path, help="a text file")
    parser.add_argument("--max-model-len", type=int, default=16_384)
    given = parser.parse_args()
    if given.model:
        model, document, template, tokens = given.model, given.document.read_text(), None, 256
        turns = ((question, None) for question in iter(lambda: input("> "), ""))
    else:
        model, document, turns = needle()
        template, tokens = PLAIN, 3

    llm = LLM(
        model,
        attention_backend="shadowkv",
        additional_config={"shadowkv": {"sparse_budget": 512}},
        max_model_len=given.max_model_len,
        enable_prefix_caching=True,
    )
    messages: list[Any] = []
    wrong = 0
    for question, expected in turns:
        first = not messages
        messages.append({"role": "user", "content": f"{document} {question}" if first else question})
        [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=tokens), chat_template=template)
        answer = output.outputs[0].text.strip()
        messages.append({"role": "assistant", "content": answer})
        print(f"{output.num_cached_tokens:,} of {len(output.prompt_token_ids):,} prompt tokens from the prefix cache")
        print(f"{question} → {answer}" + (f" (expected: {expected})" if expected else ""))
        wrong += expected not in (None, answer)
    return int(wrong > 0)


def needle() -> tuple[str, str, Iterator[tuple[str, str]]]:
    """The needle model, a document, and questions with their answers."""
    from benchmarks.needle import CHECKPOINT
    from benchmarks.needle.tasks import make_prompts

    prompts = make_prompts("multi_key", 8192, 5, 3)
    questions = [" ".join(prompt.text.split()[-2:]) for prompt in prompts]
    document = prompts[0].text.removesuffix(questions[0]).strip()
    return str(CHECKPOINT), document, zip(questions, (prompt.answer for prompt in prompts), strict=True)


if __name__ == "__main__":
    raise SystemExit(main())
