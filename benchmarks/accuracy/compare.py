"""Compares what `benchmarks.accuracy.collect` wrote for two backends: `python -m benchmarks.accuracy.compare`.

    python -m benchmarks.accuracy.compare stock.jsonl ours.jsonl --json pairs.json --markdown pairs.md --plot pairs.png

Setups A and B are apart. An answer is right if every token is; where no answer is known, if it is what the baseline
said. Files written with `--trajectory` give the divergence, in the same table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.accuracy.collect import SETUPS, read_records
from benchmarks.accuracy.paired import Flips, divergence
from benchmarks.accuracy.table import table
from benchmarks.machine import machine

Record = dict[str, Any]


@dataclass(frozen=True)
class Divergence:
    """Of the next-token distributions, in nats, over all places of all trajectories.

    `same_first` is the share of places where both would say the same token.
    """

    places: int
    mean: float
    highest: float
    same_first: float


@dataclass(frozen=True)
class Row:
    """One family in one setup. `tokens_right` are shares, of both, for families that ask for several things."""

    family: str
    setup: str
    flips: Flips
    tokens_right: tuple[float, float] | None
    divergence: Divergence | None


def compare(baseline: list[Record], candidate: list[Record], exact_baseline: bool) -> list[Row]:
    """Rows by family and setup, of what both answered.

    Args:
        baseline, candidate: their records.
        exact_baseline: the baseline computes the same in both setups, so where it ran in B only, that counts for A.
    """
    of_baseline = {(r["name"], r["setup"]): r for r in baseline}
    if exact_baseline:
        of_baseline |= {(r["name"], "A"): r for r in baseline if (r["name"], "A") not in of_baseline}
    pairs: dict[tuple[str, str], list[tuple[Record, Record]]] = defaultdict(list)
    for record in candidate:
        if other := of_baseline.get((record["name"], record["setup"])):
            pairs[record["family"], record["setup"]].append((other, record))
    return [_row(family, setup, of_pairs) for (family, setup), of_pairs in sorted(pairs.items())]


def _row(family: str, setup: str, pairs: list[tuple[Record, Record]]) -> Row:
    right = [
        (one["output"] == (one["answer"] or one["output"]), other["output"] == (one["answer"] or one["output"]))
        for one, other in pairs
    ]
    flips = Flips.of([one for one, _ in right], [other for _, other in right])
    shares = [(_share(one), _share(other)) for one, other in pairs if one["answer"]]
    tokens = (
        (statistics.mean(one for one, _ in shares), statistics.mean(other for _, other in shares)) if shares else None
    )
    steps = [
        step
        for one, other in pairs
        if "logprobs" in one and "logprobs" in other
        for step in zip(one["logprobs"], other["logprobs"], strict=True)
    ]
    apart = [divergence(one, other) for one, other in steps]
    found = None
    if steps:
        same = statistics.mean(
            max(one, key=one.__getitem__) == max(other, key=other.__getitem__) for one, other in steps
        )
        found = Divergence(len(apart), statistics.mean(apart), max(apart), same)
    return Row(family, setup, flips, tokens, found)


def _share(record: Record) -> float:
    """Of the answer's tokens that are right at their places."""
    right = [one == other for one, other in zip(record["output"], record["answer"], strict=False)]
    return sum(right) / len(record["answer"])


def markdown(rows: list[Row]) -> str:
    """A table: a line per family, the setups side by side."""
    setups = [setup for setup in SETUPS if any(row.setup == setup for row in rows)]
    forced = any(row.divergence for row in rows)
    columns = ["divergence, nats", "highest", "same first"] if forced else ["full", "shadowkv", "lost, won", "p"]
    head = ["family", *(f"{setup}: {column}" for setup in setups for column in columns)]
    lines = [head]
    for family in dict.fromkeys(row.family for row in rows):
        cells = [family]
        for setup in setups:
            row = next((row for row in rows if (row.family, row.setup) == (family, setup)), None)
            cells += [""] * len(columns) if row is None else _cells(row, forced)
        lines.append(cells)
    return table(lines)


def _cells(row: Row, forced: bool) -> list[str]:
    if forced:
        d = row.divergence
        return [f"{d.mean:.4f}", f"{d.highest:.2f}", f"{100 * d.same_first:.1f} %"] if d else [""] * 3
    f = row.flips
    return [
        f"{100 * f.baseline / f.prompts:.1f}",
        f"{100 * f.candidate / f.prompts:.1f}",
        f"{f.lost}, {f.won} of {f.prompts}",
        f"{f.p_value:.2g}",
    ]


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Percentage points lost and won by family, setups apart."""
    import matplotlib.pyplot as plt

    setups = [setup for setup in SETUPS if any(row.setup == setup for row in rows)]
    figure, panels = plt.subplots(1, len(setups), figsize=(5.6 * len(setups), 3.4), sharex=True, squeeze=False)
    for panel, setup in zip(panels[0], setups, strict=True):
        chosen = [row for row in rows if row.setup == setup]
        names = [f"{row.family} ({row.flips.prompts})" for row in chosen]
        panel.barh(names, [-100 * r.flips.lost / r.flips.prompts for r in chosen], color="tab:red", label="lost")
        panel.barh(names, [100 * r.flips.won / r.flips.prompts for r in chosen], color="tab:green", label="won")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(f"setup {setup}")
        panel.set_xlabel("% of prompts")
        panel.invert_yaxis()
    panels[0][0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument(
        "--exact-baseline", action="store_true", help="its answers in setup B count for A where A is missing"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of this machine: what answered")
    parser.add_argument("--title", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    rows = compare(read_records(arguments.baseline), read_records(arguments.candidate), arguments.exact_baseline)
    if not rows:
        parser.error("the two files have no prompt in common")
    text = markdown(rows)
    Console().print(Markdown(text))
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        about = machine("accuracy.compare", arguments.device)
        content = [asdict(row) | {"p_value": row.flips.p_value, "points": row.flips.points} for row in rows]
        arguments.json.write_text(json.dumps({"machine": about, "rows": content}, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot, arguments.title)


if __name__ == "__main__":
    main()
