"""`vllm bench throughput` for shadowkv and vLLM's own backends, one after the other, with equal arguments and memory.

    python -m benchmarks.benchmark_throughput MODEL --input-lens 32768 --num-prompts 1 8 32 -- --load-format dummy

All prompts of a run are given at once, and as many as fit are decoded together: throughput over their number shows
where a backend's cache is full. What follows `--` goes to `vllm bench throughput` as it is, `--kv-cache-memory-bytes`
for instance. Every size runs twice after a request of its own to warm up, with all output tokens and with one: the
prompts take most of the time, and what the others take beyond the first is the rate of decoding. What the engines print
is kept beside the JSON file. Random weights have no locality: their slot hit rate says nothing of a real model's.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.progress import Progress
from benchmarks.vllm_bench import BACKENDS, BenchError, log_beside, vllm_bench, write_records


@dataclass(frozen=True)
class Record:
    """One size.

    Attributes:
        seconds: of the run with all output tokens.
        first_token_seconds: of the run with one.
        decode_tokens_per_second: output tokens beyond the first ones over the difference; None where noise hides it.
        cache_tokens, most_requests: what vLLM's log says of its KV cache, if it does.
    """

    backend: str
    input_len: int
    num_prompts: int
    requests_per_second: float
    output_tokens_per_second: float
    seconds: float
    first_token_seconds: float
    decode_tokens_per_second: float | None
    cache_tokens: int | None
    most_requests: float | None


def run(
    model: str, backend: str, input_len: int, output_len: int, num_prompts: int, extra: list[str], out: Path | None
) -> Record:
    """Runs one backend at one size; `out` is the file of the results.

    Raises:
        BenchError: it failed.
    """

    def seconds(tokens: int) -> tuple[float, str]:
        arguments = ["--model", model, "--dataset-name", "random", "--num-warmups", "1"]
        arguments += ["--random-input-len", str(input_len), "--random-output-len", str(tokens)]
        arguments += ["--num-prompts", str(num_prompts), "--max-model-len", str(input_len + output_len + 64)]
        log = log_beside(out, f"{backend}_{input_len}_{num_prompts}_{tokens}")
        numbers, printed = vllm_bench("throughput", [*arguments, *BACKENDS[backend], *extra], log)
        return numbers["elapsed_time"], printed

    whole, printed = seconds(output_len)
    first, _ = seconds(1)
    cache = re.search(r"KV cache size: ([\d,]+) tokens", printed)
    requests = re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", printed)
    return Record(
        backend=backend,
        input_len=input_len,
        num_prompts=num_prompts,
        requests_per_second=num_prompts / whole,
        output_tokens_per_second=num_prompts * output_len / whole,
        seconds=whole,
        first_token_seconds=first,
        decode_tokens_per_second=num_prompts * (output_len - 1) / (whole - first) if whole > first else None,
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
    if arguments.output_len < 2:
        parser.error(f"--output-len must be at least 2, got {arguments.output_len}")
    console = Console()
    records: list[Record] = []
    failed = False
    runs = list(product(arguments.input_lens, arguments.num_prompts, arguments.backends))
    with Progress(console) as progress:
        task = progress.add_task("runs", total=len(runs))
        for length, num_prompts, backend in runs:
            progress.update(task, description=f"{backend}, {num_prompts} of {length:,} tokens")
            try:
                size = (length, arguments.output_len, num_prompts)
                records.append(run(arguments.model, backend, *size, extra, arguments.json))
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
    names = ("output tokens/s", "ratio", "decoded tokens/s", "ratio", "requests that fit", "tokens that fit")
    for name in ("backend", "input", "prompts", *names):
        table.add_column(name, justify="left" if name == "backend" else "right")
    first = {(r.input_len, r.num_prompts): r for r in reversed(records)}
    for r in records:
        base = first[r.input_len, r.num_prompts]
        table.add_row(
            r.backend, f"{r.input_len:,}", str(r.num_prompts),
            *_with_ratio(r.output_tokens_per_second, base.output_tokens_per_second),
            *_with_ratio(r.decode_tokens_per_second, base.decode_tokens_per_second),
            "" if r.most_requests is None else f"{r.most_requests:.1f}",
            "" if r.cache_tokens is None else f"{r.cache_tokens:,}",
        )  # fmt: skip
    console.print(table)


def _with_ratio(rate: float | None, base: float | None) -> tuple[str, str]:
    """Two cells of the table."""
    return "" if rate is None else f"{rate:.1f}", f"{rate / base:.2f}" if rate and base else ""


def _plot(path: Path, records: list[Record]) -> None:
    """Rate of decoding over the number of prompts, and how many requests fit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for backend, length in dict.fromkeys((r.backend, r.input_len) for r in records):
        mine = [r for r in records if (r.backend, r.input_len) == (backend, length)]
        numbers, rates = [r.num_prompts for r in mine], [r.decode_tokens_per_second or math.nan for r in mine]
        left.plot(numbers, rates, marker="o", label=f"{backend}, {length:,}")
        right.bar(f"{backend}\n{length:,}", mine[0].most_requests or 0, color="tab:gray")
    left.set_ylim(bottom=0)
    left.set_xlabel("prompts given at once")
    left.set_ylabel("decoded tokens per second")
    left.legend(title="backend, tokens of a prompt")
    right.set_ylabel("requests that fit the KV cache")
    right.tick_params(axis="x", labelrotation=90)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    raise SystemExit(main())
