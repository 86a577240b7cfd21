"""The needle tasks answered with the paper's method and with ours: `python -m benchmarks.accuracy.needle_methods`.

In PyTorch, on the views of `paper_method` and `sealed_method`, because the paper's method runs in no server: what the
backend itself answers, `collect` tells. A haystack is computed once and exactly; then

* setup A: the question is computed exactly too, the whole prompt is compressed, and the answer is decoded;
* setup B: the haystack is compressed, and the question is computed over what is left of it: by the paper's method like
  decoded tokens, one after the other; by ours over all of its sealed chunks, as the backend does.

Tokens behind what a method compresses are exact: for the paper at most 7, for ours those of the open block.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy.collect import SETUPS, by_context, continued, read_records
from benchmarks.accuracy.layers import Layer, rotary_table
from benchmarks.accuracy.paired import Flips
from benchmarks.accuracy.paper_method import SAME_BYTES, SAME_SHARE, Paper, papers
from benchmarks.accuracy.samples import Sample, needles
from benchmarks.accuracy.sealed_method import Sealed
from benchmarks.accuracy.table import table
from benchmarks.accuracy.view import View, attend
from benchmarks.machine import machine
from benchmarks.needle import CHECKPOINT
from benchmarks.needle.context import ExactContext
from benchmarks.needle.evaluate import decode, load_model, prefill
from benchmarks.needle.model import NeedleConfig, NeedleModel
from benchmarks.needle.tasks import FAMILIES
from vllm_shadowkv.rotary import Rotary

FULL = "full"
OURS, OURS_ATTENDED = "ours", "ours, as many attended"
METHODS = (OURS, OURS_ATTENDED, SAME_SHARE, SAME_BYTES)


class Cache(ExactContext):
    """One layer's keys and values, rounded to bf16, of which a method may keep less than all.

    Attributes:
        view: what it keeps of the first tokens; None: everything. Tokens behind those are exact.
        chunks: how many of the view are chosen by score.
    """

    def __init__(self, config: NeedleConfig, k_pre: Tensor, v: Tensor, rotary: Rotary) -> None:
        """Takes pre-RoPE keys and values `[num_kv_heads, tokens, head_size]`."""
        super().__init__(config, k_pre, v)
        self.keys, self.values = (x.bfloat16().float() for x in (self.keys, self.values))
        self.rotary, self.view, self.chunks = rotary, None, 0

    def read_through(self, view: View | None, chunks: int) -> Cache:
        """A copy; what is appended to one is not in the other."""
        cache = copy.copy(self)
        cache.view, cache.chunks = view, chunks
        return cache

    def layer(self, prompt_tokens: int, q: Tensor | None = None) -> Layer:
        """As the methods take it; q `[heads, head_size]` is of the newest token."""
        keys, values = (x.transpose(0, 1) for x in (self.keys, self.values))
        return Layer("", keys, values, torch.empty(0) if q is None else q[None], prompt_tokens, self.rotary)

    def attend(self, q: Tensor) -> Tensor:
        """Attention of post-RoPE q `[heads, head_size]`."""
        if self.view is None:
            return super().attend(q)
        return attend(self.view, self.layer(len(self.view.keys), q), self.chunks)[0]


def views_of(cache: Cache) -> dict[str, tuple[View, int]]:
    """What each method keeps of all that is cached, and how many chunks it chooses beyond the budget."""
    tokens = cache.keys.shape[1]
    sealed, whole = (cache.layer(tokens // size * size) for size in (Sealed.block_size, Paper.chunk_size))
    ours = Sealed()
    view = ours.view(sealed)
    theirs = {name: paper.view(whole) for name, paper in papers(ours.bytes_per_token(sealed), whole).items()}
    extra = theirs[SAME_BYTES].num_forced - view.num_forced
    return {OURS: (view, 0), OURS_ATTENDED: (view, extra)} | {name: (paper, 0) for name, paper in theirs.items()}


class Haystack:
    """A context computed once, and questions about it."""

    def __init__(self, model: NeedleModel, context: list[int]) -> None:
        """Computes it."""
        self.model, self.tokens = model, len(context)
        config = model.config
        # Questions and answers take few tokens more.
        rotary = rotary_table(self.tokens + 256, config.head_dim, config.rope_theta)
        _, layers = prefill(model, context)
        self.caches = [Cache(config, k_pre, v, rotary) for k_pre, v in layers]
        self._views: list[dict[str, tuple[View, int]]] | None = None

    def ask(self, sample: Sample, setup: str, budgets: list[int]) -> dict[str, bool]:
        """Whether the answer is right, by method and budget."""
        exact = [cache.read_through(None, 0) for cache in self.caches]
        first = self._feed(sample.question, exact)
        if setup == "A":
            views = [views_of(cache) for cache in exact]
        else:
            views = self._views = self._views or [views_of(cache) for cache in self.caches]
        found = {FULL: self._answers(sample, first, [cache.read_through(None, 0) for cache in exact])}
        for method, budget in product(METHODS, budgets):
            token, chosen = first, [budget // Paper.chunk_size + view[method][1] for view in views]
            caches = exact
            if setup == "B":
                while_asked = [self.tokens] * len(views) if method in (OURS, OURS_ATTENDED) else chosen
                caches = self._through(self.caches, views, method, while_asked)
                token = self._feed(sample.question, caches)
            caches = self._through(caches, views, method, chosen)
            found[f"{method}, {budget}"] = self._answers(sample, token, caches)
        return found

    @staticmethod
    def _through(
        caches: list[Cache], views: list[dict[str, tuple[View, int]]], method: str, chunks: list[int]
    ) -> list[Cache]:
        """Copies that are read by a method, so many chunks in each layer; more than there are: all."""
        return [
            cache.read_through(view[method][0], count) for cache, view, count in zip(caches, views, chunks, strict=True)
        ]

    def _feed(self, question: list[int], caches: list[Cache]) -> int:
        """Computes the question's tokens and returns the next one."""
        for place, token in enumerate(question, self.tokens):
            following = decode(self.model, token, place, caches)
        return following

    def _answers(self, sample: Sample, first: int, caches: list[Cache]) -> bool:
        """Whether greedy decoding gives the answer, whose first token is there; the caches grow."""
        assert sample.answer is not None
        if first != sample.answer[0]:
            return False
        start = self.tokens + len(sample.question)
        return all(
            decode(self.model, token, start + i, caches) == expected
            for i, (token, expected) in enumerate(pairwise(sample.answer))
        )


