"""The command line of the step model."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console

import benchmarks.step_model
from benchmarks.step_model.assumed import CASES, MACHINES, Assumed, Case, Machine
from benchmarks.step_model.model import SHAPE
from benchmarks.step_model.tables import Sheet, sheets
from benchmarks.workload import hit_rate
from vllm_shadowkv.config import ShadowKVConfig

CONTEXTS = [122_880, 32_768]
BLOCK = ShadowKVConfig().block_size
LEAST = 8192
"""Tokens; shorter contexts are exact, or nearly."""


def parser() -> argparse.ArgumentParser:
    """The arguments; those of a machine hold for all that are named."""
    made = argparse.ArgumentParser(prog="benchmarks.step_model", description=benchmarks.step_model.__doc__)
    made.add_argument("--machine", choices=MACHINES, nargs="+", default=list(MACHINES))
    made.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens, in blocks of 1,024")
    for field in fields(Machine):
        help_ = f"{field.metadata['meaning']}; default: the machine's".replace("%", "%%")
        made.add_argument(f"--{field.name.replace('_', '-')}", type=float, help=help_)
    made.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="of the last table")
    asked = made.add_argument_group("one case of ours in place of all")
    asked.add_argument("--hits", type=hit_rate, help="share of the selected chunks; default: SmolLM2's, by slots")
    asked.add_argument("--of-scored", action="store_true", help="hits are those of the budget, the forced ones all hit")
    asked.add_argument("--slots", type=int, help=f"slot_chunks; default: {CASES[2].slots}")
    asked.add_argument("--slot-bits", type=int, choices=(8, 16), help="8: twice the slots in a page (not built)")
    asked.add_argument("--bf16-values", action="store_true", help="value_dtype auto")
    asked.add_argument("--parts", type=int, help="of a step's rows, each beside the link of another (not built)")
    asked.add_argument("--resident", type=hit_rate, help="share of the misses that are copied from exact pages")
    asked.add_argument("--requests", type=int, help="default: as many as fit")
    made.add_argument("--markdown", action="store_true", help="print Markdown")
    made.add_argument(
        "--update", type=Path, metavar="FILE", help="replace the tables of a Markdown file by their titles"
    )
    return made


def asked_case(given: argparse.Namespace) -> Case | None:
    """The case that was asked for, or None."""
    names = ("hits", "of_scored", "slots", "slot_bits", "bf16_values", "parts", "resident", "requests")
    changes = {name: getattr(given, name) for name in names if getattr(given, name) not in (None, False)}
    return replace(Case("as asked"), **changes) if changes else None


def answer(given: argparse.Namespace) -> list[Sheet]:
    """The tables that the arguments ask for.

    Raises:
        ValueError: a context, a setting or an assumption is refused, or not even one request fits.
    """
    for tokens in given.contexts:
        if tokens % BLOCK or not LEAST <= tokens <= SHAPE.max_model_len:
            raise ValueError(f"--contexts: whole blocks of {BLOCK}, {LEAST} to {SHAPE.max_model_len}, got {tokens}.")
    names = [field.name for field in fields(Machine)]
    changes = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    machines = {name: replace(MACHINES[name], **changes) for name in given.machine}
    known, values = {field.name for field in fields(Assumed)}, {}
    for text in given.assume:
        name, _, value = text.partition("=")
        if name not in known:
            raise ValueError(f"--assume: no assumption is called {name}; the last table has them.")
        values[name] = float(value)
    case = asked_case(given)
    return sheets(machines, replace(Assumed(), **values), given.contexts, (*CASES[:2], case) if case else CASES)


def updated(text: str, tables: list[Sheet]) -> str:
    """A Markdown text with its tables as they are now.

    Raises:
        ValueError: it lacks a table's title.
    """
    for sheet in tables:
        pattern = re.compile(rf"^{re.escape(f'**{sheet.title}**')}$(?:\n\n\|.*(?:\n\|.*)*)?", re.MULTILINE)
        text, found = pattern.subn(sheet.markdown(), text)
        if not found:
            raise ValueError(f"--update: the file has no line **{sheet.title}**.")
    return text


def main() -> None:
    """The command line."""
    arguments = parser()
    given = arguments.parse_args()
    try:
        tables = answer(given)
        if given.update:
            given.update.write_text(updated(given.update.read_text(), tables))
    except ValueError as error:
        arguments.error(str(error))
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for sheet in tables if not given.update else ():
        if given.markdown:
            print(f"{sheet.markdown()}\n")
        else:
            console.print(sheet.table())
    if not (given.markdown or given.update):
        console.print("Nothing here is measured: every number follows from what the last two tables assume.")


if __name__ == "__main__":
    main()
