"""Error of attention outputs, ours against the paper's method: `python -m benchmarks.accuracy.attention_error`.

For every layer and head, |o - o_full| / |o_full| of the queries that follow a prompt. The budget counts chunks that are
chosen by score; what is forced comes on top, so the two methods are also compared with equally many attended chunks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown
from tqdm import tqdm

from benchmarks.accuracy import sources
from benchmarks.accuracy.layers import Layer
from benchmarks.accuracy.paper_method import SAME_BYTES, SAME_SHARE, Paper, papers
from benchmarks.accuracy.sealed_method import Sealed
from benchmarks.accuracy.table import table
from benchmarks.accuracy.view import View, attend, full_attention, relative_error
from benchmarks.machine import machine
from vllm_shadowkv.config import LOCAL_CHUNKS

BUDGETS = (128, 512, 2048)
"""Tokens. At 8K they are what 1.6 %, 6 % and 25 % of a prompt are; 2,048 is the default."""
OURS, EDGE, LEFT_OUT = "ours", "ours, block just sealed", "ours, the rest left out"
COLORS = {SAME_SHARE: "tab:gray", SAME_BYTES: "tab:orange", EDGE: "tab:cyan", OURS: "tab:blue", LEFT_OUT: "tab:green"}


@dataclass(frozen=True)
class Record:
    """Errors of one method in one layer.

    Attributes:
        keys: |rebuilt - exact| / |exact| of all keys together.
        all_chunks: the error where nothing is left out: what the keys alone cost.
        equal_budget: by budget.
        equal_attended: by budget, with as many chunks by score as give every method the same number of attended ones.
        heads: per query head, those of `equal_attended` at the highest budget.
    """

    source: str
    layer: str
    method: str
    rank: int
    bytes_per_token: float
    keys: float
    all_chunks: float
    equal_budget: dict[int, float]
    equal_attended: dict[int, float]
    heads: list[float]


def methods(layer: Layer) -> dict[str, Sealed | Paper]:
    """What is compared.

    The paper keeps the last 4 chunks exact. Ours keeps what is open: at least 32 tokens in 31 of 32 steps, and less in
    the steps after a block was sealed. What else the open block has, and the paper has not, does not count for ours.
    The paper leaves out the chunks that are not selected; so does one of ours, to tell what that costs.
    """
    ours = Sealed(exact_tokens=8 * LOCAL_CHUNKS)
    return {
        OURS: ours,
        EDGE: Sealed(),
        LEFT_OUT: replace(ours, rest=False),
        **papers(ours.bytes_per_token(layer), layer),
    }


def measure(source: str, layer: Layer) -> list[Record]:
    """One layer."""
    full = full_attention(layer)
    compared = methods(layer)
    views = {name: method.view(layer) for name, method in compared.items()}
    most_forced = max(view.num_forced for view in views.values())

    def error(view: View, chunks: int) -> torch.Tensor:
        return relative_error(attend(view, layer, chunks), full)

    records = []
    for name, method in compared.items():
        view = views[name]
        exact = layer.keys[: layer.prompt_tokens]
        everything = View(view.keys, view.values, view.landmarks, torch.ones_like(view.forced), view.scored)
        extra = most_forced - view.num_forced
        attended = {budget: error(view, budget // 8 + extra) for budget in BUDGETS}
        records.append(
            Record(
                source,
                layer.name,
                name,
                method.page(layer).rank if isinstance(method, Sealed) else method.rank,
                method.bytes_per_token(layer),
                ((view.keys - exact).norm() / exact.norm()).item(),
                error(everything, 0).mean().item(),
                {budget: error(view, budget // 8).mean().item() for budget in BUDGETS},
                {budget: found.mean().item() for budget, found in attended.items()},
                attended[BUDGETS[-1]].mean(0).tolist(),
            )
        )
    return records


def markdown(records: list[Record]) -> str:
    """Means over layers, by source and method; and how far ours is below the paper's at equal bytes."""
    head = ["keys of", "method", "rank", "bytes a token", "keys", "all chunks"]
    head += [f"{budget} tokens" for budget in BUDGETS] + [f"{budget}, equal attended" for budget in BUDGETS]
    lines = [head]
    for source in dict.fromkeys(r.source for r in records):
        columns: dict[str, list[float]] = {}
        for method in COLORS:
            rows = [r for r in records if (r.source, r.method) == (source, method)]
            columns[method] = [
                statistics.mean(r.keys for r in rows),
                statistics.mean(r.all_chunks for r in rows),
                *(statistics.mean(r.equal_budget[b] for r in rows) for b in BUDGETS),
                *(statistics.mean(r.equal_attended[b] for r in rows) for b in BUDGETS),
            ]
            about = [source, method, str(rows[0].rank), f"{rows[0].bytes_per_token:.0f}"]
            lines.append(about + [f"{value:.3f}" for value in columns[method]])
        for method in (OURS, LEFT_OUT):
            both = zip(columns[method], columns[SAME_BYTES], strict=True)
            change = [f"{100 * (one / other - 1):+.0f} %" for one, other in both]
            lines.append([source, f"{method}, against as many bytes", "", "", *change])
    return table(lines)


def plot(records: list[Record], path: Path) -> None:
    """Error per layer, a panel per source; a dot is a head."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r.source for r in records))
    figure, panels = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.4), squeeze=False)
    for panel, source in zip(panels[0], names, strict=True):
        for shift, (method, color) in zip((-0.3, -0.15, 0, 0.15, 0.3), COLORS.items(), strict=True):
            rows = [r for r in records if (r.source, r.method) == (source, method)]
            for place, row in enumerate(rows):
                panel.plot([place + shift] * len(row.heads), row.heads, ".", color=color, alpha=0.35, markersize=3)
            means = [statistics.mean(row.heads) for row in rows]
            places = [place + shift for place in range(len(rows))]
            panel.plot(places, means, "_", color=color, markersize=12, label=method)
        panel.set_title(source)
        panel.set_xticks(range(max(sum(r.source == source for r in records) // len(COLORS), 1)))
        panel.set_xlabel("layer")
        panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel(f"relative error, budget {BUDGETS[-1]}, equal attended")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    sources.add_arguments(parser)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    found = sources.chosen(arguments)
    every = [(source, layer) for source, layers in found.items() for layer in layers]
    records = [record for source, layer in tqdm(every, desc="layers") for record in measure(source, layer)]
    text = markdown(records)
    Console(width=200).print(Markdown(text))
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        content = {"machine": machine("accuracy.attention_error", "cpu"), "records": [asdict(r) for r in records]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.plot:
        plot(records, arguments.plot)


if __name__ == "__main__":
    main()
