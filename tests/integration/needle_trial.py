"""Asks one backend the needle model's questions and writes how right its answers were; test_needle_accuracy.py runs it.

usage: needle_trial.py {stock|shadowkv|planted} RESULT_JSON HAYSTACKS QUESTIONS [graphs] [brief]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import FAMILIES, Prompt, make_prompts

LENGTH = 4080  # the model was trained on positions up to 4096, the answer's included
FIRST_SEED = 2_000_000  # beyond those of training and evaluation
SETTINGS = {"sparse_budget": 240, "slot_chunks": 64, "dense_threshold": 1024, "resident_pages": False}
"""A budget of 6 % of the prompt, which lies well beyond the dense threshold."""

SEVERAL = ("multi_value", "multi_query")
"""Families that ask for several things at once. Each token that is right counts, echoed keys included."""


def ask(llm: LLM, family: str, prompts: list[Prompt]) -> list[float]:
    """How right each greedy answer is: 1 or 0, or the share of right tokens of a family that asks for several."""
    params = [SamplingParams(temperature=0, max_tokens=len(p.answer_ids), ignore_eos=True) for p in prompts]
    outputs = llm.generate([{"prompt_token_ids": p.token_ids} for p in prompts], params, use_tqdm=False)
    scores = []
    for output, prompt in zip(outputs, prompts, strict=True):
        right = [one == other for one, other in zip(output.outputs[0].token_ids, prompt.answer_ids, strict=True)]
        scores.append(sum(right) / len(right) if family in SEVERAL else float(all(right)))
    return scores


def score(llm: LLM, haystacks: int, questions: int, first_seed: int, brief: bool) -> dict[str, list[float]]:
    """Scores by family: `haystacks * questions` prompts each.

    The first question about a haystack is prefilled exactly. The others hit its blocks in the prefix cache, so their
    prefill reads sealed context too. A haystack of the family `single` holds one fact, so there all are firsts, which
    takes most of the time: if it is to be brief, there are twice as many haystacks of it as of others, and no more.
    """
    most = 2 * haystacks if brief else haystacks * questions
    right = {}
    for family in FAMILIES:
        groups: list[list[Prompt]] = []
        while sum(map(len, groups)) < haystacks * questions and len(groups) < most:
            groups.append(make_prompts(family, LENGTH, first_seed + len(groups), questions))
        first = ask(llm, family, [group[0] for group in groups])
        later = [prompt for group in groups for prompt in group[1:]]
        right[family] = (first + (ask(llm, family, later) if later else []))[: haystacks * questions]
    return right


def random_selection(runtime: Any) -> None:
    """Plants an error: chunks are picked, and the rest is weighed, at random instead of by score."""
    from vllm_shadowkv import ops

    select = ops.select_chunks
    generator = torch.Generator().manual_seed(0)

    def planted(query: Any, pages: Any, *arguments: Any) -> None:
        select(torch.randn(query.shape, generator=generator, dtype=torch.float32).to(query.dtype), pages, *arguments)

    ops.select_chunks = planted


def flipped_rotation(runtime: Any) -> None:
    """Plants an error: rebuilt keys are turned the wrong way."""
    tables = {memory.cos_sin.data_ptr(): memory.cos_sin for memory in runtime.memory.bind().memories.values()}
    for table in tables.values():  # layers share one
        table[:, table.shape[1] // 2 :].neg_()


PLANTS: dict[str, Callable[[Any], None]] = {"random selection": random_selection, "flipped rotation": flipped_rotation}


def main(backend: str, result: str, haystacks: int, questions: int, graphs: bool, brief: bool) -> None:
    # On a GPU vLLM would take most of it, and we pin as much of the host's memory as backs that.
    options: dict[str, Any] = {"kv_cache_memory_bytes": 2 << 30} if torch.cuda.is_available() else {}
    if backend != "stock":
        options |= {"attention_backend": "shadowkv", "additional_config": {"shadowkv": SETTINGS}}
    llm = LLM(
        str(CHECKPOINT),
        max_model_len=LENGTH + 64,
        max_num_seqs=16,
        max_num_batched_tokens=4096,
        enforce_eager=not graphs,
        **options,
    )
    scores = {}
    if backend == "planted":
        from vllm_shadowkv import ops
        from vllm_shadowkv.integration.worker.runtime import Runtime

        select = ops.select_chunks
        for number, (name, plant) in enumerate(PLANTS.items()):
            plant(Runtime.latest())
            # Other haystacks each time: slots filled before the error was planted would still be right.
            scores[name] = score(llm, max(haystacks // 5, 2), questions, FIRST_SEED + 1000 * (number + 1), brief)
            ops.select_chunks = select
    else:
        scores["as built"] = score(llm, haystacks, questions, FIRST_SEED, brief)
    Path(result).write_text(json.dumps(scores))


if __name__ == "__main__":
    flags = ("graphs" in sys.argv[5:], "brief" in sys.argv[5:])
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *flags)
