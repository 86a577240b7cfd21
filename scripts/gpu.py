"""All work that needs a GPU, in order: `python scripts/gpu.py test | bench | accuracy | all [--only NAME ...]`.

Every step is a command that can be run alone. What it prints goes to a file of its own under the results' directory,
and `report.md` there says of every step what it was, how long it took and how it ended. Numbers and plots go to
`benchmarks/results`, or, with `--results`, to that directory too; `results.tar.gz` there holds all of it, anew after
every step. A step that fails does not stop the next: time on a GPU is short, so what matters most comes first, and
`--deadline` ends in time. `--rehearse` runs the same steps on a machine without a GPU, at sizes that take minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import psutil

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "COLUMNS": "160",  # tables in a log have no terminal to fit
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # vLLM takes it for granted on CUDA; a cut installation has none
}
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""For a rehearsal: what vLLM would take on a CPU is half of the memory."""
STRICT = {"SHADOWKV_REQUIRE_GPU": "1"}
"""Where there is a GPU: tests fail where they would be skipped without one."""

ARCHIVE = "results.tar.gz"
LEAST_SECONDS = 20
"""With less time than this no step is begun."""

# What steps import beyond PyTorch and this repository.
TEST = ("pytest", "rich")
ENGINE = ("vllm", "transformers", "safetensors", "rich", "tqdm")
CLI = (
    *ENGINE,
    *("uvicorn", "watchfiles", "prometheus_fastapi_instrumentator", "model_hosting_container_standards", "jmespath"),
    *("matplotlib", "pandas"),
)

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
        imports: packages that must be there.
        environment: variables of its own.
    """

    name: str
    kind: str
    what: str
    command: list[str]
    seconds: int
    needs: str | None = None
    imports: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def steps(results: Path, records: Path, rehearse: bool) -> list[Step]:
    """The list; smaller, and on the CPU, for a rehearsal.

    Args:
        results: directory of models and answers.
        records: directory of numbers and plots.
        rehearse: see above.
    """
    python = sys.executable
    device = ["--device", "cpu" if rehearse else "cuda"]
    marked = [] if rehearse else ["-m", "gpu"]
    ops = ["-k", "128 and bfloat16 and not emulated"] if rehearse else marked
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # A kernel that faults takes its process's context with it, and one that hangs would take all the time.
    apart = ["-n", "8", "--dist", "loadfile"] if find_spec("xdist") and not rehearse else []
    apart += ["--timeout", "60", "--timeout-method", "thread"] if find_spec("pytest_timeout") else []
    sanitizer = ["compute-sanitizer", "--error-exitcode", "3", "--target-processes", "all", "--report-api-errors", "no"]
    model = str(results / "dummy")
    contexts = ["4096", "8192"] if rehearse else ["122880", "32768", "4096", "8192", "16384", "65536", "524288"]
    # Pages for all steps in flight are set aside: with vLLM's 16,384 tokens a step they would take twice as much.
    served = ["--", "--load-format", "dummy", "--max-num-seqs", "32"]
    served += ["--enforce-eager"] if rehearse else ["--max-num-batched-tokens", "8192"]
    # What shadowkv needs for 8 requests of 122,880 tokens. Their values take 100 GiB of the host's memory.
    equal = [*served, *([] if rehearse else ["--kv-cache-memory-bytes", "25G"])]

    def to(name: str, *options: str) -> list[str]:
        endings = {"json": ".json", "plot": ".png"}
        return [x for option in options for x in (f"--{option}", str(records / (name + endings[option])))]

    def bench(
        name: str, module: str, what: str, *arguments: str,
        kind: str = "bench", seconds: int = 600, imports: tuple[str, ...] = ENGINE,
    ) -> Step:  # fmt: skip
        return Step(name, kind, what, [python, "-m", f"benchmarks.{module}", *arguments], seconds, imports=imports)

    def llama(name: str, tool: str, what: str, lengths: list[str], backends: list[str], *more: str) -> Step:
        lengths = ["4608"] if rehearse else lengths
        backends = [name for name in backends if name != "stock-fp8" or not rehearse]  # which no CPU has
        return bench(
            name, f"benchmark_{tool}", what, model, "--input-lens", *lengths, "--backends", *backends,
            *more, *to(name, "json", "plot"), *equal, seconds=600 * len(lengths) * len(backends), imports=CLI,
        )  # fmt: skip

    def throughput(name: str, lengths: list[str], backends: list[str], prompts: list[str]) -> Step:
        what = (
            f"vllm bench throughput, equal device memory: {', '.join(prompts)} prompts of {', '.join(lengths)} tokens"
        )
        few = ["--num-prompts", "2", "--output-len", "8"] if rehearse else ["--output-len", "512", "--num-prompts"]
        return llama(f"throughput_{name}", "throughput", what, lengths, backends, *few, *([] if rehearse else prompts))

    def latency(name: str, lengths: list[str], backends: list[str]) -> Step:
        what = f"time to the first token and per token after it, {', '.join(lengths)} tokens"
        return llama(name, "latency", what, lengths, backends, "--output-len", "8" if rehearse else "128")

    def train(name: str, *arguments: str) -> Step:
        recipe = ["--recipe", "small", "--minutes", "0.3"] if rehearse else ["--recipe", "long", "--minutes", "8"]
        recipe += [*device, "--workers", "1" if rehearse else "8"]
        files = ["--out", str(results / f"{name}.pt"), "--export", str(results / name)]
        what = f"training of {name.replace('_', ' ')}, for prompts of 16K to 32K tokens"
        return bench(f"train_{name}", "needle.train", what, *recipe, *files, *arguments, kind="accuracy", seconds=900)

    def accuracy(name: str, tokens: str, haystacks: str, suffix: str = "") -> list[Step]:
        # Without the suffix: more haystacks go on in the file of few.
        answers = {backend: str(results / f"{name}_{tokens}_{backend}.jsonl") for backend in ("stock", "shadowkv")}
        asked = ["--model", str(results / name), "--needle-tokens", "1024" if rehearse else tokens]
        asked += ["--haystacks", "1", "--questions", "2"] if rehearse else ["--haystacks", haystacks]
        # Of a tiny model: vLLM would take most of the GPU, and we pin as much of the host's memory as backs that.
        asked += [] if rehearse else ["--options", json.dumps({"kv_cache_memory_bytes": 2 << 30})]
        named = f"{name}_{tokens}{suffix}"
        return [
            *(
                bench(f"{named}_{backend}", "accuracy.collect", f"answers to prompts of {tokens} tokens",
                      file, *asked, "--backend", backend, kind="accuracy", seconds=1200)
                for backend, file in answers.items()
            ),
            bench(f"accuracy_{named}", "accuracy.compare", "what shadowkv loses and wins of them",
                  *answers.values(), *device, *to(f"accuracy_{named}", "json", "plot"), kind="accuracy",
                  imports=(*ENGINE, "matplotlib")),
        ]  # fmt: skip

    def sanitized(tool: str, environment: dict[str, str]) -> Step:
        command = [*sanitizer, "--tool", tool, *pytest, "-m", "gpu", "-k", SANITIZED_KEYWORDS, *SANITIZED]
        what = f"compute-sanitizer {tool}"
        return Step(tool, "test", what, command, 600, "compute-sanitizer", TEST, environment)

    both, others = ["stock", "shadowkv"], ["stock-fp8", "shadowkv-16-bit-values"]
    return [
        Step("doctor", "test", "what is installed", [python, "-m", "vllm_shadowkv", "doctor"], 120, imports=("rich",)),
        Step("ops", "test", "every op against the reference",
             [*pytest, *ops, *apart, "tests/ops", "tests/state/test_low_rank.py"], 600, imports=TEST),
        Step("graphs", "test", "decode steps eager, captured, replayed, on another stream",
             [*pytest, *marked, "tests/gpu/test_decode_graph.py"], 300, imports=TEST),
        Step("needle", "test", "the needle model against FLASH_ATTN",
             [*pytest, *marked, "tests/gpu/test_needle.py"], 900, imports=(*TEST, *ENGINE)),
        bench("ops_cuda", "bench_ops", "time of each op, share of its limit", *device, *to("ops_cuda", "json"),
              imports=("rich",)),
        # Memory that PyTorch keeps for later is memory that a wrong access would be allowed to touch.
        sanitized("memcheck", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        Step("lossless", "test", "tiny models without loss against FLASH_ATTN: runners, graphs, drafts, preemption",
             [*pytest, *marked, "tests/gpu/test_engines.py"], 1800, imports=(*TEST, *ENGINE)),
        bench("decode_cuda", "bench_decode", "the attention layer of a decode step, against FlashAttention",
              *device, "--contexts", *contexts, "--batches", "8", "1", "32", *to("decode_cuda", "json", "plot"),
              imports=(*ENGINE, "matplotlib")),
        bench("model", "dummy_model", "the model that the next steps serve", "llama-3.1-8b", model,
              *(["--layers", "1"] if rehearse else [])),
        *(throughput(f"122880_{backend}", ["122880"], [backend], ["8"]) for backend in both),
        throughput("122880_8bit", ["122880"], others, ["8"]),
        *(throughput(length, [length], both + others, ["8"]) for length in ("61440", "32768")),
        bench("beyond_cuda", "benchmark_throughput", "a request whose full KV cache is larger than the memory", model,
              "--input-lens", "4608" if rehearse else "122880", "--num-prompts", "1", "--backends", "shadowkv",
              "--output-len", "8" if rehearse else "128", *to("beyond_cuda", "json"),
              *served, "--kv-cache-memory-bytes", "64M" if rehearse else "7G", imports=CLI),
        latency("latency_122880", ["122880"], both),
        train("long_needle"),
        *accuracy("long_needle", "16384", "5", "_few"),
        bench("long_generation_cuda", "long_generation", "5,000 tokens of one request, each of them known",
              "--tokens", "1200" if rehearse else "5000", "--dtype", "float16", *to("long_generation_cuda", "json")),
        sanitized("racecheck", {}),
        latency("latency_lengths", ["32768", "61440"], both + others),
        throughput("prompts", ["122880", "61440", "32768"], both + others, ["1", "32"]),
        *accuracy("long_needle", "16384", "40"),
        *accuracy("long_needle", "32768", "40"),
        train("long_twin", "--no-aux"),
        *(step for tokens in ("16384", "32768") for step in accuracy("long_twin", tokens, "40")),
    ]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed (exit code)", "took longer than …", "stopped" or "left out (why)"."""

    step: Step
    outcome: str
    seconds: float


