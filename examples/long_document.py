"""Asks one question about a long document, offline.

usage: long_document.py [--model MODEL --document FILE --question TEXT]

Without arguments the needle model of this repository is asked, which runs on a CPU in half a minute and whose answer is
known; run it from the root of a checkout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> int:
    """Returns the process's exit code: 1 where the answer is known and another was given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or directory")
    parser.add_argument("--document", type=Path, help="a text file")
    parser.add_argument("--question", default="What is this document about?")
    parser.add_argument("--max-model-len", type=int, default=16_384)
    parser.add_argument("--sparse-budget", type=int, default=512, help="tokens per KV head and step")
    given = parser.parse_args()

    if given.model:
        model, prompt, expected = given.model, f"{given.document.read_text()}\n\n{given.question}\n", None
        tokens = 256
    else:
        from benchmarks.needle import CHECKPOINT
        from benchmarks.needle.tasks import make_prompt

        needle = make_prompt("multi_key", num_tokens=8192, seed=3)
        model, prompt, expected = str(CHECKPOINT), needle.text, needle.answer
        tokens = len(needle.answer_ids)

    llm = LLM(
        model,
        attention_backend="shadowkv",
        additional_config={"shadowkv": {"sparse_budget": given.sparse_budget}},
        max_model_len=given.max_model_len,
    )
    [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=tokens))
    answer = output.outputs[0].text.strip()
    print(f"{len(output.prompt_token_ids):,} tokens of prompt; answer: {answer}")
    if expected is not None:
        print(f"expected: {expected}")
    return int(expected is not None and answer != expected)


if __name__ == "__main__":
    raise SystemExit(main())
