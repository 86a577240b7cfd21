"""A study of SmolLM2's layers over texts, one layer after the other: the command line of `selection` and `slots`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from transformers import AutoTokenizer

from benchmarks.accuracy.layers import Layer, captured
from benchmarks.machine import machine
from benchmarks.progress import track
from benchmarks.smollm2 import SMOLLM2
from benchmarks.smollm2.texts import TEXTS
from benchmarks.wheels import MissingError

PROMPT = 7168
"""Tokens of a text that are sealed: seven blocks."""


def run(
    name: str,
    about: str,
    queries: int,
    measure: Callable[[str, int, Layer], list[Any]],
    markdown: Callable[[list[Any]], str],
    plot: Callable[[list[Any], Path], None] | None = None,
    every: int = 1,
) -> None:
    """Measures all texts, prints the table, and writes what is asked for.

    Args:
        name: of the module.
        about: its docstring.
        queries: tokens that follow the prompt.
        measure: of a text's name, a layer's number and the layer to records, which are dataclasses.
        markdown: of the records.
        plot: of the records.
        every: how many layers it takes for one to be measured.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--json", type=Path, help="where the result goes")
    if plot:
        parser.add_argument("--plot", type=Path, help="where a PNG goes")
    arguments = parser.parse_args()
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    try:
        checkpoint = SMOLLM2.get()
        contents = {text: TEXTS[text]() for text in arguments.texts}
    except MissingError as error:
        parser.exit(1, f"benchmarks.smollm2.{name}: {error}\n")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    records = []
    for text, content in contents.items():
        ids = tokenizer(content, truncation=True, max_length=PROMPT + queries)["input_ids"]
        with torch.inference_mode():
            layers = list(enumerate(captured(checkpoint, ids, queries, text)))[::every]
            for number, layer in track(layers, text, console):
                records += measure(text, number, layer)
    found = markdown(records)
    console.print(Markdown(found))
    if plot and arguments.plot:
        plot(records, arguments.plot)
    if arguments.json:
        result = {"machine": machine(f"smollm2.{name}", "cpu"), "table": found, "records": [asdict(r) for r in records]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