class Stopped(Exception):
    """Somebody wants this process to end."""


def run(step: Step, results: Path, environment: dict[str, str], most_seconds: float) -> Outcome:
    """Runs one step, its output in a file of its own, for at most so long."""
    if step.needs and shutil.which(step.needs) is None:
        return Outcome(step, f"left out ({step.needs} is not installed)", 0)
    if most_seconds < LEAST_SECONDS:
        return Outcome(step, "left out (the deadline is near)", 0)
    started = time.monotonic()
    seconds = min(step.seconds, most_seconds)
    with (results / f"{step.name}.log").open("wb") as log:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=os.environ | environment | step.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(seconds)
            outcome = f"failed (exit code {code})" if code else "passed"
        except subprocess.TimeoutExpired:
            outcome = f"took longer than {seconds:.0f} s" + ", the deadline" * (seconds < step.seconds)
        except Stopped:
            outcome = "stopped"
        end_children()
    return Outcome(step, outcome, time.monotonic() - started)


def adopt_orphans() -> None:
    """Makes Linux give this process what its children leave running, so that `end_children` finds it."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_children() -> None:
    """Ends every process that a step has begun, those in sessions of their own too: they would keep the GPU."""
    for _ in range(3):  # one may begin another meanwhile
        children = psutil.Process().children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=10)


def archive(results: Path) -> None:
    """Packs the results; the last archive stays whole until the new one is."""
    unfinished = results / f"{ARCHIVE}.part"
    with tarfile.open(unfinished, "w:gz") as file:
        file.add(results, results.name, filter=lambda member: None if ARCHIVE in member.name else member)
    unfinished.replace(results / ARCHIVE)


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
    parser.add_argument("--results", type=Path, help="where everything goes; default: build/gpu and benchmarks/results")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", default=math.inf, help="end before so long")
    parser.add_argument("--dry", action="store_true", help="print the commands")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.deadline
    rehearse: bool = arguments.rehearse
    results: Path = (arguments.results or ROOT / "build" / "gpu").resolve()
    records = results if rehearse or arguments.results else ROOT / "benchmarks" / "results"
    doctor, *rest = steps(results, records, rehearse)
    chosen = [step for step in (doctor, *rest) if arguments.kind in (step.kind, "all")]
    if arguments.only:
        unknown = set(arguments.only) - {step.name for step in chosen}
        if unknown:
            parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in chosen)}")
        chosen = [step for step in chosen if step.name in arguments.only]
    if not rehearse and doctor not in chosen:
        chosen.insert(0, doctor)
    if arguments.dry:
        for step in chosen:
            print(f"{step.name}: {written(step)}")
        return 0
    if missing := sorted({name for step in chosen for name in step.imports if find_spec(name) is None}):
        asking = [step.name for step in chosen if not set(missing).isdisjoint(step.imports)]
        parser.error(f"not installed: {', '.join(missing)}; these steps import them: {', '.join(asking)}")
    import torch

    if not rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --rehearse runs on the CPU")
    from benchmarks.machine import machine

    results.mkdir(parents=True, exist_ok=True)
    about = machine("", "cpu" if rehearse else "cuda") | {
        "command": f"python scripts/gpu.py {shlex.join(sys.argv[1:])}"
    }
    environment = ENVIRONMENT | (SMALL if rehearse else STRICT)
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        outcomes = work(chosen, results, environment, end, about)
    finally:
        end_children()
    print(results / "report.md")
    return int(any("passed" not in o.outcome and "left out" not in o.outcome for o in outcomes))


def work(
    chosen: list[Step], results: Path, environment: dict[str, str], end: float, about: dict[str, object]
) -> list[Outcome]:
    """Runs the steps until `end`, and writes what is known after each of them."""
    outcomes: list[Outcome] = []
    for step in chosen:
        print(f"{step.name}: {step.what} ...", flush=True)
        outcomes.append(run(step, results, environment, end - time.monotonic()))
        print(f"  {outcomes[-1].outcome}, {outcomes[-1].seconds:.0f} s", flush=True)
        (results / "report.md").write_text(report(outcomes, about))
        ended = [{"name": o.step.name, "outcome": o.outcome, "seconds": round(o.seconds)} for o in outcomes]
        (results / "report.json").write_text(json.dumps({"machine": about, "steps": ended}, indent=1) + "\n")
        archive(results)
        if outcomes[-1].outcome == "stopped":
            break
        if step.name == "doctor" and outcomes[-1].outcome != "passed" and STRICT.items() <= environment.items():
            print(f"The doctor found what must be put right first:\n{(results / 'doctor.log').read_text()}")
            break
    return outcomes


def stop(number: int, frame: FrameType | None) -> None:
    """What a signal does: the step that runs is ended, and the report written."""
    signal.signal(number, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    raise SystemExit(main())
