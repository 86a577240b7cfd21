"""One choice of the method at a time, against the error of attention outputs: `python -m benchmarks.accuracy.studies`.

Everything else stays at its default. Ranks are what fits the page, so more outliers take their bytes from the rank;
"equal rank" is that of the default page.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy import sources
from benchmarks.accuracy.layers import Layer
from benchmarks.accuracy.sealed_method import Sealed
from benchmarks.accuracy.table import table
from benchmarks.accuracy.view import View, attend, full_attention, relative_error
from benchmarks.machine import machine

BUDGET = 2048


@dataclass(frozen=True)
class Variant:
    """One point of a study.

    Attributes:
        study, label: where it stands.
        method: what is measured.
        budget: tokens.
        rank_share: of the page's rank; None leaves it to the page of this method.
        context: so many of the prompt's newest tokens stand alone, as a shorter prompt; None: all.
    """

    study: str
    label: str
    method: Sealed
    budget: int = BUDGET
    rank_share: float | None = None
    context: int | None = None


def variants() -> list[Variant]:
    """All studies, their points in the order of the plot."""
    default = Sealed()

    def points(study: str, changes: dict[str, dict[str, Any]], rank_share: float | None = None) -> list[Variant]:
        return [
            Variant(study, label, replace(default, **change), BUDGET, rank_share) for label, change in changes.items()
        ]

    shares = (0.25, 0.5, 0.75, 1, 1.5, 2)
    budgets = (64, 128, 256, 512, 1024, 2048, 4096)
    contexts = (1024, 2048, 3072, 4096, 5120, 6144, 8192)
    blocks = {str(size): {"block_size": size} for size in (256, 512, 1024, 2048, 4096)}
    return [
        *(Variant("rank, of the page's", f"{share:g}", default, rank_share=share) for share in shares),
        *points("tokens that share a basis, equal rank", blocks | {"prompt": {"block_size": None}}, 1),
        *points("chunk size, equal rank", {str(size): {"chunk_size": size} for size in (4, 8, 16, 32)}, 1),
        *(Variant("budget", str(budget), default, budget) for budget in budgets),
        *(Variant("context, for dense_threshold", str(n), default, context=n) for n in contexts),
        *points("outliers a block, rank pays", {str(n): {"num_outliers": n} for n in (0, 1, 2, 4, 8)}),
        *points("factors", {"exact keys": {"codec": "none"}, "8 and 4 bits": {}, "8 bits": {"eight_bits": True}}),
        *points("factors", {"bf16, same rank": {"codec": "bf16"}, "not centred": {"centred": False}}, 1),
        *points("factors", {"not weighed": {"weighed": False}}),
        *points("factors", {"bf16, same bytes": {"codec": "bf16"}}, 0.5),
        *points("landmarks, values", {"4-bit landmarks": {}, "int8 landmarks": {"landmark_codec": "int8"}}),
        *points("landmarks, values", {"fp32 landmarks": {"landmark_codec": "none"}}),
        *points("landmarks, values", {"mean landmarks": {"mean_landmarks": True}}),
        *points("landmarks, values", {"highest of a group": {"highest": True}}),
        *points("landmarks, values", {"values not in int8": {"int8_values": False}}),
        *points("tokens that share a mean value", {"rest left out": {"rest": False}}),
        *points("tokens that share a mean value", {str(n): {"mean_value_tokens": n} for n in (1024, 256, 64, 8)}),
        *points("decode_exact_tokens", {str(n): {"exact_tokens": n} for n in (0, 32, 128, 512, 1024)}),
    ]


def errors(layer: Layer, studied: list[Variant]) -> list[float]:
    """The mean error over queries and heads, for every variant."""
    views: dict[tuple[int, Sealed], View] = {}  # many variants differ in the budget only
    full: dict[int, Tensor] = {}
    found = []
    for variant in studied:
        method, context = variant.method, min(variant.context or layer.prompt_tokens, layer.prompt_tokens)
        prompt = newest(layer, context)
        if context not in full:
            full[context] = full_attention(prompt)
        if variant.rank_share is not None:
            method = replace(method, rank=round(variant.rank_share * Sealed().page(layer).rank))
        if (context, method) not in views:
            views[context, method] = method.view(prompt)
        output = attend(views[context, method], prompt, variant.budget // method.chunk_size)
        found.append(relative_error(output, full[context]).mean().item())
    return found


def newest(layer: Layer, context: int) -> Layer:
    """The layer as if the prompt began `context` tokens before its end.

    Its keys keep the rotation of their old places: one more turn for all of them, which changes neither what attention
    gives nor how well a basis fits.
    """
    first = layer.prompt_tokens - context
    return replace(layer, keys=layer.keys[first:], values=layer.values[first:], prompt_tokens=context)


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """A panel per study, a curve per source."""
    import matplotlib.pyplot as plt

    columns = 4
    rows = -(-len(results) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4 * columns, 3.3 * rows), squeeze=False)
    for panel, (study, points) in zip(panels.flat, results.items(), strict=False):
        for source in next(iter(points.values())):
            panel.plot(list(points), [values[source] for values in points.values()], "o-", markersize=3, label=source)
        panel.set_title(study, fontsize=9)
        panel.set_ylim(bottom=0)
        panel.tick_params(axis="x", labelsize=7, rotation=30 if max(map(len, points)) > 8 else 0)
    for panel in list(panels.flat)[len(results) :]:
        panel.axis("off")
    panels[0][0].legend(fontsize=7)
    figure.supylabel("relative error of attention outputs")
    figure.tight_layout(rect=(0.02, 0, 1, 1))
    figure.savefig(path, dpi=110)


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A table of every point."""
    names = list(next(iter(next(iter(results.values())).values())))
    lines = [["study", "", *names]]
    for study, points in results.items():
        lines += [[study, label, *(f"{values[name]:.4f}" for name in names)] for label, values in points.items()]
    return table(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    sources.add_arguments(parser)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    found = sources.chosen(arguments)
    studied = variants()
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tqdm(total=sum(map(len, found.values())), desc="layers") as bar:
        for source, layers in found.items():
            of_layers = []
            for layer in layers:
                of_layers.append(errors(layer, studied))
                bar.update()
            for variant, values in zip(studied, zip(*of_layers, strict=True), strict=True):
                results.setdefault(variant.study, {}).setdefault(variant.label, {})[source] = statistics.mean(values)
    if arguments.json:
        about = {"machine": machine("accuracy.studies", "cpu"), "default": asdict(Sealed()), "budget": BUDGET}
        arguments.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(results))
    if arguments.plot:
        plot(results, arguments.plot)
    print(markdown(results))


if __name__ == "__main__":
    main()
