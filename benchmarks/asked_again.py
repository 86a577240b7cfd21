"""What is asked again, or by several at once, beside the stock backend: `python -m benchmarks.asked_again`.

The needle model in float32, in a pool with room for everything. Of every case: tokens from the prefix cache, seconds
(the median round's), and how the second answer differs from the first. All backends are alive at once and asked in
turn, so that what else the machine does slows all of them. `sealed` is shadowkv without resident pages: what it does
once memory is short. The last cases are a prompt beyond the window that is kept exact, whose log-probabilities are held
against stock's, and a pool that documents fill to the brim, each of which is asked for again in random order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.alone import Alone, alone
from benchmarks.machine import machine
from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import FILLER, make_prompt
from benchmarks.progress import track
from vllm_shadowkv.cli.model import read_model
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import plan_page
from vllm_shadowkv.state.boundary import ExactBoundary
from vllm_shadowkv.state.capacity import Capacity

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
OURS: dict[str, Any] = {"attention_backend": "shadowkv"}
BACKENDS: dict[str, dict[str, Any]] = {
    "stock": {},
    "shadowkv": OURS,
    "sealed": OURS | {"additional_config": {"shadowkv": {"resident_pages": False}}},
}
LENGTHS = (1100, 2100, 3000, 6000, 16_000)
LONG = 24_000
MODEL_LEN = LONG + 100
STEP_TOKENS = 8192
SMALL_STEP_TOKENS = 2048
DOCUMENTS, DOCUMENT_TOKENS = 6, 20_000


@dataclass
class Case:
    """What one case gave on one backend.

    Attributes:
        name: of the case.
        tokens: that were looked for in the prefix cache.
        cached: of them from the prefix cache.
        times: seconds of what was asked again, or together; of every round, each with other prompts.
        answers: of a second ask: how many there are.
        different: of them with other tokens than the first.
        error: the largest difference of a log-probability: from the first answer's, up to the first other token; of a
            prompt's, from stock's.
        expanded: sealed tokens that were expanded.
        logprobs: of a prompt's tokens.
    """

    name: str
    tokens: int
    cached: int
    times: list[float]
    answers: int = 0
    different: int = 0
    error: float = 0.0
    expanded: int = 0
    logprobs: list[float] = field(default_factory=list)

    def add(self, other: Case) -> None:
        """A further round."""
        for name in ("tokens", "cached", "times", "answers", "different", "expanded"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.error = max(self.error, other.error)

    @property
    def seconds(self) -> float:
        """The median round's."""
        return statistics.median(self.times)


