"""`vllm bench throughput` for shadowkv and vLLM's own backends, one after the other, with equal arguments and memory.

    python -m benchmarks.benchmark_throughput MODEL --input-lens 32768 122880 -- --load-format dummy

What follows `--` goes to `vllm bench throughput` as it is, `--kv-cache-memory-bytes` for instance. Random weights have
no locality: their slot hit rate says nothing of a real model's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

BACKENDS = {
    "stock": [],
    "stock-fp8": ["--kv-cache-dtype", "fp8"],
    "shadowkv": ["--attention-backend", "shadowkv"],
    "shadowkv-int8": [
        *("--attention-backend", "shadowkv"),
        *("--additional-config", '{"shadowkv": {"value_dtype": "int8"}}'),
    ],
}


@dataclass(frozen=True)
class Record:
    """One run. `cache_tokens` and `most_requests` are what vLLM's log says of its KV cache, if it does."""

    backend: str
    input_len: int
    requests_per_second: float
    output_tokens_per_second: float
    seconds: float
    cache_tokens: int | None
    most_requests: float | None


class RunError(Exception):
    """`vllm bench throughput` failed; the message ends with the end of its output."""


def run(model: str, backend: str, input_len: int, output_len: int, num_prompts: int, extra: list[str]) -> Record:
    """Runs one backend at one length.

    Raises:
        RunError: it failed.
    """
    vllm = Path(sys.executable).with_name("vllm")
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        command = [str(vllm), "bench", "throughput", "--model", model, "--dataset-name", "random"]
        command += ["--random-input-len", str(input_len), "--random-output-len", str(output_len)]
        command += ["--num-prompts", str(num_prompts), "--max-model-len", str(input_len + output_len + 64)]
        command += ["--output-json", str(result), *BACKENDS[backend], *extra]
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if finished.returncode or not result.exists():
            lines = finished.stdout.splitlines()
            # The engine's process says why; what ends the output is that it is gone.
            why = [line for line in lines if " ERROR " in line][-20:] or lines[-30:]
            raise RunError("\n".join([f"{backend}, {input_len} tokens:", *why]))
        numbers = json.loads(result.read_text())
    cache = re.search(r"KV cache size: ([\d,]+) tokens", finished.stdout)
    requests = re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", finished.stdout)
    seconds = numbers["elapsed_time"]
    return Record(
        backend=backend,
        input_len=input_len,
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
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--json", type=Path, help="where the records go")
    parser.add_argument("--plot", type=Path, help="where a plot goes (.png)")
    arguments = parser.parse_args(own)
    console = Console()
    records: list[Record] = []
    runs = [(backend, length) for length in arguments.input_lens for backend in arguments.backends]
    with Progress(console=console) as progress:
        task = progress.add_task("runs", total=len(runs))
        for backend, length in runs:
            progress.update(task, description=f"{backend}, {length:,} tokens")
            try:
                records.append(
                    run(arguments.model, backend, length, arguments.output_len, arguments.num_prompts, extra)
                )
            except RunError as error:
                console.print(str(error), style="red", markup=False)
                return 1
            progress.advance(task)
    _print(console, records, arguments.num_prompts)
    if arguments.json:
        command = "python -m benchmarks.benchmark_throughput " + " ".join(sys.argv[1:])
        arguments.json.write_text(json.dumps({"command": command, "records": [asdict(r) for r in records]}, indent=1))
    if arguments.plot:
        _plot(arguments.plot, records)
    return 0


def _print(console: Console, records: list[Record], num_prompts: int) -> None:
    table = Table(title=f"vllm bench throughput, {num_prompts} prompts", title_justify="left")
    for name in ("backend", "input", "output tokens/s", "ratio", "requests that fit", "tokens that fit"):
        table.add_column(name, justify="left" if name == "backend" else "right")
    first = {record.input_len: record for record in reversed(records)}
    for r in records:
        ratio = r.output_tokens_per_second / first[r.input_len].output_tokens_per_second
        table.add_row(
            r.backend, f"{r.input_len:,}", f"{r.output_tokens_per_second:.1f}", f"{ratio:.2f}",
            "" if r.most_requests is None else f"{r.most_requests:.1f}",
            "" if r.cache_tokens is None else f"{r.cache_tokens:,}",
        )  # fmt: skip
    console.print(table)


def _plot(path: Path, records: list[Record]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for backend in dict.fromkeys(record.backend for record in records):
        mine = [record for record in records if record.backend == backend]
        axes.plot([r.input_len for r in mine], [r.output_tokens_per_second for r in mine], marker="o", label=backend)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("output tokens per second")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    raise SystemExit(main())
