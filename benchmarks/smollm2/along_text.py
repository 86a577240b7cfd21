"""What sealing changes along real texts, decoded token by token: `python -m benchmarks.smollm2.along_text`.

SmolLM2 reads the beginning of a text and then decodes what really follows, whatever it would rather say, with stock
attention and with shadowkv. Of each step there is the whole distribution of the next token, so there are its divergence
from full attention's and the perplexity of what follows. Setup A: the prompt is computed at once, exactly, and only
decoded tokens read sealed blocks. Setup B: the prompt is asked again, and what lies behind its last sealed block is
computed over sealed blocks too.

    make real-model
    python -m benchmarks.smollm2.along_text --json along.json --markdown along.md --plot along.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from benchmarks.accuracy.table import table
from benchmarks.alone import alone
from benchmarks.machine import machine
from benchmarks.progress import track
from benchmarks.smollm2 import SMOLLM2
from benchmarks.smollm2.settings import NAMES, SHARES, shadowkv
from benchmarks.smollm2.texts import DIALOGUES, TEXTS
from benchmarks.wheels import MissingError

LENGTHS = (4352, 7424)
"""Tokens of a prompt: 4 and 7 sealed blocks, and a quarter of a block that is open."""

POOL_GIB = 1
"""For a text: holds its prompt, and twice its window of exact pages, in float32."""


@dataclass(frozen=True)
class Job:
    """One engine.

    Attributes:
        settings: of `NAMES`.
        dtype: of the model and its cache.
        tokens: of a prompt.
        steps: tokens that are decoded.
        texts: names in `TEXTS`.
        scratch: where distributions of full attention are kept.
    """

    settings: str
    dtype: str
    tokens: int
    steps: int
    texts: tuple[str, ...]
    scratch: Path


@dataclass(frozen=True)
class Row:
    """One text with one engine in one setup.

    Attributes:
        budget: tokens that a step selects.
        divergence: of the next token's distribution from full attention's, nats, mean over steps.
        divergence_error: its standard error, were steps independent.
        divergence_p99, divergence_max: over steps.
        same_first: share of steps whose likeliest token is full attention's.
        nats, nats_full: of the text's own next token, mean over steps; of full attention.
        nats_error: standard error of their difference, were steps independent.
        by_hundred: of each hundred steps, mean divergence, mean nats of full attention, and how many more ours takes.
        cached: tokens of the prompt that came from the prefix cache.
        seconds: of the request, together with the other texts'.
    """

    text: str
    dtype: str
    tokens: int
    steps: int
    settings: str
    setup: str
    budget: int
    divergence: float
    divergence_error: float
    divergence_p99: float
    divergence_max: float
    same_first: float
    nats: float
    nats_full: float
    nats_error: float
    by_hundred: list[tuple[float, float, float]]
    cached: int
    seconds: float

    @property
    def perplexity_change(self) -> float:
        """Relative to full attention's."""
        return math.exp(self.nats - self.nats_full) - 1


def divergences(full: Tensor, ours: Tensor) -> Tensor:
    """Kullback-Leibler, nats, float64 `[steps]`, of log-probabilities `[steps, vocabulary]`."""
    full, ours = full.double(), ours.double()
    return (full.exp() * (full - ours)).sum(-1).clamp_min(0)


def compare(full: Tensor, ours: Tensor, tokens: list[int]) -> dict[str, Any]:
    """What a row says of the distributions, `[steps, vocabulary]`, along `tokens`."""
    apart = divergences(full, ours)
    said = torch.tensor(tokens)[:, None]
    nats, nats_full = (-of.gather(1, said).double().flatten() for of in (ours, full))
    hundreds = (torch.stack((apart, nats_full, nats - nats_full), 1)).split(100)
    return {
        "divergence": apart.mean().item(),
        "divergence_error": (apart.std(correction=0) / len(apart) ** 0.5).item(),
        "divergence_p99": apart.quantile(0.99).item(),
        "divergence_max": apart.max().item(),
        "same_first": (full.argmax(-1) == ours.argmax(-1)).double().mean().item(),
        "nats": nats.mean().item(),
        "nats_full": nats_full.mean().item(),
        "nats_error": ((nats - nats_full).std(correction=0) / len(nats) ** 0.5).item(),
        "by_hundred": [tuple(round(of, 5) for of in hundred.mean(0).tolist()) for hundred in hundreds],
    }


