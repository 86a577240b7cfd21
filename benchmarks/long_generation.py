"""One request that generates for long: `python -m benchmarks.long_generation --tokens 20000`.

The copying model (`benchmarks/copying.py`) knows one right token at every place, and finds it only in the context: most
of it sealed, the keys compressed, a tenth of it read in a step at the end. At the end

* every token is the right one;
* the request holds the blocks that `Capacity.decoding_pages` says, at every token;
* the process has taken no more memory than its pools have, and `SLACK_MIB`.

The table shows what could drift: time per token, the right token's probability, blocks, memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import copying
from benchmarks.machine import machine

PROMPT = 1100
WINDOW = 1000
"""Tokens of a row of the table."""

NUM_BLOCKS = 84
"""Were all of them exact, they would hold 10,752 tokens."""

SETTINGS = {"dense_threshold": 1024, "prefill_exact_tokens": 0, "resident_pages": False}
SLACK_MIB = 64


@dataclass(frozen=True)
class Window:
    """Some tokens in a row.

    Attributes:
        tokens: generated before its end.
        right: of its tokens.
        milliseconds: per token, the first decile: what others do on the machine shows least there.
        worst_probability: of a right token.
        blocks: in use at its end.
        memory_mib: of the process at its end.
    """

    tokens: int
    right: int
    milliseconds: float
    worst_probability: float
    blocks: int
    memory_mib: int


def main() -> int:
    """Returns the process's exit code: 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_generation", description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="a GPU takes 16 bits")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its blocks are looked at
    with tempfile.TemporaryDirectory() as directory:
        copying.write(Path(directory))
        windows, wrong = generate(_engine(directory, arguments.dtype), arguments.tokens)
    console = Console()
    table = Table("tokens", "right", "ms a token", "worst probability", "blocks", "memory, MiB")
    for window in windows:
        table.add_row(
            *(f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" for value in asdict(window).values())
        )
    console.print(table)
    for sentence in wrong:
        console.print(f"[red]{sentence}")
    if arguments.json:
        result = {
            **machine("long_generation", "cuda" if torch.cuda.is_available() else "cpu"),
            "windows": [asdict(window) for window in windows],
            "wrong": wrong,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(wrong))


def _engine(model: str, dtype: str) -> Any:
    from vllm import LLM

    return LLM(
        model,
        dtype=dtype,
        attention_backend="shadowkv",
        additional_config={"shadowkv": SETTINGS},
        max_model_len=24_576,
        max_num_batched_tokens=512,
        max_num_seqs=1,
        num_gpu_blocks_override=NUM_BLOCKS,
        async_scheduling=False,  # a second step in flight needs more blocks than NUM_BLOCKS
        enforce_eager=True,
        skip_tokenizer_init=True,
    ).llm_engine


def generate(engine: Any, tokens: int) -> tuple[list[Window], list[str]]:
    """Generates; returns the windows, and what is wrong, in sentences."""
    from vllm import SamplingParams

    from vllm_shadowkv.integration.worker.runtime import Runtime

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
    prompt = copying.prompt(PROMPT)
    engine.add_request("long", {"prompt_token_ids": prompt}, params)
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    runtime = Runtime.latest()
    capacity = runtime.memory.capacity.resolve(NUM_BLOCKS)
    successors, process = copying.successors(), psutil.Process()
    announced = NUM_BLOCKS * (capacity.block_bytes + capacity.host_bytes) >> 20
    windows: list[Window] = []
    wrong: list[str] = []
    times: list[float] = []
    done, first_memory, blocks = 0, 0, 0
    while engine.has_unfinished_requests():
        began = time.perf_counter()
        outputs = engine.step()
        times.append(time.perf_counter() - began)
        output = outputs[0].outputs[0] if outputs else None
        if output is None or len(output.token_ids) == done:
            continue
        done = len(output.token_ids)
        if not outputs[0].finished:
            blocks = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            expected = capacity.decoding_pages(PROMPT + done - 1)
            if done > 1 and blocks != expected:
                wrong.append(f"After {done} tokens {blocks} blocks are in use; they should be {expected}.")
        if done % WINDOW and done != tokens:
            continue
        start = windows[-1].tokens if windows else 0
        said = [prompt[-1], *output.token_ids]
        right = [successors.get(one) == other for one, other in zip(said[start:], said[start + 1 :], strict=False)]
        if not all(right):
            wrong.append(f"Of tokens {start} to {done}, {right.count(False)} are wrong.")
        chosen = zip(output.token_ids[start:], output.logprobs[start:], strict=True)
        memory = process.memory_info().rss >> 20
        first_memory = first_memory or memory
        windows.append(
            Window(
                done,
                right=sum(right),
                milliseconds=1000 * statistics.quantiles(times, n=10)[0],
                worst_probability=min(2.718281828 ** logprobs[token].logprob for token, logprobs in chosen),
                blocks=blocks,
                memory_mib=memory,
            )
        )
        times.clear()
    if windows[-1].memory_mib > first_memory + announced + SLACK_MIB:
        wrong.append(
            f"The process took {windows[-1].memory_mib - first_memory} MiB while it generated, more than its pools' "
            f"{announced} MiB."
        )
    return windows, wrong


if __name__ == "__main__":
    sys.exit(main())