class Engine:
    """An `LLM` and its counters. What it is asked in a case depends on `seed` alone."""

    def __init__(self, backend: str, step_tokens: int = STEP_TOKENS, **options: Any) -> None:
        """Starts it; `options` are of `LLM`, and come before what is otherwise set here."""
        os.environ |= ENVIRONMENT | os.environ
        from vllm import LLM

        settings: dict[str, Any] = {"model": str(CHECKPOINT), "max_model_len": MODEL_LEN, "dtype": "float32"}
        settings |= {"max_num_batched_tokens": step_tokens, "enforce_eager": True, "disable_log_stats": False}
        self.llm = LLM(**(settings | BACKENDS[backend] | options))

    def close(self) -> None:
        """Ends the engine, when everything is written."""
        self.llm.llm_engine.engine_core.shutdown()

    def ask(self, prompts: Iterable[list[int]], tokens: int, **sampling: Any) -> list[Any]:
        """Answers to prompts that come at once; greedy, unless `sampling` says otherwise."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, detokenize=False, **{"temperature": 0, "logprobs": 0, **sampling})
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(inputs, params, use_tqdm=False)

    def measure(self, name: str, call: Callable[[], Any]) -> tuple[Case, Any]:
        """What the call did, and its result; the case's tokens are those that vLLM looked for in its prefix cache."""
        before, began = self._counters(), time.perf_counter()
        result = call()
        seconds = time.perf_counter() - began
        hits, queries, expanded = (now - then for now, then in zip(self._counters(), before, strict=True))
        return Case(name, queries, hits, [seconds], expanded=expanded), result

    def second_ask(self, length: int, seed: int) -> Case:
        """The same question twice."""
        prompt = make_prompt(("multi_key", "overwritten")[seed % 2], length, seed).token_ids
        (first,) = self.ask([prompt], 8)
        case, (again,) = self.measure(f"again, {length:,}", lambda: self.ask([prompt], 8))
        pairs = list(zip(chosen(first), chosen(again), strict=True))
        same = next((place for place, (a, b) in enumerate(pairs) if a[0] != b[0]), len(pairs))
        case.answers, case.different = 1, int(same < len(pairs))
        case.error = max([0.0, *(abs(a[1] - b[1]) for a, b in pairs[:same])])
        return case

    def beam_search(self, seed: int) -> Case:
        """Width 4, 8 tokens; a request for every beam and step."""
        from vllm.sampling_params import BeamSearchParams

        prompt: Any = {"prompt_token_ids": random_prompt(3000, 100 + seed)}
        params = BeamSearchParams(beam_width=4, max_tokens=8, ignore_eos=True)
        return self.measure("beam search, 3,000", lambda: self.llm.beam_search([prompt], params))[0]

    def branches(self, length: int, seed: int) -> Case:
        """Eight answers to one prompt."""
        prompt = random_prompt(length, 200 + seed)
        return self.measure(f"n=8, {length:,}", lambda: self.ask([prompt], 8, n=8, temperature=1.0))[0]

    def short_then_more(self, seed: int) -> Case:
        """A prompt with one token of answer, then with a little more at its end and eight."""
        prompt = random_prompt(3000, 300 + seed)
        self.ask([prompt], 1)
        return self.measure("max_tokens 1, then more", lambda: self.ask([[*prompt, *prompt[:20]]], 8))[0]

    def _counters(self) -> tuple[int, int, int]:
        values = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        names = ("vllm:prefix_cache_hits", "vllm:prefix_cache_queries", "vllm:shadowkv_expanded_tokens")
        hits, queries, expanded = (int(values.get(name, 0)) for name in names)
        return hits, queries, expanded


def random_prompt(length: int, seed: int) -> list[int]:
    """Filler words."""
    draw = random.Random(seed)
    return [draw.choice(FILLER) for _ in range(length)]


def chosen(output: Any) -> list[tuple[int, float]]:
    """The tokens of an answer, each with its log-probability."""
    answer = output.outputs[0]
    return [(token, places[token].logprob) for token, places in zip(answer.token_ids, answer.logprobs, strict=True)]


def run_long(backend: str) -> Case:
    """Log-probabilities of a long prompt's own tokens."""
    engine = Engine(backend, SMALL_STEP_TOKENS)
    prompt = make_prompt("multi_key", LONG, 3).token_ids
    case, (output,) = engine.measure(f"prompt of {LONG:,}", lambda: engine.ask([prompt], 1, prompt_logprobs=0))
    places = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    case.logprobs = [logprobs[token].logprob for token, logprobs in places if logprobs]
    return case


def run(backends: list[str], count: int) -> dict[str, list[Case]]:
    """All cases but the last two, of which each takes memory or time, on all backends in turn."""
    calls: list[tuple[str, tuple[int, ...], int]] = [
        *(("second_ask", (length,), count) for length in LENGTHS),
        *(("branches", (length,), rounds) for length, rounds in ((3000, count), (12_000, 2))),
        ("beam_search", (), count),
        ("short_then_more", (), count),
    ]
    results: dict[str, list[Case]] = {backend: [] for backend in backends}
    with contextlib.ExitStack() as stack:
        engines = {backend: stack.enter_context(Alone(Engine, backend)) for backend in backends}
        for method, arguments, rounds in track(calls, "cases", Console()):
            for seed in (rounds, *range(rounds)):  # the first one warms up
                for backend in backends[:: 1 if seed % 2 else -1]:
                    case = engines[backend].call(method, *arguments, seed)
                    if seed == 0:
                        results[backend].append(case)
                    elif seed < rounds:
                        results[backend][-1].add(case)
    return results


