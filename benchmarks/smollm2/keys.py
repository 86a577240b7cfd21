"""What sealed keys cost on a real decoder, by their codes: `python -m benchmarks.smollm2.keys`.

SmolLM2 reads texts; of every layer, |o - o_full| / |o_full| of the queries that follow seven sealed blocks, with the
default budget and with everything selected, and |k - k_full| / |k_full - mean| of the keys. Values are exact. A page is
one of bf16, whatever the model computes in.

    make real-model
    python -m benchmarks.smollm2.keys --json keys.json --plot keys.png
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
BUDGETS = {"2,048 tokens": 2048, "all": 8192}

VALUES: dict[str, Any] = {"int8_values": False}
PAGE, ALIKE, EIGHT, EXACT = "the page's", "not weighed", "8 bits", "exact"
CODES: dict[str, Sealed] = {
    PAGE: Sealed(**VALUES),
    ALIKE: Sealed(**VALUES, weighed=False),
    EIGHT: Sealed(**VALUES, eight_bits=True),
    f"{PAGE}, compression 4": Sealed(**VALUES, compression=4),
    f"{ALIKE}, compression 4": Sealed(**VALUES, compression=4, weighed=False),
    EXACT: Sealed(**VALUES, codec="none"),
}


@dataclass(frozen=True)
class Lost:
    """Errors of one code in one layer over one text; means over queries and heads."""

    text: str
    layer: int
    code: str
    rank: int
    leading: int
    keys: float
    outputs: dict[str, float]


def measure(text: str, number: int, layer: Layer) -> list[Lost]:
    """One layer."""
    full, found = full_attention(layer), []
    keys = layer.keys[: layer.prompt_tokens]
    blocks = layer.pre_rope().unflatten(0, (-1, 1024))
    apart = (blocks - blocks.mean(1, keepdim=True)).norm()
    for name, method in CODES.items():
        view, page = method.view(layer), method.page(layer)
        rank, leading = (page.rank, page.leading_rank) if name != EXACT else (0, 0)
        errors = {
            budget: relative_error(attend(view, layer, tokens // 8), full).mean().item()
            for budget, tokens in BUDGETS.items()
        }
        found.append(Lost(text, number, name, rank, leading, ((view.keys - keys).norm() / apart).item(), errors))
    return found


def of_code(records: list[Lost], code: str, text: str | None = None) -> list[Lost]:
    """Its records, of all texts or one."""
    return [record for record in records if record.code == code and text in (None, record.text)]


def markdown(records: list[Lost]) -> str:
    """A line per code: rank, error of keys, of outputs, and of outputs on the text that suffers most."""
    lines = [["coefficients", "rank, of 8 bits", "error of keys", *(f"of outputs, {b}" for b in BUDGETS), "worst text"]]
    for code in CODES:
        rows = of_code(records, code)
        texts = dict.fromkeys(row.text for row in rows)
        outputs = [statistics.mean(row.outputs[budget] for row in rows) for budget in BUDGETS]
        first = next(iter(BUDGETS))
        worst = max(statistics.mean(row.outputs[first] for row in of_code(records, code, text)) for text in texts)
        rank = f"{rows[0].rank}, {rows[0].leading}" if rows[0].rank else ""
        keys = statistics.mean(row.keys for row in rows)
        lines.append([code, rank, f"{keys:.3f}", *(f"{output:.3f}" for output in outputs), f"{worst:.3f}"])
    return table(lines)


def plot(records: list[Lost], path: Path) -> None:
    """Errors of outputs by layer, a panel per text."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    texts = list(dict.fromkeys(record.text for record in records))
    figure, panels = pyplot.subplots(1, len(texts), figsize=(3.4 * len(texts), 3.4), sharey=True, squeeze=False)
    budget = next(iter(BUDGETS))
    for panel, text in zip(panels[0], texts, strict=True):
        for code in CODES:
            rows = of_code(records, code, text)
            panel.plot([row.layer for row in rows], [row.outputs[budget] for row in rows], ".-", label=code)
        panel.set_title(text)
        panel.set_xlabel("layer")
        panel.set_yscale("log")
    panels[0][0].set_ylabel(f"error of the output, {budget}")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(CODES), fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run("keys", __doc__, QUERIES, measure, markdown, plot)
