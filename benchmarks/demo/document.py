"""A real decoder and a real document: questions, and a summary in the model's own words, by both backends.

The model is SmolLM2-135M-Instruct (benchmarks/smollm2), the document a chapter of Python's language reference, as it
comes with the running Python. Sealed blocks are read as such, however empty the pool is (`resident_pages` off). The
summary is asked first: its prompt is computed exactly, its words are decoded over sealed blocks. The questions find the
document in the prefix cache, so they are computed over sealed blocks, too.
"""

from __future__ import annotations

import contextlib
import itertools
import pydoc_data.topics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.demo.backends import BACKENDS, Pool, serve
from benchmarks.progress import Progress
from benchmarks.server import Server
from vllm_shadowkv.cli.model import read_model
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import plan_page
from vllm_shadowkv.state.boundary import ExactBoundary
from vllm_shadowkv.state.capacity import Capacity

TITLE = "Compound statements"
TOKENS = 4300
"""Of the document, at most: four sealed blocks and the beginning of another, above the dense threshold."""


@dataclass(frozen=True)
class Question:
    """What is asked, and the words of the document that answer it."""

    text: str
    passage: str = ""
    max_tokens: int = 40


SUMMARY = Question("Describe in your own words what this document is about.", max_tokens=64)
QUESTIONS = (
    Question(
        "What is a compound statement?",
        "Compound statements contain (groups of) other statements; they affect or control the execution of those other "
        "statements in some way.",
    ),
    Question(
        'What is the "while" statement used for?',
        'The "while" statement is used for repeated execution as long as an expression is true',
    ),
    Question(
        'What is the "for" statement used for?',
        'The "for" statement is used to iterate over the elements of a sequence (such as a string, tuple or list) or '
        "other iterable object",
    ),
    Question(
        'What is the "with" statement used for?',
        'The "with" statement is used to wrap the execution of a block with methods defined by a context manager',
    ),
    Question(
        'What does a "break" statement do?',
        'A "break" statement executed in the first suite terminates the loop',
    ),
)
"""Of those that were tried, what the model answers acceptably with full attention."""

SETTINGS = {"sparse_budget": 512, "slot_chunks": 96, "resident_pages": False}
DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"
"""Not every CPU has instructions for bfloat16, and no attention on a GPU takes float32."""
CACHE_MIB = 1024
STEP_TOKENS = 2048


@dataclass(frozen=True)
class Answer:
    """What a backend says.

    Attributes:
        text: as it came.
        first_seconds: until the first token.
        token_seconds: of every other one.
    """

    text: str
    first_seconds: float
    token_seconds: list[float]


@dataclass
class Report:
    """What one backend did.

    Attributes:
        tokens: of the document, with what is around it in a prompt.
        answers: by question.
        held_bytes: on the device, of a request about the document while it decodes, as the server measures it.
        host_bytes: of the same request, in host memory.
        requests: such requests that decode side by side in the pool (`fitting`).
    """

    tokens: int
    answers: dict[str, Answer] = field(default_factory=dict)
    held_bytes: float = 0
    host_bytes: int = 0
    requests: int = 0

    @property
    def tokens_per_second(self) -> float:
        """While an answer is decoded."""
        seconds = [one for answer in self.answers.values() for one in answer.token_seconds]
        return len(seconds) / sum(seconds)


def document(count: Callable[[str], int], most: int = TOKENS) -> str:
    """Whole paragraphs of the document.

    Args:
        count: tokens of a text.
        most: tokens that are wanted.
    """
    kept: list[str] = []
    for paragraph in pydoc_data.topics.topics["compound"].strip().split("\n\n"):
        most -= count(f"{paragraph}\n\n")
        if most < 0:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def answered(questions: tuple[Question, ...], text: str) -> list[Question]:
    """Those whose passage this Python's document has."""
    said = " ".join(text.split())
    return [question for question in questions if question.passage in said]