def run_documents(backend: str) -> Case:
    """Documents in a pool that has room for the longest request while it is computed, and for the others sealed."""
    config, shape = ShadowKVConfig(), read_model(str(CHECKPOINT), "float32", max_model_len=MODEL_LEN)
    layout = plan_page(config, shape.num_kv_heads, shape.head_size, shape.dtype)
    boundary = ExactBoundary.of(config, STEP_TOKENS, MODEL_LEN)
    least = Capacity.of(config, layout, shape.num_layers, boundary).min_blocks
    others = (DOCUMENTS - 1) * (DOCUMENT_TOKENS // config.block_size)
    engine = Engine(backend, num_gpu_blocks_override=least + others)
    texts = [random_prompt(DOCUMENT_TOKENS, seed) for seed in range(DOCUMENTS)]
    for text in texts:
        engine.ask([text], 2)
    order = random.Random(0).sample(texts, DOCUMENTS)
    return engine.measure("documents", lambda: [engine.ask([text], 2) for text in order])[0]


def table(results: dict[str, list[Case]]) -> Table:
    """The cases for the terminal."""
    view = Table(title="Share of tokens from the cache; seconds a time; answers unlike the first, and their error")
    view.add_column("case")
    for what in ("cached", "s", "unlike"):
        for backend in results:
            view.add_column(f"{backend}\n{what}", justify="right")
    for name in dict.fromkeys(case.name for cases in results.values() for case in cases):
        cells: dict[str, list[str]] = {"cached": [], "s": [], "unlike": []}
        for cases in results.values():
            case = next((case for case in cases if case.name == name), None)
            cells["cached"].append(f"{case.cached / case.tokens:.1%}" if case and case.tokens else "")
            cells["s"].append(f"{case.seconds:.3g}" if case else "")
            cells["unlike"].append(_difference(case) if case else "")
        view.add_row(name, *(cell for kind in cells.values() for cell in kind))
    return view


def _difference(case: Case) -> str:
    if case.answers:
        return f"{case.different}, {case.error:.1g}"
    return f"{case.error:.1g}" if case.logprobs else ""


def hold_against(case: Case, stock: Case) -> None:
    """Notes how far the log-probabilities of a prompt are from stock's."""
    case.error = max(abs(one - other) for one, other in zip(case.logprobs, stock.logprobs, strict=True))


def plot(results: dict[str, list[Case]], path: Path) -> None:
    """Shares of cached tokens, and seconds relative to stock."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [case.name for case in results["stock"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
    height = 0.8 / len(results)
    for number, (backend, cases) in enumerate(results.items()):
        found = {case.name: case for case in cases}
        places = [place + number * height for place in range(len(names))]
        axes[0].barh(places, [found[name].cached / max(found[name].tokens, 1) for name in names], height, label=backend)
        stock = [case.seconds for case in results["stock"]]
        axes[1].barh(places, [found[name].seconds / time for name, time in zip(names, stock, strict=True)], height)
    axes[0].set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("share of prompt tokens from the prefix cache")
    axes[1].set_xlabel("time / time of the stock backend")
    axes[1].axvline(1, color="grey", linewidth=1)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", choices=BACKENDS, nargs="+", default=list(BACKENDS))
    parser.add_argument("--prompts", type=int, default=10, help="of each case, but for two of 12,000 tokens")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--plot", type=Path, help="where a PNG goes")
    arguments = parser.parse_args()
    results = run(["stock", *(backend for backend in arguments.backends if backend != "stock")], arguments.prompts)
    for backend in results:
        results[backend].append(alone(run_long, backend))
        hold_against(results[backend][-1], results["stock"][-1])
    for backend in results:
        if backend != "stock":
            results[backend].append(alone(run_documents, backend))
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(table(results))
    if arguments.plot:
        plot(results, arguments.plot)
    if arguments.json:
        content = {backend: [asdict(case) | {"logprobs": []} for case in cases] for backend, cases in results.items()}
        result = {"machine": machine("asked_again", "cpu"), "results": content}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
    sys.exit(0)