def run(job: Job) -> list[Row]:
    """Rows of all texts; with stock attention none, but their distributions in `job.scratch`."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that `Recorded` is in this process
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # it refuses this kind of logits processor
        "VLLM_CPU_KVCACHE_SPACE": str(POOL_GIB * len(job.texts)),
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers import AutoTokenizer

    from benchmarks.accuracy.ask import Engine, Request
    from benchmarks.accuracy.recorded import Recorded

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2.get())
    prompts, forced = {}, {}
    for text in job.texts:
        ids = tokenizer(TEXTS[text]())["input_ids"]
        if len(ids) < job.tokens + job.steps:
            raise ValueError(f"the text {text!r} has {len(ids)} tokens, not {job.tokens + job.steps}")
        prompts[text], forced[text] = ids[: job.tokens], ids[job.tokens : job.tokens + job.steps]
    ours = shadowkv(job.settings, job.tokens)
    options: dict[str, Any] = {} if ours is None else {"attention_backend": "shadowkv"}
    if ours is not None:
        options["additional_config"] = {"shadowkv": ours}
    engine = Engine(
        str(SMOLLM2.get()),
        0,
        False,
        logits_processors=["benchmarks.accuracy.recorded:Recorded"],
        dtype=job.dtype,
        max_model_len=job.tokens + job.steps + 16,
        max_num_seqs=len(job.texts),
        enforce_eager=True,
        **options,
    )
    rows = []
    for setup in "A" if ours is None else "AB":
        began = time.perf_counter()
        # The same salt: what A computed is what B finds.
        replies = engine([Request(prompts[text], job.steps, text, forced[text]) for text in job.texts])
        seconds = time.perf_counter() - began
        for text, reply in zip(job.texts, replies, strict=True):
            found, kept = Recorded.take(forced[text]), job.scratch / f"{text}.npy"
            if ours is None:
                np.save(kept, found.numpy())
                continue
            about = (text, job.dtype, job.tokens, job.steps, job.settings, setup, ours.get("sparse_budget", 2048))
            numbers = compare(torch.from_numpy(np.load(kept)), found, forced[text])
            rows.append(Row(*about, **numbers, cached=reply.cached_tokens or 0, seconds=seconds))
    return rows


def markdown(rows: list[Row]) -> str:
    """A table: a line per text and settings, the setups side by side."""
    columns = ("divergence, nats", "99 %", "same first", "perplexity")
    lines = [["dtype", "tokens", "text", "perplexity, full", "settings", *(f"{s}: {c}" for s in "AB" for c in columns)]]
    pairs: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault((row.dtype, row.tokens, row.text, row.settings), {})[row.setup] = row
    for (dtype, tokens, text, settings), found in pairs.items():
        full = math.exp(next(iter(found.values())).nats_full)
        cells = [dtype, f"{tokens:,}", text, f"{full:.2f}", settings]
        for setup in "AB":
            row = found[setup]
            cells += [f"{row.divergence:.4f} ± {row.divergence_error:.4f}", f"{row.divergence_p99:.2f}"]
            change = f"{100 * row.perplexity_change:+.1f} ± {100 * row.nats_error:.1f} %"
            cells += [f"{100 * row.same_first:.1f} %", change]
        lines.append(cells)
    return table(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Divergence and perplexity by settings and text; both setups."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row.dtype, row.tokens) for row in rows))
    texts = list(dict.fromkeys(row.text for row in rows))
    size = (1.5 + 4 * len(groups), 6.5)
    figure, axes = pyplot.subplots(2, len(groups), figsize=size, squeeze=False, sharey="row", layout="constrained")
    for column, group in enumerate(groups):
        here = [row for row in rows if (row.dtype, row.tokens) == group]
        names = list(dict.fromkeys(row.settings for row in here))
        for number, text in enumerate(texts):
            for setup, fill in (("A", 1.0), ("B", 0.45)):
                found = {row.settings: row for row in here if row.text == text and row.setup == setup}
                width = 0.8 / (2 * len(texts))
                places = [i + (2 * number + (setup == "B")) * width for i, name in enumerate(names) if name in found]
                chosen = [found[name] for name in names if name in found]
                look: dict[str, Any] = {"color": f"C{number}", "alpha": fill, "align": "edge"}
                label = f"{text}, {setup}"
                axes[0][column].bar(places, [row.divergence for row in chosen], width, label=label, **look)
                error: dict[str, Any] = {"yerr": [100 * row.nats_error for row in chosen], "ecolor": "grey"}
                axes[1][column].bar(places, [100 * row.perplexity_change for row in chosen], width, **look, **error)
        for axis in axes[:, column]:
            axis.set_xticks([i + 0.4 for i in range(len(names))], names)
        axes[0][column].set_yscale("log")
        axes[0][column].axhline(0.01, color="black", linewidth=0.8, linestyle=":")
        axes[1][column].axhline(0, color="black", linewidth=0.8)
        axes[0][column].set_title(f"{group[1]:,} tokens, {group[0]}", fontsize=10)
    axes[0][0].set_ylabel("divergence, nats a token (dotted: 0.01)")
    axes[1][0].set_ylabel("perplexity against full attention, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(texts), fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--settings", nargs="+", choices=NAMES, default=[*SHARES, "default"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[LENGTHS[-1]], help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=128, help="tokens to decode")
    parser.add_argument(
        "--quick", action="store_true", help="one text, one length, 32 steps, default settings and 7 %%"
    )
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, help="where a PNG goes")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.texts, arguments.lengths, arguments.steps = ["manual"], [LENGTHS[0]], 32
        arguments.settings = ["default", "7 %"]
    try:
        SMOLLM2.get(), DIALOGUES.get()
    except MissingError as error:
        sys.exit(f"benchmarks.smollm2.along_text: {error}")
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    rows: list[Row] = []
    groups = [(dtype, tokens, s) for dtype in arguments.dtypes for tokens in arguments.lengths
              for s in ("stock", *arguments.settings)]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for dtype, tokens, settings in track(groups, "engines", console):
            found = alone(run, Job(settings, dtype, tokens, arguments.steps, tuple(arguments.texts), Path(scratch)))
            rows += found
            if not found:
                continue
            console.print(Markdown(markdown(found)))
            # After every engine: each takes minutes.
            if arguments.markdown:
                arguments.markdown.write_text(markdown(rows))
            if arguments.json:
                result = {"machine": machine("smollm2.along_text", "cpu"), "rows": [asdict(row) for row in rows]}
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
