"""Draws the pictures of the documentation from the code's own numbers: the page layout, and the life of a token.

usage: draw.py [FOLDER]     default: docs/images; tests/test_docs.py checks that those are current
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import PageLayout, plan_page

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
# Text stays text, and equal inputs give equal files.
matplotlib.use("agg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "shadowkv", "font.family": "sans-serif"})

INK, GREY = "#222222", "#777777"
NARROW = 0.07  # no room for a name
EXACT, SHADOW, SLOTS, HOST = "#9ecae9", "#a1d99b", "#fdd0a2", "#dadaeb"


def main(folder: Path) -> None:
    """Draws everything."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("page", draw_page), ("life_of_a_token", draw_life)):
        figure = draw()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def draw_page() -> Any:
    """A page's three encodings, to scale, with the bytes of Llama-3.1-8B."""
    layout = plan_page(ShadowKVConfig(), num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    figure, axes = _canvas(11, 4.4, (0, 1), (0, 3))
    rows = (
        (f"exact page\n{layout.exact_tokens} tokens", EXACT, _exact_sections(layout)),
        (f"shadow page\n{layout.block_size} tokens, rank {layout.rank}", SHADOW, _shadow_sections(layout)),
        (f"slot page\n{layout.slots_per_page} chunks per KV head", SLOTS, _slot_sections(layout)),
    )
    for number, (title, colour, sections) in enumerate(rows):
        bottom = 2.3 - number
        axes.text(0, bottom + 0.2, title, ha="left", va="center", color=INK, fontsize=10)
        left, width = 0.19, 0.805
        axes.add_patch(Rectangle((left, bottom), width, 0.4, fill=False, edgecolor=INK, linewidth=1))
        for name, first, end in sections:
            at, wide = left + width * first / layout.page_bytes, width * (end - first) / layout.page_bytes
            axes.add_patch(Rectangle((at, bottom), wide, 0.4, facecolor=colour, edgecolor=INK, linewidth=0.6))
            if wide > NARROW:
                label = f"{name}\n{(end - first) / 1024:.0f} KiB"
                axes.text(at + wide / 2, bottom + 0.2, label, ha="center", va="center", fontsize=9, color=INK)
        small = [
            f"{name} {end - first:,} B"
            for name, first, end in sections
            if width * (end - first) / layout.page_bytes <= NARROW
        ]
        if small:
            said = textwrap.fill("and " + ", ".join(small), 132)
            axes.text(left, bottom - 0.08, said, ha="left", va="top", fontsize=8, color=GREY)
    text = f"one layer's page of {layout.page_bytes:,} bytes: 8 KV heads of 128, bfloat16, default settings"
    axes.text(0.19, 2.83, text, ha="left", fontsize=10, color=INK)
    return figure


def _exact_sections(layout: PageLayout) -> list[tuple[str, int, int]]:
    half = layout.page_bytes // 2
    return [("keys", 0, half), ("values", half, layout.page_bytes)]


def _shadow_sections(layout: PageLayout) -> list[tuple[str, int, int]]:
    names = {
        "coefficients": "leading coefficients",
        "tail_coefficients": "4-bit coefficients",
        "tail_steps": "steps",
        "basis": "int8 basis",
        "coefficient_scales": "coefficient scales",
        "mean": "mean key",
        "outlier_keys": "outlier keys",
        "landmarks": "4-bit landmarks",
        "landmark_scales": "landmark scales",
        "landmark_mean": "their mean",
        "outlier_ids": "outlier ids",
        "outlier_cosines": "their cosines",
        "mean_values": "mean values",
    }
    return _between(layout, names, end=layout.page_bytes)


def _slot_sections(layout: PageLayout) -> list[tuple[str, int, int]]:
    names = {
        "slot_keys": "rebuilt keys",
        "slot_values": "fetched values",
        "slot_tags": "tags",
        "slot_used": "last use",
        "slot_epoch": "epoch",
    }
    return _between(layout, names, end=layout.slot_epoch + 8)


def _between(layout: PageLayout, names: dict[str, str], end: int) -> list[tuple[str, int, int]]:
    """Sections by their offsets; the last one ends where its bytes do."""
    places = sorted((getattr(layout, field), name) for field, name in names.items())
    last = next(field for field, name in names.items() if name == places[-1][1])
    if last != "slot_epoch":  # what follows the last section of a shadow page is not used
        pages = torch.empty(1, layout.page_bytes, dtype=torch.uint8)
        end = places[-1][0] + layout.view(pages, last).nbytes
    ends = [first for first, _ in places[1:]] + [end]
    return [(name, first, after) for (first, name), after in zip(places, ends, strict=True)]


def draw_life() -> Any:
    """From a token's prefill to its last use."""
    figure, axes = _canvas(11, 4.6, (0, 11), (0, 4.6))
    device = Rectangle((0.05, 1.35), 10.9, 3.2, facecolor="none", edgecolor=GREY, linestyle="--", linewidth=1)
    host = Rectangle((0.05, 0.05), 10.9, 1.1, facecolor="none", edgecolor=GREY, linestyle="--", linewidth=1)
    for place in (device, host):
        axes.add_patch(place)
    axes.text(10.85, 4.38, "device", ha="right", fontsize=9, color=GREY)
    axes.text(10.85, 0.14, "host", ha="right", fontsize=9, color=GREY)
    boxes = {
        "open": _box(axes, 0.3, 2.4, EXACT, "exact pages", "a token's K and V,\nopen until its block\nis complete"),
        "sealed": _box(
            axes, 3.1, 2.4, SHADOW, "shadow page", "landmarks, low-rank\nfactors, outliers,\nmean of 1,024 values"
        ),
        "slots": _box(axes, 5.9, 2.4, SLOTS, "slots", "rebuilt K, fetched V\nof selected chunks,\nkept between steps"),
        "attend": _box(axes, 8.7, 2.4, "#ffffff", "attention", "slots, open tokens:\nexactly; the rest:\nestimated"),
        "pool": _box(axes, 3.1, 0.25, HOST, "host pool", "values of 1,024 tokens", height=0.75),
    }
    _arrow(axes, boxes["open"]["right"], boxes["sealed"]["left"], "seal")
    _arrow(axes, (1.9, 2.4), (3.1, 0.75), "")
    axes.text(2.25, 1.75, "values", ha="right", va="center", fontsize=9, color=INK)
    _arrow(axes, boxes["sealed"]["right"], boxes["slots"]["left"], "select,\nrebuild")
    _arrow(axes, (5.1, 0.65), (6.4, 2.4), "")
    axes.text(6.05, 1.75, "fetch", ha="left", va="center", fontsize=9, color=INK)
    _arrow(axes, boxes["slots"]["right"], boxes["attend"]["left"], "")
    arc = FancyArrowPatch(
        (1.3, 3.85), (9.7, 3.85), connectionstyle="arc3,rad=-0.06", arrowstyle="-|>", mutation_scale=14, color=INK
    )
    axes.add_patch(arc)
    axes.text(5.5, 4.25, "prefill, and the newest tokens of a decode step", ha="center", fontsize=9, color=INK)
    text = "once per 1,024 tokens: seal\nevery decode step: select, rebuild, fetch, attend"
    axes.text(6.6, 0.6, text, ha="left", va="center", fontsize=9, color=INK)
    return figure


def _canvas(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Any, Any]:
    figure = pyplot.figure(figsize=(width, height))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(x)
    axes.set_ylim(y)
    axes.axis("off")
    figure.patch.set_facecolor("white")
    return figure, axes


def _box(axes: Any, left: float, bottom: float, colour: str, title: str, text: str, height: float = 1.4) -> Any:
    width = 2.0
    style = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour)
    style.set_edgecolor(INK)
    axes.add_patch(style)
    centred = {"ha": "center", "va": "center", "color": INK}
    axes.text(left + width / 2, bottom + height - 0.22, title, fontsize=11, weight="bold", **centred)
    axes.text(left + width / 2, bottom + (height - 0.35) / 2, text, fontsize=9, **centred)
    middle = bottom + height / 2
    return {"left": (left, middle), "right": (left + width, middle)}


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK, shrinkA=2, shrinkB=2))
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(x, y + 0.08, text, ha="center", va="bottom", fontsize=9, color=INK)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