def run(checkpoint: Path, questions: int, most: int, console: Console) -> tuple[list[Question], dict[str, Report]]:
    """Asks both backends.

    Args:
        checkpoint: of the model.
        questions: how many, beside the summary.
        most: tokens of the document.
        console: where progress is shown.
    """
    from transformers import AutoTokenizer  # takes seconds

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = document(lambda part: len(tokenizer(part)["input_ids"]), most)
    asked = [SUMMARY, *answered(QUESTIONS, text)[:questions]]
    prompts = {}
    for question in asked:
        said = [{"role": "user", "content": f"{text}\n\n{question.text}"}]
        prompts[question] = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    longest = max(len(tokenizer(prompts[question])["input_ids"]) + question.max_tokens for question in asked)
    tokens = len(tokenizer(prompts[SUMMARY])["input_ids"])
    reports = {backend: _ask(backend, checkpoint, prompts, tokens, longest, console) for backend in BACKENDS}
    return asked, reports


def _ask(
    backend: str, checkpoint: Path, prompts: dict[Question, str], tokens: int, longest: int, console: Console
) -> Report:
    limits = ["--dtype", DTYPE, "--max-model-len", str(longest), "--max-num-batched-tokens", str(STEP_TOKENS)]
    report = Report(tokens)
    with serve(backend, checkpoint, SETTINGS, CACHE_MIB, limits, console) as server:
        with Progress(console) as progress:
            for question, prompt in progress.track(list(prompts.items()), description=f"{backend:9}"):
                began, times, text = time.perf_counter(), [], ""
                for token in server.stream(prompt, question.max_tokens):
                    text += token
                    times.append(time.perf_counter())
                apart = [later - earlier for earlier, later in itertools.pairwise(times)]
                report.answers[question.text] = Answer(text.strip(), times[0] - began, apart)
        report.held_bytes = _held(server, prompts[SUMMARY]) * CACHE_MIB * 2**20
        report.host_bytes = host_bytes(backend, checkpoint, tokens)
        report.requests = fitting(backend, checkpoint, Pool.of(server, CACHE_MIB * 2**20), tokens, longest)
    return report


def _held(server: Server, prompt: str) -> float:
    """Share of the pool that a request holds while it decodes."""
    with contextlib.closing(server.stream(prompt, 16, ignore_eos=True)) as tokens:
        for _ in itertools.islice(tokens, 8):
            pass
        said = server.metrics()
    return next(value for name, value in said.items() if name.startswith("vllm:kv_cache_usage_perc"))


def fitting(backend: str, checkpoint: Path, pool: Pool, prompt: int, longest: int) -> int:
    """Requests that decode side by side, each about a document of its own, the last one admitted beside the others.

    Args:
        backend: of `BACKENDS`.
        checkpoint: of the model.
        pool: of the server.
        prompt: tokens of a prompt.
        longest: tokens of a prompt and its answer.
    """
    if backend == "stock":
        return (pool.num_blocks - 1) // -(-longest // pool.block_size)
    capacity = _capacity(checkpoint, longest).resolve(pool.num_blocks)
    most = max(map(capacity.decoding_pages, range(prompt + 1, longest + 1)))
    return max((pool.num_blocks - 1 - capacity.admission_pages(prompt)) // most + 1, 0)


def host_bytes(backend: str, checkpoint: Path, tokens: int) -> int:
    """Of the values of a request's sealed blocks."""
    if backend == "stock":
        return 0
    capacity = _capacity(checkpoint, tokens)
    return tokens // capacity.layout.block_size * capacity.host_bytes


def _capacity(checkpoint: Path, longest: int) -> Capacity:
    """As the server computes it."""
    config = ShadowKVConfig.from_vllm({"shadowkv": SETTINGS})
    shape = read_model(str(checkpoint), DTYPE, max_model_len=longest)
    layout = plan_page(config, shape.num_kv_heads, shape.head_size, shape.dtype)
    boundary = ExactBoundary.of(config, STEP_TOKENS, longest, steps_in_flight=2)
    return Capacity.of(config, layout, shape.num_layers, boundary)
