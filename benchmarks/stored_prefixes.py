"""Time to the first token, by where a prompt's prefix is: `python -m benchmarks.stored_prefixes`.

Computed, in memory, or in files (`ShadowKVConnector`) of another engine or of one that has ended; beside the stock
backend. Every prompt is its own, of tokens at random, and 128 tokens longer than `--tokens` says; the median counts. A
request at a time, with one token of answer, of engines in processes of their own, which are asked in turn. The model
has a real one's shape, few layers, and weights at random.

"computed, saved" is a `kv_producer`: it looks for no files, and "files complete" is how long after its answer all of
them were there. "other engine" is a `kv_consumer` that is alive beside it, and asked then. "restart" is an engine that
was started when the producer had ended. For "not in the page cache" the system is told to drop every file from there
before each request (fsync, then posix_fadvise with DONTNEED): what a disk or its host keeps, it does not know of.
"from the disk" is what the engine's process had read from there. GiB/s are those of the whole request, which computes
its own 128 tokens, too.

What the last step of a prompt completes is sealed after its answer: with the connector at once, else by the next
request, which is then the one "in memory". Up to a step's 8,192 tokens those are all blocks.

A file holds what "in memory, sealed" has: shadowkv without resident pages, which has computed the prompt itself. So
the answers are held against each other: the table has the largest difference of the first token's log-probability, and
says where it is another token. (Of prompts beyond `prefill_exact_tokens` the other engines compute the end over
resident pages, so that they differ.)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import asked_again, dummy_model
from benchmarks.alone import Alone
from benchmarks.machine import machine
from benchmarks.progress import track
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.state.block_store import ENDING
from vllm_shadowkv.state.host_memory import GIB

OWN_TOKENS = 128
"""Of a prompt, behind what `--tokens` says."""

WARMUP_TOKENS = 5000
"""Of the prompt that is not measured: beyond the default `dense_threshold`."""

MOST_SECONDS_OF_WRITING = 120.0
SHARED_MEMORY = Path("/dev/shm")
MIB = 2**20

STOCK, STOCK_AGAIN = "stock: computed", "stock: in memory"
COMPUTED, SAVED = "shadowkv: computed", "shadowkv: computed, saved"
COMPLETE = "shadowkv: files complete"
RESIDENT, SEALED = "shadowkv: in memory, exact", "shadowkv: in memory, sealed"
CACHED, UNCACHED = "restart: in the page cache", "restart: not in the page cache"
OTHER = "other engine"
MEMORY_SAVED = f"{SHARED_MEMORY}: computed, saved"
MEMORY_COMPLETE, MEMORY_OTHER = f"{SHARED_MEMORY}: files complete", f"{SHARED_MEMORY}: other engine"
WAYS = (
    *(STOCK, COMPUTED, SAVED, MEMORY_SAVED, COMPLETE, MEMORY_COMPLETE),
    *(STOCK_AGAIN, RESIDENT, SEALED, OTHER, MEMORY_OTHER, CACHED, UNCACHED),
)
"""In the order of the table."""

OF_SEALED = (SEALED, OTHER, MEMORY_OTHER, CACHED, UNCACHED)
"""Whose answers should be the same."""


@dataclass(frozen=True)
class Answer:
    """To one prompt.

    Attributes:
        seconds: to the first token; or from then on until all files were there.
        moment: of its end, by `time.perf_counter`, which processes of a machine have in common.
        cached: tokens of the prompt that were not computed.
        token: the first one; -1 where none was asked for.
        logprob: of it.
        file_bytes: of the files that were loaded.
        disk_bytes: that the engine's process had read from the disk.
    """

    seconds: float
    moment: float = 0.0
    cached: int = 0
    token: int = -1
    logprob: float = 0.0
    file_bytes: int = 0
    disk_bytes: int = 0


Results = dict[int, dict[str, list[Answer]]]
"""Answers by tokens and way, in the order of the prompts."""


class Engine(asked_again.Engine):
    """An engine whose answers say where their prefix came from."""

    def __init__(
        self, backend: str, options: dict[str, Any], role: str | None = None, files: Path | None = None
    ) -> None:
        """Starts it.

        Args:
            backend: of `asked_again.BACKENDS`.
            options: of `LLM`.
            role: of the connector, where it has one.
            files: the connector's folder.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if role:
            settings = {"kv_connector": "ShadowKVConnector", "kv_role": role}
            options = options | {
                "kv_transfer_config": settings | {"kv_connector_extra_config": {"path": str(files), "max_gib": 8}}
            }
        super().__init__(backend, **options)
        self._files = files if role != "kv_producer" else None

    def first_token(self, prompt: list[int]) -> Answer:
        """Asks for one token."""
        loaded, read = self._loaded(), _bytes_read()
        began = time.perf_counter()
        (output,) = self.ask([prompt], 1)
        moment = time.perf_counter()
        self.llm.llm_engine.step()  # as a server does when a request has ended: what it completed is sealed, and saved
        ((token, logprob),) = asked_again.chosen(output)
        file_bytes = (self._loaded() - loaded) * file_size(self._files) if self._files else 0
        read = _bytes_read() - read
        return Answer(moment - began, moment, output.num_cached_tokens, token, logprob, file_bytes, read)

    def forget(self) -> None:
        """Empties the prefix cache, and leaves the files."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("The prefix cache was not reset: requests are running.")

    def _loaded(self) -> int:
        """Files, until now; of an engine that reads none, this is not looked up."""
        if self._files is None:
            return 0
        metrics: list[Any] = [metric for metric in self.llm.get_metrics() if metric.name == "vllm:shadowkv_files"]
        return sum(int(metric.value) for metric in metrics if metric.labels["kind"] == "loaded")


def _bytes_read() -> int:
    """By this process, from disks."""
    return int(psutil.Process().io_counters().read_bytes)


def files_of(folder: Path) -> list[Path]:
    """The complete files of blocks."""
    return list(folder.rglob(f"*{ENDING}"))


def file_size(folder: Path) -> int:
    """Bytes of each file, which are alike but for a few in the headers; 0 where there is none."""
    sizes = [file.stat().st_size for file in files_of(folder)]
    return sum(sizes) // max(len(sizes), 1)


def drop_from_page_cache(folder: Path) -> None:
    """Has the system drop every file that nobody has mapped from its page cache."""
    for file in files_of(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # what is not written yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def wait_for_files(folder: Path, count: int, since: float) -> Answer:
    """How long after a moment there are so many.

    Raises:
        TimeoutError: they do not come.
    """
    last = time.perf_counter() + MOST_SECONDS_OF_WRITING
    while len(files_of(folder)) < count:
        if time.perf_counter() > last:
            raise TimeoutError(f"There are {len(files_of(folder))} files in {folder}; {count} were expected.")
        time.sleep(0.002)
    moment = time.perf_counter()
    return Answer(moment - since, moment)


def random_prompts(lengths: Iterable[int], count: int) -> list[tuple[int, list[int]]]:
    """Prompts with what `--tokens` said of each; that of the first, which is for warming up, is 0."""
    sizes = [(0, WARMUP_TOKENS), *((tokens, tokens + OWN_TOKENS) for tokens in lengths for _ in range(count))]
    draw = random.Random(0)
    first, end = len(dummy_model.SPECIAL), dummy_model.VOCABULARY
    return [(tokens, [draw.randrange(first, end) for _ in range(length)]) for tokens, length in sizes]


class Measurement:
    """All ways on the same prompts.

    Attributes:
        results: what was measured so far.
    """

    def __init__(self, options: dict[str, Any], prompts: list[tuple[int, list[int]]], console: Console) -> None:
        """Starts nothing.

        Args:
            options: of every engine's `LLM`.
            prompts: of `random_prompts`.
            console: for the progress.
        """
        self._options, self._prompts, self._console = options, prompts, console
        self.results: Results = {}

    def run(self, disk: Path, memory: Path | None) -> None:
        """Measures everything, engines that are to be compared beside each other.

        Args:
            disk: an empty folder for files.
            memory: another one, in memory.
        """
        self._computed(disk)
        self._sealed(disk)
        if memory:
            with self._engine("shadowkv", "kv_producer", memory) as producer, self._other(memory) as other:
                for tokens, prompt in track(self._prompts, f"files in {SHARED_MEMORY}", self._console):
                    self._pass_on(
                        tokens, prompt, producer, other, memory, (MEMORY_SAVED, MEMORY_COMPLETE, MEMORY_OTHER)
                    )

    def _computed(self, disk: Path) -> None:
        with ExitStack() as engines:
            stock, ours = (engines.enter_context(self._engine(backend)) for backend in ("stock", "shadowkv"))
            producer = engines.enter_context(self._engine("shadowkv", "kv_producer", disk))
            other = engines.enter_context(self._other(disk))
            for tokens, prompt in track(self._prompts, "computed, and passed on", self._console):
                for engine, ways in ((stock, (STOCK, STOCK_AGAIN)), (ours, (COMPUTED, RESIDENT))):
                    for way in ways:
                        self._ask(tokens, way, engine, prompt)
                self._pass_on(tokens, prompt, producer, other, disk, (SAVED, COMPLETE, OTHER))

    def _sealed(self, disk: Path) -> None:
        with self._engine("sealed") as sealed, self._engine("shadowkv", "kv_both", disk) as restarted:
            for tokens, prompt in track(self._prompts, "sealed, and after a restart", self._console):
                sealed.call("first_token", prompt)
                self._ask(tokens, SEALED, sealed, prompt)
                drop_from_page_cache(disk)
                for way in (UNCACHED, CACHED):
                    self._ask(tokens, way, restarted, prompt)
                    restarted.call("forget")

    def _engine(self, backend: str, *connector: Any) -> Alone:
        return Alone(Engine, backend, self._options, *connector)

    def _other(self, files: Path) -> Alone:
        return self._engine("shadowkv", "kv_consumer", files)

    def _ask(self, tokens: int, way: str, engine: Alone, prompt: list[int]) -> None:
        self._note(tokens, way, engine.call("first_token", prompt))

    def _pass_on(
        self, tokens: int, prompt: list[int], producer: Alone, other: Alone, files: Path, ways: tuple[str, str, str]
    ) -> None:
        """One engine computes, the other is asked when all files are there."""
        saved, complete, asked = ways
        count = len(files_of(files)) + len(prompt) // ShadowKVConfig().block_size
        answer = producer.call("first_token", prompt)
        self._note(tokens, complete, wait_for_files(files, count, answer.moment))
        self._note(tokens, saved, answer)
        self._ask(tokens, asked, other, prompt)

    def _note(self, tokens: int, way: str, answer: Answer) -> None:
        if tokens:
            self.results.setdefault(tokens, {}).setdefault(way, []).append(answer)


def rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """The table's head, and its cells."""
    head = ["tokens", "prefix", "s", "computed / this", "cached", "files, MiB", "from the disk, MiB", "GiB/s", "unlike"]
    cells = []
    for tokens, ways in results.items():
        computed = median_seconds(ways[COMPUTED])
        for way in (way for way in WAYS if way in ways):
            answers = ways[way]
            seconds = median_seconds(answers)
            files, disk = (
                statistics.median(getattr(answer, kind) for answer in answers) for kind in ("file_bytes", "disk_bytes")
            )
            asked = all(answer.token >= 0 for answer in answers)
            cells.append(
                [
                    f"{tokens:,}",
                    way,
                    f"{seconds:.3g}",
                    f"{computed / seconds:.2f}" if asked else "",
                    f"{min(answer.cached for answer in answers):,}" if asked else "",
                    f"{files / MIB:.1f}" if files else "",
                    f"{disk / MIB:.1f}" if files else "",
                    f"{files / GIB / seconds:.2f}" if files else "",
                    unlike(answers, ways[SEALED], way),
                ]
            )
    return head, cells


