"""Asks one backend all questions and writes down its answers: `python -m benchmarks.accuracy.collect`.

Setup A: the question is in the prompt, which is computed at once. Setup B: the context is computed and cached first,
and the question comes in a second turn. Run it once for each backend, then compare the files with
`benchmarks.accuracy.compare`. A run that was cut short goes on where it ended.

    python -m benchmarks.accuracy.collect stock.jsonl --needle-tokens 4080
    python -m benchmarks.accuracy.collect ours.jsonl --needle-tokens 4080 --backend shadowkv
    python -m benchmarks.accuracy.collect ours.jsonl --model NAME --samples qa.jsonl --url http://localhost:8000/v1

With `--trajectory stock.jsonl` the answers written there are decoded again, token by token whatever the backend
prefers, and the distributions of the next token are written with them: that gives the divergence of two backends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from benchmarks.accuracy.ask import Asker, Engine, Request, Server
from benchmarks.accuracy.samples import Sample, from_json_lines, needles
from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import FAMILIES

SETUPS = ("A", "B")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a result; a last one that was cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def ask_group(
    ask: Asker, samples: list[Sample], setup: str, trajectories: dict[tuple[str, str], list[int]], run: str
) -> list[dict[str, Any]]:
    """Records of samples that share one context. `run` is no other run's, or a server would remember its prompts."""
    if setup == "B":
        # Two tokens: a prompt is in the prefix cache once its request has run one step beyond it.
        ask([Request(samples[0].context, 2, f"B {samples[0].name} {run}")])
    requests = []
    for sample in samples:
        salt = f"A {sample.name} {run}" if setup == "A" else f"B {samples[0].name} {run}"
        forced = trajectories.get((sample.name, setup))
        length = len(forced) if forced else sample.max_tokens
        requests.append(Request(sample.context + sample.question, length, salt, forced, stop=sample.answer is None))
    return [
        {
            "name": sample.name,
            "family": sample.family,
            "setup": setup,
            "prompt_tokens": len(request.prompt),
            "cached_tokens": reply.cached_tokens,
            "answer": sample.answer,
            "output": reply.token_ids,
        }
        | ({"logprobs": reply.logprobs} if request.forced else {})
        for sample, request, reply in zip(samples, requests, ask(requests), strict=True)
    ]


def collect(
    ask: Asker, samples: Iterable[Sample], setups: Iterable[str], out: Path, trajectory: Path | None, total: int | None
) -> None:
    """Appends a record per sample and setup to `out`, without those that are there already."""
    done = {(record["name"], record["setup"]) for record in read_records(out)}
    trajectories = {(r["name"], r["setup"]): r["output"] for r in read_records(trajectory)} if trajectory else {}
    setups, run = list(setups), uuid.uuid4().hex
    with continued(out) as file, tqdm(total=total, desc=out.stem, unit="answers", mininterval=5) as bar:
        for group in by_context(samples):
            for setup in setups:
                wanted = [sample for sample in group if (sample.name, setup) not in done]
                if trajectory:
                    wanted = [sample for sample in wanted if (sample.name, setup) in trajectories]
                for record in ask_group(ask, wanted, setup, trajectories, run) if wanted else []:
                    file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update(len(group))


def continued(path: Path) -> IO[str]:
    """Opens a result to append to; a last line that was cut short is dropped."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    return path.open("a")


def by_context(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Neighbouring samples with the same context."""
    for _, group in itertools.groupby(samples, key=lambda sample: sample.context):
        yield list(group)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON lines; continued if it exists")
    parser.add_argument("--model", default=str(CHECKPOINT), help="default: the needle model")
    parser.add_argument("--backend", default="stock", choices=["stock", "shadowkv"])
    parser.add_argument("--shadowkv", type=json.loads, default={}, help="settings, as JSON")
    parser.add_argument("--options", type=json.loads, default={}, help="more options of vllm.LLM, as JSON")
    parser.add_argument("--url", help="ask this server (up to /v1) instead of an engine of our own")
    parser.add_argument("--parallel", type=int, default=8, help="requests to a server at a time")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--samples", type=Path, help="JSON lines with context and question")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer to --samples")
    parser.add_argument("--needle-tokens", type=int, help="the needle model's families, with prompts of this length")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--haystacks", type=int, default=40)
    parser.add_argument("--questions", type=int, default=10, help="per haystack")
    parser.add_argument("--trajectory", type=Path, help="decode this result's answers, for distributions")
    parser.add_argument("--logprobs", type=int, default=20, help="tokens to report with --trajectory; -1: all")
    arguments = parser.parse_args()
    if (arguments.needle_tokens is None) == (arguments.samples is None):
        parser.error("say either --needle-tokens or --samples")

    if arguments.samples:
        samples = list(from_json_lines(arguments.samples, arguments.model, arguments.max_tokens))
    else:
        families = tuple(arguments.families)
        samples = list(needles(arguments.needle_tokens, arguments.haystacks, arguments.questions, families))
    if arguments.url:
        ask: Asker = Server(arguments.url, arguments.model, arguments.logprobs, arguments.parallel)
    else:
        longest = max(len(s.context) + len(s.question) + s.max_tokens for s in samples)
        options = {"max_model_len": longest + 16, "max_num_seqs": 16, "max_logprobs": arguments.logprobs}
        if arguments.backend == "shadowkv":
            options |= {
                "attention_backend": "shadowkv",
                "additional_config": {"shadowkv": {"resident_pages": False} | arguments.shadowkv},
            }
        ask = Engine(
            arguments.model, arguments.logprobs, arguments.trajectory is not None, **options | arguments.options
        )
    total = len(samples) * len(arguments.setups)
    collect(ask, samples, arguments.setups, arguments.out, arguments.trajectory, total)


if __name__ == "__main__":
    main()
