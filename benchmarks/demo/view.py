"""What the demo prints about the real decoder: both backends' words side by side, and a line for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.demo.document import CACHE_MIB, DTYPE, SETTINGS, TITLE, Answer, Question, Report

MIB = 2**20


def show_answers(console: Console, questions: Sequence[Question], reports: Mapping[str, Report]) -> None:
    """A table for each question, a column for each backend."""
    tokens = next(iter(reports.values())).tokens
    console.print(
        f"\nSmolLM2-135M-Instruct reads `{TITLE}`, a chapter of Python's language reference: {tokens:,} tokens, "
        f"{100 * SETTINGS['sparse_budget'] / tokens:.0f} % of which shadowkv selects per KV head and step.",
        highlight=False,
    )
    for question in questions:
        table = Table(title=Text(question.text, style="bold"), title_justify="left", expand=True)
        for backend in reports:
            table.add_column(backend, ratio=1)
        # Text, because a model's words may look like rich's markup.
        table.add_row(*(Text(_said(report.answers[question.text], question)) for report in reports.values()))
        console.print(table)
        if question.passage:
            console.print(Text(f"The document: “{question.passage}”", style="dim"))
    console.print()


def _said(answer: Answer, question: Question) -> str:
    """An answer without the line breaks that the model copies from the document, and whether it was cut off."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in answer.text.split("\n\n")]
    return "\n".join(paragraphs) + (" …" if len(answer.token_seconds) + 1 >= question.max_tokens else "")


def show_lines(console: Console, reports: Mapping[str, Report], scores: Mapping[str, str]) -> None:
    """A line per backend.

    Args:
        console: where it is printed.
        reports: by backend.
        scores: of the needle model, by backend; empty where it was not asked.
    """
    tokens = next(iter(reports.values())).tokens
    table = Table(title=f"A document of {tokens:,} tokens, {DTYPE}, {CACHE_MIB} MiB of KV cache", title_justify="left")
    table.add_column("")
    for column in ("seconds to\nread it", "tokens/s\ndecoded", "MiB on the\ndevice", "such requests\nthat fit"):
        table.add_column(column, justify="right")
    if scores:
        table.add_column("needle model\nright", justify="right")
    for backend, report in reports.items():
        first = next(iter(report.answers.values()))
        cells = [f"{first.first_seconds:.0f}", f"{report.tokens_per_second:.1f}"]
        cells += [f"{report.held_bytes / MIB:,.0f}", f"{report.requests}"]
        table.add_row(backend, *cells, *([scores[backend]] if scores else []))
    console.print(table)
    host = reports["shadowkv"].host_bytes / MIB
    console.print(
        f"The values of the document's sealed blocks, {host:.0f} MiB, are in host memory. Where stock is wrong too, "
        "the model knows no better. Of a document this short slots take more memory than sealed blocks, and attention "
        "is a small part of a step of this model; both change with length (README).",
        highlight=False,
    )
