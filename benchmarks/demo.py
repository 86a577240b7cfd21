"""`make demo`: two vLLM servers answer the same questions about long prompts, ours and the stock one.

The model is the needle model that ships with the repository: it finds facts in word-level prompts. It proves that
selection, rebuilding and positions are right; of the accuracy of ordinary models it says nothing (benchmarks/needle).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import FAMILIES, Prompt, make_prompts
from benchmarks.progress import Progress
from benchmarks.server import Server, ServerError

LENGTHS = (4608, 12288)
"""Tokens of the prompts. Both lie beyond the dense threshold, so their answers are read from sealed blocks."""

SETTINGS = {"sparse_budget": 512}
FIRST_SEED = 1_000_000
"""Beyond the seeds of training and evaluation."""


@dataclass
class Report:
    """What one backend did.

    Attributes:
        right: per (length, family), of every answer whether it was right.
        token_seconds: per length, seconds of every decoded token.
        num_blocks, block_size: of the KV cache, as the server reports them.
        sealed_tokens: as the server's log says; 0 for the stock backend.
    """

    right: dict[tuple[int, str], list[bool]] = field(default_factory=dict)
    token_seconds: dict[int, list[float]] = field(default_factory=dict)
    num_blocks: int = 0
    block_size: int = 0
    sealed_tokens: int = 0

    def right_at(self, length: int) -> list[bool]:
        """Of every answer at a length whether it was right."""
        return [one for (at, _), answers in self.right.items() if at == length for one in answers]


def main() -> int:
    """Runs both servers and prints the table; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--prompts", type=int, default=5, help="questions per task family and length, about one text")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the prompts")
    parser.add_argument("--kv-cache-mib", type=int, default=256, help="device bytes of the KV cache, either backend")
    arguments = parser.parse_args()
    console = Console()
    questions = [
        (length, family, prompt)
        for length in arguments.lengths
        for family in FAMILIES
        for prompt in make_prompts(family, length, FIRST_SEED, arguments.prompts)
    ]
    reports = {}
    try:
        for name, extra in _backends().items():
            console.print(f"Starting `vllm serve {CHECKPOINT.name} {' '.join(extra)}` …")
            reports[name] = _ask(name, extra, questions, arguments.kv_cache_mib, console)
    except ServerError as error:
        console.print(f"[red]{error}")
        return 1
    _print_tables(console, reports, arguments)
    return 0


def _environment() -> dict[str, str]:
    """Of both servers. vLLM leaves a core of the CPU to itself, which of two is one too many here."""
    cores = sorted(os.sched_getaffinity(0))
    few = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))} if len(cores) == 2 else {}
    return {"VLLM_LOGGING_LEVEL": "DEBUG"} | few


def _backends() -> dict[str, list[str]]:
    settings = json.dumps({"shadowkv": SETTINGS})
    return {"shadowkv": ["--attention-backend", "shadowkv", "--additional-config", settings], "stock": []}


def _ask(
    name: str, extra: list[str], questions: list[tuple[int, str, Prompt]], cache_mib: int, console: Console
) -> Report:
    """Serves the model with one backend and asks it everything."""
    report = Report()
    longest = max(length for length, _, _ in questions)
    arguments = [
        "--max-model-len",
        str(longest + 64),
        "--kv-cache-memory-bytes",
        str(cache_mib * 2**20),
        "--enforce-eager",
        *extra,
    ]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "server.log"
        with (
            Server(CHECKPOINT, log, arguments, _environment()) as server,
            Progress(console) as progress,
        ):
            for length, family, prompt in progress.track(questions, description=f"{name:9}"):
                answer = server.complete(prompt.text, max_tokens=len(prompt.answer_ids))
                report.right.setdefault((length, family), []).append(answer.text == prompt.answer)
                report.token_seconds.setdefault(length, []).extend(answer.token_seconds)
            cache = server.cache_config()
            # vLLM reports the smallest block of any group, and ours holds exact pages too.
            sizes = re.findall(r"shadowkv: \d+ blocks of (\d+) tokens", server.log_text())
            report.num_blocks, report.block_size = (
                int(cache["num_gpu_blocks"]),
                int((sizes or [cache["block_size"]])[0]),
            )
            sealed = re.findall(r"shadowkv: sealed \d+ blocks, (\d+) tokens", server.log_text())
            report.sealed_tokens = sum(map(int, sealed))
    return report


def _print_tables(console: Console, reports: dict[str, Report], arguments: argparse.Namespace) -> None:
    answers = Table(title="Answers right", title_justify="left")
    answers.add_column("family")
    for length in arguments.lengths:
        for name in reports:
            answers.add_column(f"{name}\n{length} tokens", justify="right")
    for family in FAMILIES:
        rights = [report.right[length, family] for length in arguments.lengths for report in reports.values()]
        answers.add_row(family, *(f"{sum(right)} of {len(right)}" for right in rights))
    console.print(answers)

    table = Table(title=f"Both with {arguments.kv_cache_mib} MiB of KV cache on the device", title_justify="left")
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right")
    cache_bytes = arguments.kv_cache_mib * 2**20
    for length in arguments.lengths:
        rights = [report.right_at(length) for report in reports.values()]
        table.add_row(f"answers right at {length} tokens", *(f"{sum(right)} of {len(right)}" for right in rights))
    table.add_row("tokens sealed", *(f"{report.sealed_tokens:,}" for report in reports.values()))
    table.add_row(
        "device bytes per cached token",
        *(f"{cache_bytes / (report.num_blocks * report.block_size):,.0f}" for report in reports.values()),
    )
    table.add_row(
        "blocks that fit",
        *(f"{report.num_blocks:,} of {report.block_size:,} tokens" for report in reports.values()),
    )
    for length in arguments.lengths:
        # Not the median: of tokens that a busy client reads together all but the first took no time.
        means = [1000 * statistics.fmean(report.token_seconds[length]) for report in reports.values()]
        table.add_row(f"ms per decoded token at {length}", *(f"{mean:.1f}" for mean in means))
    console.print(table)
    budget = SETTINGS["sparse_budget"]
    shares = ", ".join(f"{budget / length:.0%} of {length}" for length in arguments.lengths)
    console.print(
        f"shadowkv attends to {budget} selected tokens per KV head and step ({shares}), the first and the newest "
        "chunks, outliers, and the open block. The first question about a text prefills it, the others find it in the "
        "prefix cache. At a length where the stock backend's answers are wrong too, it is the "
        "model that cannot answer. A model this small spends its step outside "
        "attention, so its times say nothing of speed."
    )


if __name__ == "__main__":
    raise SystemExit(main())
