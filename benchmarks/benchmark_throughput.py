"""`vllm bench throughput` for shadowkv and vLLM's own backends, one after the other, with equal arguments and memory.

    python -m benchmarks.benchmark_throughput MODEL --input-lens 32768 --num-prompts 1 8 32 -- --load-format dummy

All prompts of a run are given at once, and as many as fit are decoded together: throughput over their number shows
where a backend's cache is full. What follows `--` goes to `vllm bench throughput` as it is, `--kv-cache-memory-bytes`
for instance. Random weights have no locality: their slot hit rate says nothing of a real model's.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.vllm_bench import BACKENDS, BenchError, vllm_bench, write_records


@dataclass(frozen=True)
class Record:
    """One run. `cache_tokens` and `most_requests` are what vLLM's log says of its KV cache, if it does."""

    backend: str
    input_len: int
    num_prompts: int
    requests_per_second: float
    output_tokens_per_second: float
    seconds: float
    cache_tokens: int | None
    most_requests: float | None


def run(model: str, backend: str, input_len: int, output_len: int, num_prompts: int, extra: list[str]) -> Record:
    """Runs one backend at one length.

    Raises:
        BenchError: it failed.
    """
    arguments = ["--model", model, "--dataset-name", "random"]
    arguments += ["--random-input-len", str(input_len), "--random-output-len", str(output_len)]
    arguments += ["--num-prompts", str(num_prompts), "--max-model-len", str(input_len + output_len + 64)]
    numbers, printed = vllm_bench("throughput", [*arguments, *BACKENDS[backend], *extra])
    cache = re.search(r"KV cache size: ([\d,]+) tokens", printed)
    requests = re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", printed)
    seconds = numbers["elapsed_time"]
    return Record(
        backend=backend,
        input_len=input_len,
        num_prompts=num_prompts,
        requests_per_second=numbers["requests_per_second"],
        output_tokens_per_second=num_prompts * output_len / seconds,
        seconds=seconds,
        cache_tokens=int(cache[1].replace(",", "")) if cache else None,
        most_requests=float(requests[1]) if requests else None,
    )


def main() -> int:
    """The command line; returns the process's exit code."""
    own, extra = sys.argv[1:], []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["stock", "shadowkv"])
    parser.add_argument("--input-lens", type=int, nargs="+", required=True)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--num-prompts", type=int, nargs="+", default=[16], help="a run for each number")
    parser.add_argument("--json", type=Path, help="where the records go")
    parser.add_argument("--plot", type=Path, help="where a plot goes (.png)")
    arguments = parser.parse_args(own)
    console = Console()
    records: list[Record] = []
    failed = False
    runs = list(product(arguments.input_lens, arguments.num_prompts, arguments.backends))
    with Progress(console=console) as progress:
        task = progress.add_task("runs", total=len(runs))
        for length, num_prompts, backend in runs:
            progress.update(task, description=f"{backend}, {num_prompts} of {length:,} tokens")
            try:
                records.append(run(arguments.model, backend, length, arguments.output_len, num_prompts, extra))
                write_records(arguments.json, "benchmark_throughput", records)
            except BenchError as error:
                failed = True
                console.print(f"{backend}, {length} tokens: {error}", style="red", markup=False)
            progress.advance(task)
    _print(console, records)
    if arguments.plot and records:
        _plot(arguments.plot, records)
    return int(failed)


def _print(console: Console, records: list[Record]) -> None:
    """A table; ratios are to the first backend of the same size."""
    table = Table(title="vllm bench throughput", title_justify="left")
    for name in ("backend", "input", "prompts", "output tokens/s", "ratio", "requests that fit", "tokens that fit"):
        table.add_column(name, justify="left" if name == "backend" else "right")
    first = {(r.input_len, r.num_prompts): r for r in reversed(records)}
    for r in records:
        ratio = r.output_tokens_per_second / first[r.input_len, r.num_prompts].output_tokens_per_second
        table.add_row(
            r.backend, f"{r.input_len:,}", str(r.num_prompts), f"{r.output_tokens_per_second:.1f}", f"{ratio:.2f}",
            "" if r.most_requests is None else f"{r.most_requests:.1f}",
            "" if r.cache_tokens is None else f"{r.cache_tokens:,}",
        )  # fmt: skip
    console.print(table)


def _plot(path: Path, records: list[Record]) -> None:
    """Throughput over the number of prompts, and how many requests fit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for backend, length in dict.fromkeys((r.backend, r.input_len) for r in records):
        mine = [r for r in records if (r.backend, r.input_len) == (backend, length)]
        numbers = [r.num_prompts for r in mine]
        left.plot(numbers, [r.output_tokens_per_second for r in mine], marker="o", label=f"{backend}, {length:,}")
        right.bar(f"{backend}\n{length:,}", mine[0].most_requests or 0, color="tab:gray")
    left.set_ylim(bottom=0)
    left.set_xlabel("prompts given at once")
    left.set_ylabel("output tokens per second")
    left.legend(title="backend, tokens of a prompt")
    right.set_ylabel("requests that fit the KV cache")
    right.tick_params(axis="x", labelrotation=90)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    raise SystemExit(main())
