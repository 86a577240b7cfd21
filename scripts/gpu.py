"""All work that needs a GPU, in order: `python scripts/gpu.py test | bench | accuracy | all [--only NAME ...]`.

Every step is a command that can be run alone. What it prints goes to a file of its own under the results' directory,
and `report.md` there says of every step what it was, how long it took and how it ended; numbers and plots go to
`benchmarks/results`. A step that fails does not stop the next: time on a GPU is short. `--rehearse` runs the same steps
on a machine without one, at sizes that take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""For a rehearsal: what vLLM would take on a CPU is half of the memory."""

sys.path.insert(0, str(ROOT))

# The rest of compute-sanitizer's cost is in starting Python: few tests, of every op.
SANITIZED = ["tests/gpu/test_decode_graph.py", "tests/ops/test_store_values.py", "tests/ops/test_pack_block.py"]
SANITIZED_KEYWORDS = "(eager or stream) or (128 and bfloat16)"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of its files.
        kind: "test", "bench" or "accuracy".
        what: a sentence of the report.
        command: arguments, Python first.
        seconds: it is ended after so many.
        needs: a program without which it is left out.
    """

    name: str
    kind: str
    what: str
    command: list[str]
    seconds: int
    needs: str | None = None


def steps(results: Path, rehearse: bool) -> list[Step]:
    """The list; smaller, and on the CPU, for a rehearsal."""
    python = sys.executable
    device = ["--device", "cpu" if rehearse else "cuda"]
    marked = [] if rehearse else ["-m", "gpu"]
    ops = ["-k", "128 and bfloat16 and not emulated"] if rehearse else marked
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "3", "--target-processes", "all"]
    model = str(results / "dummy")
    lengths = ["4608"] if rehearse else ["32768", "61440", "122880"]
    contexts = ["4096", "8192"] if rehearse else ["4096", "8192", "16384", "32768", "65536", "131072", "524288"]
    served = ["--", "--load-format", "dummy", *(["--enforce-eager"] if rehearse else [])]
    backends = ["--backends", "stock", "shadowkv", *([] if rehearse else ["stock-fp8", "shadowkv-int8"])]
    few = ["--output-len", "8"] if rehearse else ["--output-len", "128"]

    records = results if rehearse else ROOT / "benchmarks" / "results"

    def to(name: str, *options: str) -> list[str]:
        endings = {"json": ".json", "plot": ".png"}
        return [x for option in options for x in (f"--{option}", str(records / (name + endings[option])))]

    def bench(name: str, module: str, what: str, *arguments: str, kind: str = "bench", seconds: int = 600) -> Step:
        return Step(name, kind, what, [python, "-m", f"benchmarks.{module}", *arguments], seconds)

    def train(name: str, *arguments: str) -> Step:
        recipe = ["--recipe", "small", "--minutes", "0.3"] if rehearse else ["--recipe", "long", "--minutes", "8"]
        recipe += [*device, "--workers", "1" if rehearse else "8"]
        files = ["--out", str(results / f"{name}.pt"), "--export", str(results / name)]
        what = f"training of {name.replace('_', ' ')}, for prompts of 16K to 32K tokens"
        return bench(f"train_{name}", "needle.train", what, *recipe, *files, *arguments, kind="accuracy")

    def accuracy(name: str, tokens: str) -> list[Step]:
        answers = {backend: str(results / f"{name}_{tokens}_{backend}.jsonl") for backend in ("stock", "shadowkv")}
        asked = ["--model", str(results / name), "--needle-tokens", tokens]
        asked += ["--haystacks", "1", "--questions", "2"] if rehearse else []
        return [
            *(
                bench(f"{name}_{tokens}_{backend}", "accuracy.collect", f"answers to prompts of {tokens} tokens",
                      file, *asked, "--backend", backend, kind="accuracy")
                for backend, file in answers.items()
            ),
            bench(f"accuracy_{name}_{tokens}", "accuracy.compare", "what shadowkv loses and wins of them",
                  *answers.values(), *to(f"accuracy_{name}_{tokens}", "json", "plot"), kind="accuracy"),
        ]  # fmt: skip

    return [
        Step("doctor", "test", "what is installed", [python, "-m", "vllm_shadowkv", "doctor"], 120),
        Step("ops", "test", "every op against the reference", [*pytest, *ops, "tests/ops"], 900),
        Step("graphs", "test", "decode steps eager, captured, replayed, on another stream",
             [*pytest, *marked, "tests/gpu/test_decode_graph.py"], 300),
        Step("lossless", "test", "tiny models without loss against FLASH_ATTN: runners, graphs, drafts, preemption",
             [*pytest, *marked, "tests/gpu/test_engines.py"], 1800),
        Step("needle", "test", "the needle model against FLASH_ATTN",
             [*pytest, *marked, "tests/gpu/test_needle.py"], 900),
        *(
            Step(tool, "test", f"compute-sanitizer {tool}",
                 [*sanitizer, "--tool", tool, *pytest, "-m", "gpu", "-k", SANITIZED_KEYWORDS, *SANITIZED], 900,
                 needs="compute-sanitizer")
            for tool in ("memcheck", "racecheck")
        ),
        bench("ops_cuda", "bench_ops", "time of each op, share of its limit", *device, *to("ops_cuda", "json")),
        bench("decode_cuda", "bench_decode", "the attention layer of a decode step, against FlashAttention",
              *device, "--contexts", *contexts, "--batches", "1", "4", "16", *to("decode_cuda", "json", "plot")),
        bench("model", "dummy_model", "the model that the next steps serve", "llama-3.1-8b", model,
              *(["--layers", "1"] if rehearse else [])),
        bench("throughput_cuda", "benchmark_throughput", "vllm bench throughput at equal device memory", model,
              "--input-lens", *lengths, "--num-prompts", *(["2"] if rehearse else ["1", "8", "32"]), *few, *backends,
              *to("throughput_cuda", "json", "plot"), *served, seconds=3600),
        bench("long_generation_cuda", "long_generation", "5,000 tokens of one request, each of them known",
              "--tokens", *(["1200"] if rehearse else ["5000"]), "--dtype", "float16",
              *to("long_generation_cuda", "json")),
        bench("beyond_cuda", "benchmark_throughput", "a request whose full KV cache is larger than the memory", model,
              "--input-lens", lengths[-1], "--num-prompts", "1", *few, "--backends", "shadowkv",
              *to("beyond_cuda", "json"), *served, "--kv-cache-memory-bytes", *(["64M"] if rehearse else ["7G"])),
        bench("latency_cuda", "benchmark_latency", "time to the first token and per token after it", model,
              "--input-lens", *lengths, *few, *backends, *to("latency_cuda", "json", "plot"), *served, seconds=3600),
        train("long_needle"),
        train("long_twin", "--no-aux"),
        *(
            step
            for name in ("long_needle", "long_twin")
            for tokens in (["1024"] if rehearse else ["16384", "32768"])
            for step in accuracy(name, tokens)
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed (exit code)", "took too long" or "left out (why)"."""

    step: Step
    outcome: str
    seconds: float


