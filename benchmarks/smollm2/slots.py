"""How many of a step's chunks are in slots already, on a real decoder: `python -m benchmarks.smollm2.slots`.

SmolLM2 reads texts; what each of 256 consecutive tokens would select of seven sealed blocks goes through slots of which
the least recently used is given up. The first 32 steps fill them and do not count. Every third layer.

    make real-model
    python -m benchmarks.smollm2.slots --json slots.json
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from dataclasses import dataclass

from benchmarks.accuracy.layers import Layer
from benchmarks.accuracy.sealed_method import Sealed
from benchmarks.accuracy.table import table
from benchmarks.accuracy.view import choose
from benchmarks.smollm2.study import PROMPT, run

STEPS, FILLING = 256, 32
BUDGETS = (128, 256, 512, 2048)
"""Tokens: 1.8, 3.6, 7.1 and 29 % of the prompt. At 122,000 tokens the default of 2,048 is 1.7 %."""
SLOTS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""As many times as a step selects."""


@dataclass(frozen=True)
class Kept:
    """Share of a step's chunks that were in slots, by `SLOTS`; means over steps and KV heads of a layer."""

    text: str
    layer: int
    budget: int
    hits: dict[float, float]


def hit_share(steps: list[list[int]], slots: int) -> float:
    """Share of the chunks that steps after the first `FILLING` found in `slots` slots.

    Args:
        steps: chunks of each step.
        slots: at least as many as a step selects.
    """
    kept: OrderedDict[int, None] = OrderedDict()
    hits = wanted = 0
    for number, chunks in enumerate(steps):
        if number >= FILLING:
            hits += sum(chunk in kept for chunk in chunks)
            wanted += len(chunks)
        for chunk in chunks:
            kept[chunk] = None
            kept.move_to_end(chunk)
        while len(kept) > slots:
            kept.popitem(last=False)
    return hits / wanted


def measure(text: str, number: int, layer: Layer) -> list[Kept]:
    """One layer."""
    view = Sealed(codec="none").view(layer)
    found = []
    for budget in BUDGETS:
        heads = []
        for head in range(len(view.forced)):
            chosen, _ = choose(view, layer, head, budget // 8)
            steps = [row.nonzero().flatten().tolist() for row in chosen]
            heads.append([hit_share(steps, round(times * len(steps[0]))) for times in SLOTS])
        hits = {times: statistics.mean(column) for times, column in zip(SLOTS, zip(*heads, strict=True), strict=True)}
        found.append(Kept(text, number, budget, hits))
    return found


def markdown(records: list[Kept]) -> str:
    """Means over texts and layers, and the least and the most of a text."""
    lines = [["budget, tokens", *(f"slots for {times:g} times a step" for times in SLOTS)]]
    for budget in BUDGETS:
        cells = []
        for times in SLOTS:
            by_text: dict[str, list[float]] = {}
            for record in records:
                if record.budget == budget:
                    by_text.setdefault(record.text, []).append(record.hits[times])
            means = [statistics.mean(hits) for hits in by_text.values()]
            cells.append(f"{statistics.mean(means):.2f} ({min(means):.2f} to {max(means):.2f})")
        lines.append([f"{budget:,} ({budget / PROMPT:.1%})", *cells])
    return table(lines)


if __name__ == "__main__":
    run("slots", __doc__, STEPS, measure, markdown, every=3)
