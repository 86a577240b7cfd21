"""Which chunks are found on a real decoder, and at what error: `python -m benchmarks.smollm2.selection`.

SmolLM2 reads texts; of every layer, |o - o_full| / |o_full| of the queries that follow seven sealed blocks, where keys
and values are exact and only the choice of chunks and the estimate of the rest make a difference. It holds the
landmarks and scores of the page against the paper's, and against the choice that nobody can know.

    make real-model
    python -m benchmarks.smollm2.selection --json selection.json --plot selection.png
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.layers import Layer
from benchmarks.accuracy.sealed_method import Sealed
from benchmarks.accuracy.table import table
from benchmarks.accuracy.view import attend, full_attention, relative_error
from benchmarks.smollm2.study import run

QUERIES = 64
BUDGETS = (256, 512, 1024)
"""Tokens: 3.6, 7.1 and 14 % of the prompt; what is forced comes on top."""

EXACT: dict[str, Any] = {"codec": "none", "int8_values": False}
"""Keys and values."""
BEFORE, NOW, BEST = "mean, highest", "leaning, sum", "the best choice"
CHOICES: dict[str, Sealed] = {
    BEFORE: Sealed(**EXACT, landmark_codec="int8", mean_landmarks=True, highest=True),
    f"{BEFORE}, rest left out": Sealed(**EXACT, landmark_codec="int8", mean_landmarks=True, highest=True, rest=False),
    "mean, sum": Sealed(**EXACT, mean_landmarks=True),
    f"{NOW}, not weighed": Sealed(**EXACT, weighed=False),
    "leaning, highest": Sealed(**EXACT, highest=True),
    "leaning in int8, sum": Sealed(**EXACT, landmark_codec="int8"),
    NOW: Sealed(**EXACT),
    f"{NOW}, rest left out": Sealed(**EXACT, rest=False),
    BEST: Sealed(**EXACT),
}
"""Landmarks: the mean of a chunk's keys, or one that leans to those unlike the others, as queries see it; in 4 bits,
but for the paper's and where it says int8. Scores: the highest share of a GQA group, or their sum."""


@dataclass(frozen=True)
class Found:
    """Errors of one choice in one layer over one text, by budget; means over queries and heads."""

    text: str
    layer: int
    choice: str
    errors: dict[int, float]


def measure(text: str, number: int, layer: Layer) -> list[Found]:
    """One layer."""
    full = full_attention(layer)
    found = []
    for name, method in CHOICES.items():
        view = method.view(layer)
        outputs = {budget: attend(view, layer, budget // 8, truly_best=name == BEST) for budget in BUDGETS}
        errors = {budget: relative_error(output, full).mean().item() for budget, output in outputs.items()}
        found.append(Found(text, number, name, errors))
    return found


def means(records: list[Found], choice: str, text: str | None = None) -> list[float]:
    """By budget, over layers and texts, or one text."""
    rows = [r for r in records if r.choice == choice and text in (None, r.text)]
    return [statistics.mean(r.errors[budget] for r in rows) for budget in BUDGETS]


def markdown(records: list[Found]) -> str:
    """Errors over all texts, what changes by a choice, and the text to which it does least good."""
    head = ["landmarks, score", *(f"{budget} tokens" for budget in BUDGETS)]
    head += [f"against {BEFORE}, %", "least of a text, %", "of the way to the best choice, %"]
    before, best = means(records, BEFORE), means(records, BEST)
    lines = [head]
    for choice in CHOICES:
        errors = means(records, choice)
        texts = dict.fromkeys(r.text for r in records)
        changes = [_changes(means(records, choice, text), means(records, BEFORE, text)) for text in texts]
        way = [100 * (b - e) / (b - o) for b, e, o in zip(before, errors, best, strict=True)]
        cells = _changes(errors, before), [max(column) for column in zip(*changes, strict=True)], way
        lines.append([choice, *(f"{e:.3f}" for e in errors), *("/".join(f"{x:+.0f}" for x in cell) for cell in cells)])
    return table(lines)


def _changes(errors: list[float], before: list[float]) -> list[float]:
    return [100 * (error / other - 1) for error, other in zip(errors, before, strict=True)]


def plot(records: list[Found], path: Path) -> None:
    """Errors by budget, a panel per text."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    texts = list(dict.fromkeys(r.text for r in records))
    figure, panels = pyplot.subplots(1, len(texts), figsize=(3.4 * len(texts), 3.8), sharey=True, squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for choice in CHOICES:
            style = ":" if "left out" in choice else "--" if choice == BEST else "-"
            panel.plot(BUDGETS, means(records, choice, text), style, marker=".", label=choice)
        panel.set_title(text)
        panel.set_xscale("log", base=2)
        panel.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
        panel.set_xlabel("budget, tokens")
    panels[0][0].set_ylim(0, 1.05 * max(max(means(records, choice, text)) for choice in CHOICES for text in texts))
    panels[0][0].set_ylabel("relative error of the attention output")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run("selection", __doc__, QUERIES, measure, markdown, plot)