@torch.inference_mode()
def collect(model: NeedleModel, samples: Iterator[Sample], budgets: list[int], out: Path, total: int) -> None:
    """Appends a line per question and setup to `out`, without those that are there already."""
    done = {(record["name"], record["setup"]) for record in read_records(out)}
    with continued(out) as file, tqdm(total=total, unit="answers", mininterval=5) as bar:
        for group in by_context(samples):
            wanted = [(s, setup) for s in group for setup in SETUPS if (s.name, setup) not in done]
            haystack = Haystack(model, group[0].context) if wanted else None
            for sample, setup in wanted:
                right = haystack.ask(sample, setup, budgets)
                record = {"name": sample.name, "family": sample.family, "setup": setup, "right": right}
                file.write(json.dumps(record) + "\n")
                file.flush()
            bar.update(len(SETUPS) * len(group))


@dataclass(frozen=True)
class Row:
    """A family in a setup: how each method's answers differ from full attention's."""

    family: str
    setup: str
    flips: dict[str, Flips]


def compare(records: list[dict[str, Any]]) -> list[Row]:
    """Rows by setup and family."""
    groups: dict[tuple[str, str], list[dict[str, bool]]] = defaultdict(list)
    for record in records:
        groups[record["setup"], record["family"]].append(record["right"])
    return [
        Row(
            family,
            setup,
            {name: Flips.of([r[FULL] for r in found], [r[name] for r in found]) for name in found[0] if name != FULL},
        )
        for (setup, family), found in sorted(groups.items())
    ]


def markdown(rows: list[Row]) -> str:
    """Percent right."""
    names = list(rows[0].flips)
    lines = [["setup", "family", "prompts", FULL, *names]]
    for row in rows:
        some = next(iter(row.flips.values()))
        percents = [100 * flips.candidate / flips.prompts for flips in row.flips.values()]
        full = f"{100 * some.baseline / some.prompts:.1f}"
        lines.append([row.setup, row.family, str(some.prompts), full, *(f"{value:.1f}" for value in percents)])
    for setup in SETUPS:
        flips = [row.flips for row in rows if row.setup == setup]
        if flips:
            prompts = sum(f[names[0]].prompts for f in flips)
            full = f"{100 * sum(f[names[0]].baseline for f in flips) / prompts:.1f}"
            means = [f"**{100 * sum(f[name].candidate for f in flips) / prompts:.1f}**" for name in names]
            lines.append([setup, "**all**", str(prompts), full, *means])
    return table(lines)


@dataclass(frozen=True)
class Duel:
    """Both methods' answers to the questions of all families; `flips` has the paper's as its baseline."""

    setup: str
    budget: int
    ours: str
    paper: str
    flips: Flips


def duels(records: list[dict[str, Any]], budgets: list[int]) -> list[Duel]:
    """Each of ours against each of the paper's."""
    found = []
    pairs = product(budgets, (OURS, OURS_ATTENDED), (SAME_BYTES, SAME_SHARE))
    for setup, (budget, ours, paper) in product(SETUPS, pairs):
        rights = [record["right"] for record in records if record["setup"] == setup]
        if rights:
            theirs, our = ([right[f"{name}, {budget}"] for right in rights] for name in (paper, ours))
            found.append(Duel(setup, budget, ours, paper, Flips.of(theirs, our)))
    return found


def duels_markdown(found: list[Duel]) -> str:
    """How often only one of the two is right."""
    lines = [["setup", "budget", "ours", "the paper's", "prompts", "only ours right", "only the paper's right", "p"]]
    for duel in found:
        flips = duel.flips
        counts = (duel.budget, duel.ours, duel.paper, flips.prompts, flips.won, flips.lost)
        lines.append([duel.setup, *map(str, counts), f"{flips.p_value:.2g}"])
    return table(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON lines; continued if it exists")
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--tokens", type=int, default=4200, help="of each prompt")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--haystacks", type=int, default=20)
    parser.add_argument("--questions", type=int, default=10, help="per haystack")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 2048], help="tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    families = tuple(arguments.families)
    samples = needles(arguments.tokens, arguments.haystacks, arguments.questions, families)
    total = len(SETUPS) * len(families) * arguments.haystacks * arguments.questions
    collect(load_model(arguments.model), samples, arguments.budgets, arguments.out, total)
    records = read_records(arguments.out)
    rows, found = compare(records), duels(records, arguments.budgets)
    text = f"{markdown(rows)}\n{duels_markdown(found)}"
    Console(width=200).print(Markdown(text))
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        about = {"model": arguments.model.name, "tokens": arguments.tokens, "budgets": arguments.budgets}
        content = {"machine": machine("accuracy.needle_methods", "cpu"), **about}
        content |= {"rows": [asdict(row) for row in rows], "duels": [asdict(duel) for duel in found]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