def median_seconds(answers: list[Answer]) -> float:
    """Of a way's prompts."""
    return statistics.median(answer.seconds for answer in answers)


def unlike(answers: list[Answer], sealed: list[Answer], way: str) -> str:
    """How a way's answers differ from those over the same sealed blocks in memory, where they should not at all."""
    if way not in OF_SEALED or way == SEALED:
        return ""
    pairs = list(zip(answers, sealed, strict=True))
    others = sum(answer.token != expected.token for answer, expected in pairs)
    error = max(abs(answer.logprob - expected.logprob) for answer, expected in pairs)
    return f"{error:.2g}" + (f", {others} other tokens" if others else "")


def table(results: Results) -> Table:
    """For the terminal."""
    head, cells = rows(results)
    view = Table(title="Seconds to the first token, by where the prompt's prefix is", title_justify="left")
    for name in head:
        view.add_column(name, justify="left" if name == "prefix" else "right")
    for row in cells:
        view.add_row(*row)
    return view


def markdown(results: Results) -> str:
    """For a document."""
    head, cells = rows(results)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *cells))


def plot(results: Results, path: Path, title: str) -> None:
    """Seconds of each way to a first token, a bar per length of the prompt."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [way for way in WAYS if way not in (COMPLETE, MEMORY_COMPLETE)]
    ways = [way for way in shown if any(way in found for found in results.values())]
    height = 0.8 / len(results)
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.3 * len(ways) * (1 + 0.4 * len(results))), layout="constrained")
    for number, (tokens, found) in enumerate(results.items()):
        places = [place + (number + 0.5) * height - 0.4 for place, way in enumerate(ways) if way in found]
        seconds = [median_seconds(found[way]) for way in ways if way in found]
        bars = axes.barh(places, seconds, height, label=f"{tokens:,} tokens")
        axes.bar_label(bars, [f" {value:.2g}" if value < 10 else f" {value:.0f}" for value in seconds], fontsize=7)
    axes.set_xscale("log")
    everything = [median_seconds(found[way]) for found in results.values() for way in ways if way in found]
    axes.set_xlim(10 ** math.floor(math.log10(min(everything))), 3 * max(everything))
    axes.set_yticks(range(len(ways)), ways, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds to the first token")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def lengths(text: str) -> list[int]:
    """Of `--tokens`.

    Raises:
        argparse.ArgumentTypeError: no numbers, or one that leaves no complete block.
    """
    least = ShadowKVConfig().block_size
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from {least} on, such as 4096,16384")
    return sorted(set(found))


def own_dtype() -> str:
    """The machine's: bfloat16 where its processor, or GPU, multiplies that."""
    if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return "bfloat16"
    return "float32"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lengths, default=[16_384], help="of the prefix, or several: 4096,8192,16384")
    parser.add_argument("--prompts", type=int, default=3, help="of each length")
    parser.add_argument("--shape", choices=dummy_model.CONFIGS, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=own_dtype(), help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="for the model and the files, on the disk that is to be measured")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="for JSON, PNG and Markdown")
    arguments = parser.parse_args()
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    measured = {"shape": arguments.shape, "layers": arguments.layers, "dtype": arguments.dtype}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as folders:
        made = folders.enter_context(tempfile.TemporaryDirectory(prefix="stored_prefixes-", dir=arguments.folder))
        model, disk, memory = Path(made) / "model", Path(made) / "files", None
        if SHARED_MEMORY.is_dir():
            memory = Path(
                folders.enter_context(tempfile.TemporaryDirectory(prefix="stored_prefixes-", dir=SHARED_MEMORY))
            )
        dummy_model.write(arguments.shape, model, arguments.layers)
        dummy_model.write_weights(model)
        options = {
            "model": str(model),
            "dtype": arguments.dtype,
            "max_model_len": arguments.tokens[-1] + 2 * OWN_TOKENS,
        }
        options["max_model_len"] = max(options["max_model_len"], WARMUP_TOKENS + OWN_TOKENS)
        measurement = Measurement(options, random_prompts(arguments.tokens, arguments.prompts), console)
        measurement.run(disk, memory)
    about, results = machine("stored_prefixes", device), measurement.results
    console.print(table(results))
    arguments.results.mkdir(parents=True, exist_ok=True)
    out = arguments.results / f"stored_prefixes_{device}.json"
    content = {
        str(tokens): {way: [asdict(answer) for answer in answers] for way, answers in ways.items()}
        for tokens, ways in results.items()
    }
    out.write_text(json.dumps({"machine": about, "model": measured, "results": content}, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(results))
    whole = dummy_model.CONFIGS[arguments.shape]["num_hidden_layers"]
    title = f"{arguments.layers} of {arguments.shape}'s {whole} layers, {arguments.dtype}, {about['device']}"
    plot(results, out.with_suffix(".png"), title)


if __name__ == "__main__":
    main()
    sys.exit(0)
