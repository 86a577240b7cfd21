"""The needle model, which ships with the repository and finds facts in word-level prompts: its answers are exact.

It proves that selection, rebuilding and positions are right; of the accuracy of ordinary models it says nothing
(benchmarks/needle).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from benchmarks.demo.backends import BACKENDS, Pool, serve
from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import FAMILIES, Prompt, make_prompts
from benchmarks.progress import Progress

LENGTHS = (4608, 8704)
"""Tokens of the prompts. Both lie beyond the dense threshold, so their answers are read from sealed blocks."""

SETTINGS = {"sparse_budget": 512}
FIRST_SEED = 1_000_000
"""Beyond the seeds of training and evaluation."""


@dataclass
class Report:
    """What one backend did.

    Attributes:
        pool: its KV cache.
        right: per (length, family), of every answer whether it was right.
        token_seconds: per length, seconds of every decoded token.
        sealed_tokens: as the server's log says; 0 for the stock backend.
    """

    pool: Pool
    right: dict[tuple[int, str], list[bool]] = field(default_factory=dict)
    token_seconds: dict[int, list[float]] = field(default_factory=dict)
    sealed_tokens: int = 0

    def right_at(self, length: int) -> list[bool]:
        """Of every answer at a length whether it was right."""
        return [one for (at, _), answers in self.right.items() if at == length for one in answers]

    @property
    def score(self) -> str:
        """Answers right, of all."""
        answers = [one for answers in self.right.values() for one in answers]
        return f"{sum(answers)} of {len(answers)}"


def run(prompts: int, lengths: Sequence[int], cache_mib: int, console: Console) -> dict[str, Report]:
    """Asks both backends and prints the tables.

    Args:
        prompts: questions per task family and length, about one text.
        lengths: tokens of the prompts.
        cache_mib: of the KV cache on the device.
        console: where it is printed.
    """
    questions = [
        (length, family, prompt)
        for length in lengths
        for family in FAMILIES
        for prompt in make_prompts(family, length, FIRST_SEED, prompts)
    ]
    reports = {backend: _ask(backend, questions, cache_mib, console) for backend in BACKENDS}
    _print_tables(console, reports, lengths, cache_mib)
    return reports


def _ask(backend: str, questions: list[tuple[int, str, Prompt]], cache_mib: int, console: Console) -> Report:
    """Serves the model with one backend and asks it everything."""
    longest = max(length for length, _, _ in questions)
    with serve(backend, CHECKPOINT, SETTINGS, cache_mib, ["--max-model-len", str(longest + 64)], console) as server:
        report = Report(Pool.of(server, cache_mib * 2**20))
        with Progress(console) as progress:
            for length, family, prompt in progress.track(questions, description=f"{backend:9}"):
                answer = server.complete(prompt.text, max_tokens=len(prompt.answer_ids))
                report.right.setdefault((length, family), []).append(answer.text == prompt.answer)
                report.token_seconds.setdefault(length, []).extend(answer.token_seconds)
        sealed = re.findall(r"shadowkv: sealed \d+ blocks, (\d+) tokens", server.log_text())
        report.sealed_tokens = sum(map(int, sealed))
    return report


def _print_tables(console: Console, reports: dict[str, Report], lengths: Sequence[int], cache_mib: int) -> None:
    answers = Table(title="Answers right", title_justify="left")
    answers.add_column("family")
    for length in lengths:
        for name in reports:
            answers.add_column(f"{name}\n{length} tokens", justify="right")
    for family in FAMILIES:
        rights = [report.right[length, family] for length in lengths for report in reports.values()]
        answers.add_row(family, *(f"{sum(right)} of {len(right)}" for right in rights))
    console.print(answers)

    table = Table(title=f"Both with {cache_mib} MiB of KV cache on the device", title_justify="left")
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right")
    for length in lengths:
        rights = [report.right_at(length) for report in reports.values()]
        table.add_row(f"answers right at {length} tokens", *(f"{sum(right)} of {len(right)}" for right in rights))
    pools = [report.pool for report in reports.values()]
    table.add_row("tokens sealed", *(f"{report.sealed_tokens:,}" for report in reports.values()))
    table.add_row("device bytes per cached token", *(f"{pool.token_bytes:,.0f}" for pool in pools))
    table.add_row("blocks that fit", *(f"{pool.num_blocks:,} of {pool.block_size:,} tokens" for pool in pools))
    for length in lengths:
        # Not the median: of tokens that a busy client reads together all but the first took no time.
        means = [1000 * statistics.fmean(report.token_seconds[length]) for report in reports.values()]
        table.add_row(f"ms per decoded token at {length}", *(f"{mean:.1f}" for mean in means))
    console.print(table)
    budget = SETTINGS["sparse_budget"]
    shares = ", ".join(f"{budget / length:.0%} of {length}" for length in lengths)
    console.print(
        f"shadowkv attends to {budget} selected tokens per KV head and step ({shares}), the first and the newest "
        "chunks, outliers, and the open block. The first question about a text prefills it, the others find it in the "
        "prefix cache. At a length where the stock backend's answers are wrong too, it is the "
        "model that cannot answer. A model this small spends its step outside "
        "attention, so its times say nothing of speed."
    )
