"""Time to the first token and per token after it, for shadowkv and vLLM's own backends.

    python -m benchmarks.dummy_model llama-3.1-8b build/llama-2-layers --layers 2
    python -m benchmarks.benchmark_latency build/llama-2-layers --input-lens 32768 --batches 1 4 -- --load-format dummy

By `vllm bench serve`: one server per backend and length, with equal arguments; what follows `--` goes to `vllm serve`
as it is. An unrelated request pays for what happens once. The next one computes its whole prompt: its time to the first
token is the table's. The batches then share that prompt but for a few tokens, as questions about one document do, and
are asked together.

With `--offline` by `vllm bench latency`: the prompts of a batch share nothing, so this takes longer. It runs twice,
with one output token and with all of them; what all of them take beyond the first is the time per token. vLLM draws
token ids below 10,000, so a smaller vocabulary is refused.

Random weights have no locality: their slot hit rate says nothing of a real model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.progress import Progress
from benchmarks.server import Server, ServerError
from benchmarks.vllm_bench import BACKENDS, BenchError, log_beside, vllm_bench, write_records

OWN_TOKENS = 16
"""Of a prompt, beyond what all share."""

WARMUP_TOKENS = 5000
"""Of the request that is not measured: beyond the default `dense_threshold`, so that it seals and selects."""


@dataclass(frozen=True)
class Record:
    """One batch. `ttft_ms`: of a request that finds nothing in the prefix cache; offline, of the whole batch."""

    backend: str
    input_len: int
    batch: int
    ttft_ms: float
    tpot_ms: float


def bench(server: Server, model: str, prompts: list[str], output_len: int) -> dict[str, float]:
    """`vllm bench serve` of prompts that are asked together; returns its results.

    Raises:
        BenchError: it failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        dataset = Path(directory) / "prompts.jsonl"
        dataset.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        arguments = ["--model", model, "--base-url", server.url, "--disable-tqdm"]
        arguments += ["--dataset-name", "custom", "--dataset-path", str(dataset), "--skip-chat-template"]
        arguments += ["--disable-shuffle", "--custom-output-len", str(output_len), "--num-prompts", str(len(prompts))]
        arguments += ["--ignore-eos", "--save-result"]
        numbers, printed = vllm_bench("serve", arguments, to="--result-filename")
    if numbers["completed"] != len(prompts):
        raise BenchError(f"{numbers['completed']:.0f} of {len(prompts)} requests were answered:\n{printed[-2000:]}")
    return numbers