def run(step: Step, results: Path, environment: dict[str, str]) -> Outcome:
    """Runs one step, its output in a file of its own."""
    if step.needs and shutil.which(step.needs) is None:
        return Outcome(step, f"left out ({step.needs} is not installed)", 0)
    started = time.monotonic()
    with (results / f"{step.name}.log").open("wb") as log:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(step.seconds)
            outcome = "failed" if code else "passed"
            outcome += f" (exit code {code})" if code else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            outcome = f"took longer than {step.seconds} s"
    return Outcome(step, outcome, time.monotonic() - started)


def report(outcomes: list[Outcome], about: dict[str, object]) -> str:
    """The page, in Markdown."""
    lines = ["# Report of a machine", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["| step | what | ended | seconds |", "| --- | --- | --- | --- |"]
    for o in outcomes:
        lines.append(f"| [{o.step.name}]({o.step.name}.log) | {o.step.what} | {o.outcome} | {o.seconds:.0f} |")
    lines += ["", *(f"- {o.step.name}: `{written(o.step)}`" for o in outcomes), ""]
    return "\n".join(lines)


def written(step: Step) -> str:
    """The command as one would type it in the repository's root."""
    return shlex.join(step.command).replace(sys.executable, "python").replace(f"{ROOT}/", "")


def main() -> int:
    """The command line; returns 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("test", "bench", "accuracy", "all"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these steps")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu", help="where everything goes")
    parser.add_argument("--dry", action="store_true", help="print the commands")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    arguments = parser.parse_args()
    results: Path = arguments.results.resolve()
    chosen = [step for step in steps(results, arguments.rehearse) if arguments.kind in (step.kind, "all")]
    if arguments.only:
        unknown = set(arguments.only) - {step.name for step in chosen}
        if unknown:
            parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in chosen)}")
        chosen = [step for step in chosen if step.name in arguments.only]
    if arguments.dry:
        for step in chosen:
            print(f"{step.name}: {written(step)}")
        return 0
    results.mkdir(parents=True, exist_ok=True)
    from benchmarks.machine import machine

    about = machine("", "cpu" if arguments.rehearse else "cuda") | {
        "command": f"python scripts/gpu.py {shlex.join(sys.argv[1:])}"
    }
    environment = OFFLINE | (SMALL if arguments.rehearse else {})
    outcomes = []
    for step in chosen:
        print(f"{step.name}: {step.what} ...", flush=True)
        outcomes.append(run(step, results, environment))
        print(f"  {outcomes[-1].outcome}, {outcomes[-1].seconds:.0f} s", flush=True)
        (results / "report.md").write_text(report(outcomes, about))
        ended = [{"name": o.step.name, "outcome": o.outcome, "seconds": round(o.seconds)} for o in outcomes]
        (results / "report.json").write_text(json.dumps({"machine": about, "steps": ended}, indent=1) + "\n")
    print(results / "report.md")
    return int(any("passed" not in o.outcome and "left out" not in o.outcome for o in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