def measure(
    model: str, backend: str, input_len: int, output_len: int, batches: list[int], extra: list[str], out: Path | None
) -> list[Record]:
    """All batches at one length, on a server of their own; its log is kept beside `out`, the file of the results.

    Raises:
        BenchError: the benchmark failed.
        ServerError: the server failed.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    random = Random(0)

    def words(count: int) -> str:
        return str(tokenizer.decode([random.randrange(100, tokenizer.vocab_size - 100) for _ in range(count)]))

    shared = words(input_len)
    longest = input_len + OWN_TOKENS + output_len + 64
    arguments = ["--max-model-len", str(longest), *BACKENDS[backend], *extra]
    with (
        tempfile.TemporaryDirectory() as directory,
        Server(
            Path(model), log_beside(out, f"{backend}_{input_len}") or Path(directory) / "log", arguments, {}
        ) as server,
    ):
        bench(server, model, [words(min(WARMUP_TOKENS, input_len))], 4)
        first = bench(server, model, [f"{shared} {words(OWN_TOKENS)}"], 4)
        records = []
        for batch in batches:
            prompts = [f"{shared} {words(OWN_TOKENS)}" for _ in range(batch)]
            numbers = bench(server, model, prompts, output_len)
            records.append(Record(backend, input_len, batch, first["median_ttft_ms"], numbers["median_tpot_ms"]))
        return records


def latency(
    model: str, backend: str, input_len: int, output_len: int, batch: int, extra: list[str], out: Path | None
) -> float:
    """Median seconds of a whole batch by `vllm bench latency`, which leaves the prefix cache off.

    Raises:
        BenchError: it failed.
    """
    arguments = ["--model", model, "--input-len", str(input_len), "--output-len", str(output_len)]
    arguments += ["--batch-size", str(batch), "--num-iters-warmup", "1", "--num-iters", "3"]
    arguments += ["--max-model-len", str(input_len + output_len + 64)]
    log = log_beside(out, f"{backend}_{input_len}_{batch}_{output_len}")
    numbers, _ = vllm_bench("latency", [*arguments, *BACKENDS[backend], *extra], log)
    return statistics.median(numbers["latencies"])


def measure_offline(
    model: str, backend: str, input_len: int, output_len: int, batches: list[int], extra: list[str], out: Path | None
) -> list[Record]:
    """As `measure`, by `vllm bench latency`."""
    records = []
    for batch in batches:
        first, whole = (latency(model, backend, input_len, tokens, batch, extra, out) for tokens in (1, output_len))
        records.append(Record(backend, input_len, batch, 1000 * first, 1000 * (whole - first) / (output_len - 1)))
    return records


def table(records: list[Record], title: str) -> Table:
    """The records for the terminal; ratios are to the first backend of the same size."""
    view = Table(title=title, title_justify="left")
    for name in ("backend", "prompt", "batch", "first token, s", "ratio", "per token, ms", "ratio"):
        view.add_column(name, justify="left" if name == "backend" else "right")
    first = {(r.input_len, r.batch): r for r in reversed(records)}
    for r in records:
        base = first[r.input_len, r.batch]
        view.add_row(
            r.backend, f"{r.input_len:,}", str(r.batch), f"{r.ttft_ms / 1000:.1f}", f"{base.ttft_ms / r.ttft_ms:.2f}",
            f"{r.tpot_ms:.1f}", f"{base.tpot_ms / r.tpot_ms:.2f}",
        )  # fmt: skip
    return view


def plot(records: list[Record], path: Path) -> None:
    """Time per token over the prompt's length, a line per backend and batch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for backend, batch in dict.fromkeys((r.backend, r.batch) for r in records):
        mine = [r for r in records if (r.backend, r.batch) == (backend, batch)]
        axes.plot([r.input_len for r in mine], [r.tpot_ms for r in mine], marker="o", label=f"{backend}, batch {batch}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("ms per output token")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> int:
    """The command line; returns the process's exit code."""
    own, extra = sys.argv[1:], []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["stock", "shadowkv"])
    parser.add_argument("--input-lens", type=int, nargs="+", required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--offline", action="store_true", help="by `vllm bench latency`, without a server")
    parser.add_argument("--json", type=Path, help="where the records go")
    parser.add_argument("--plot", type=Path, help="where a plot goes (.png)")
    arguments = parser.parse_args(own)
    if arguments.offline and arguments.output_len < 2:
        parser.error(f"--offline needs an --output-len of at least 2, got {arguments.output_len}")
    console = Console()
    records: list[Record] = []
    failed = False
    way = measure_offline if arguments.offline else measure
    runs = [(length, backend) for length in arguments.input_lens for backend in arguments.backends]
    with Progress(console) as progress:
        task = progress.add_task("runs", total=len(runs))
        for length, backend in runs:
            progress.update(task, description=f"{backend}, {length:,} tokens")
            try:
                sizes = (length, arguments.output_len, arguments.batches)
                records += way(arguments.model, backend, *sizes, extra, arguments.json)
                write_records(arguments.json, "benchmark_latency", records)
            except (BenchError, ServerError) as error:
                failed = True
                console.print(f"{backend}, {length} tokens: {error}", style="red", markup=False)
            progress.advance(task)
    name = "latency" if arguments.offline else "serve"
    console.print(table(records, f"vllm bench {name}, {arguments.model}"))
    if arguments.plot and records:
        plot(records, arguments.plot)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
