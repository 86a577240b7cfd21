"""`make soak SECONDS=1800`: a server under random load, then the same questions again in quiet.

Clients ask a real `vllm serve` for prompts of 1 to 20,000 tokens, many with a common beginning, more than its KV cache
holds at once, and hang up in the middle of some. They begin with requests that run side by side until they grow beyond
the dense threshold and want slots, for which the pool is too small: most of them are preempted. Then, one after the
other and without the prefix cache, everything that was answered is asked again. At the end

* every greedy answer is the one that the quiet server gives;
* no block is in use (`vllm:kv_cache_usage_perc` is 0), neither after the load nor after the quiet questions;
* the server's memory has stayed within what it announced: at its start, plus its pools.

**What equality can mean.** With compressed keys an answer may depend on the load by design: context that comes from the
prefix cache is sealed, so a prompt that hits it reads compressed keys where one that does not reads exact ones; and
what a preempted request generated is computed again as a prompt, which is exact. So the soak runs with settings under
which sealing loses nothing (exact keys, values in the model's dtype, a budget that covers the context), in float32:
then whoever shares the batch, whatever is hit, sealed, evicted, preempted or left behind by someone who hung up, the
answer is the same but for rounding. Where the quiet server's own choice between two tokens is closer than `UNDECIDED`,
the comparison of that answer ends; the table says how often.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import FAMILIES, make_prompt
from benchmarks.progress import Progress
from benchmarks.server import Server, ServerError

LONGEST = 20_000
MODEL_LEN = 20_480
CLIENTS = 12
HANGING_UP = 0.15
"""Share of the requests that their clients do not wait for."""

SETTINGS = {
    "block_size": 256,
    "compression": 1,
    "key_codec": "none",
    "value_dtype": "auto",
    "sparse_budget": MODEL_LEN,
    "slot_chunks": MODEL_LEN // 8 + 8,
    "dense_threshold": 512,
    "prefill_exact_tokens": 4096,
}
"""Nothing is lost, and nearly everything is sealed."""

BLOCKS = 224
"""A request of 20,000 tokens takes about 190, one that has slots at least 83; the clients ask for more than that."""
BLOCK_KIB = 512
"""Of both layers' pages."""

UNDECIDED = 1e-3
SLACK_MIB = 256
"""What the server may take beside its pools: prompts in flight, buffers of the largest step."""

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The linear layers of every backend keep a kernel for each number of tokens that a step had, 1,024 of them unless
    # told otherwise, which come to 400 MiB in an hour: a leak could hide behind them.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}


@dataclass
class Question:
    """A prompt, how many tokens to generate, and what came."""

    prompt: list[int]
    tokens: int
    answer: list[str] | None = None


@dataclass
class Quiet:
    """The quiet server's answer, and by how much each token won."""

    tokens: list[str]
    margins: list[float]


class Load:
    """Draws questions, and keeps count."""

    def __init__(self, seed: int) -> None:
        """Prepares the common beginnings."""
        self._draw = random.Random(seed)
        self._heads = [
            make_prompt(family, LONGEST, seed=3_000_000 + seed * 10 + number).token_ids
            for number, family in enumerate(FAMILIES[:4])
        ]
        self.answered: list[Question] = []
        self.counts: Counter[str] = Counter()
        self._growing = CLIENTS

    def question(self) -> Question:
        """Lengths are log-uniform; half begin as others do, a few are a question again with another end."""
        draw = self._draw
        if self._growing:
            self._growing -= 1
            return Question(draw.choices(draw.choice(self._heads), k=draw.randint(400, 480)), 200)
        length = min(int(LONGEST ** draw.random() * (1 + draw.random())), LONGEST)
        # Some go on for so long that they need slots, or blocks, that were not there when they came.
        tokens = draw.randint(1, 48) if draw.random() < 0.8 else draw.randint(200, MODEL_LEN - LONGEST)
        kind = draw.random()
        head = draw.choice(self._heads)
        if kind < 0.5:
            own = min(length, draw.randint(1, 64))
            start = draw.randrange(LONGEST - own)
            return Question(head[: length - own] + head[start : start + own], tokens)
        if kind < 0.7 and self.answered:
            again = draw.choice(self.answered).prompt[: LONGEST - 1]
            return Question([*again, draw.choice(head)], tokens)
        return Question(draw.choices(head, k=length), tokens)

    def patience(self) -> float | None:
        """Seconds until the client hangs up; None: it waits."""
        return self._draw.expovariate(1.0) if self._draw.random() < HANGING_UP else None


class Client:
    """Asks a server over HTTP."""

    def __init__(self, server: Server, http: aiohttp.ClientSession) -> None:
        """For one server."""
        self._server, self._http = server, http

    async def ask(self, question: Question, patience: float | None) -> list[str] | None:
        """An answer; None if the client hung up before its end."""
        try:
            return await asyncio.wait_for(self._stream(question), patience)
        except asyncio.TimeoutError:
            return None

    async def _stream(self, question: Question) -> list[str]:
        body = self._body(question) | {"stream": True}
        answer: list[str] = []
        async with self._http.post(f"{self._server.url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise ServerError(f"the server answered {response.status}: {await response.text()}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    answer += choice["logprobs"]["tokens"] if choice["logprobs"] else []
        return answer

    async def ask_quietly(self, question: Question, salt: str) -> Quiet:
        """The same, computed from nothing: no one else's blocks have this salt."""
        body = self._body(question) | {"cache_salt": salt, "logprobs": 2}
        async with self._http.post(f"{self._server.url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise ServerError(f"the server answered {response.status}: {await response.text()}")
            found = (await response.json())["choices"][0]["logprobs"]
        ranked = [sorted(best.values(), reverse=True) for best in found["top_logprobs"]]
        return Quiet(found["tokens"], [values[0] - values[1] for values in ranked])

    async def metrics(self) -> dict[str, float]:
        """Prometheus numbers of vLLM, summed over their labels."""
        async with self._http.get(f"{self._server.url}/metrics") as response:
            text = await response.text()
        found: Counter[str] = Counter()
        for name, value in re.findall(r"^(vllm:\w+)(?:\{[^\n]*\})? ([^\s]+)$", text, re.MULTILINE):
            found[name] += float(value)
        return dict(found)

    async def wait_until_idle(self) -> dict[str, float]:
        """The numbers once no request runs or waits; those that hung up take a step to go."""
        for _ in range(300):
            metrics = await self.metrics()
            if not metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]:
                return metrics
            await asyncio.sleep(0.1)
        raise ServerError("requests still run 30 s after the last client has gone.")

    def _body(self, question: Question) -> dict[str, Any]:
        return {
            "model": str(CHECKPOINT),
            "prompt": question.prompt,
            "max_tokens": question.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }


def main() -> int:
    """Runs the soak; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="of load and quiet questions together, about")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console()
    options = ["--attention-backend", "shadowkv", "--additional-config", json.dumps({"shadowkv": SETTINGS})]
    options += ["--dtype", "float32", "--max-model-len", str(MODEL_LEN), "--max-num-seqs", str(CLIENTS)]
    options += ["--num-gpu-blocks-override", str(BLOCKS), "--enforce-eager", "--enable-prefix-caching"]
    options += ["--max-num-batched-tokens", "1024"]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "server.log"
        console.print("Starting `vllm serve " + " ".join([CHECKPOINT.name, *options]) + "` …")
        try:
            with Server(CHECKPOINT, log, options, ENVIRONMENT) as server:
                wrong = asyncio.run(_soak(server, arguments, console))
        except (ServerError, aiohttp.ClientError) as error:
            console.print(f"[red]{type(error).__name__}: {error}")
            console.print(log.read_text()[-3000:])
            return 1
    for sentence in wrong:
        console.print(f"[red]{sentence}")
    return int(bool(wrong))


async def _soak(server: Server, arguments: argparse.Namespace, console: Console) -> list[str]:
    """The load, the quiet questions, the table; returns what is wrong, in sentences."""
    load = Load(arguments.seed)
    timeout = aiohttp.ClientTimeout(total=None)
    # Kept connections may be closed by the server just as they are used again.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        client = Client(server, http)
        memory = Memory(server.pid)
        with Progress(console) as progress:
            await _run_load(client, load, memory, arguments.seconds, progress)
            busy = await client.wait_until_idle()
            different, undecided = await _ask_again(client, load, memory, progress)
        idle = await client.wait_until_idle()
    announced = memory.first + BLOCKS * BLOCK_KIB // 1024 + server.host_pool_mib() + SLACK_MIB
    table = Table(title=f"{arguments.seconds:.0f} s, {CLIENTS} clients", title_justify="left", show_header=False)
    lengths = sorted(len(question.prompt) for question in load.answered)
    hit = busy["vllm:prefix_cache_hits_total"] / max(busy["vllm:prefix_cache_queries_total"], 1)
    for name, value in (
        ("answered", f"{len(lengths)}, prompts of {lengths[0]} to {lengths[-1]:,} tokens, {sum(lengths):,} in all"),
        ("hung up", load.counts["hung up"]),
        ("preemptions", int(busy["vllm:num_preemptions_total"])),
        ("prompt tokens from the prefix cache", f"{hit:.0%}"),
        ("equal to the quiet server", f"{len(lengths) - len(different)} of {len(lengths)}"),
        ("compared up to an undecided token", undecided),
        ("KV cache in use after load, at the end", f"{_usage(busy):.1%}, {_usage(idle):.1%}"),
        ("server's memory at its start, most, at the end", f"{memory.first}, {memory.most}, {memory.last} MiB"),
        ("of them announced", f"{announced} MiB"),
    ):
        table.add_row(name, str(value))
    console.print(table)
    wrong = list(different)
    if _usage(busy) or _usage(idle):
        wrong.append("KV cache blocks are in use with no request running.")
    if memory.most > announced:
        wrong.append(f"The server took {memory.most} MiB, more than the {announced} MiB that it announced.")
    if not (load.counts["hung up"] and busy["vllm:prefix_cache_hits_total"] and busy["vllm:num_preemptions_total"]):
        wrong.append("Nobody hung up, no prefix was hit or nobody was preempted: the soak has not shown enough.")
    return wrong


def _usage(metrics: dict[str, float]) -> float:
    return metrics["vllm:kv_cache_usage_perc"]


async def _run_load(client: Client, load: Load, memory: Memory, seconds: float, progress: Progress) -> None:
    """Asks until a third of the time is over: alone and from nothing, the same questions take longer."""
    deadline = time.monotonic() + seconds / 3
    task = progress.add_task("load ", total=None)

    async def one_client() -> None:
        while time.monotonic() < deadline:
            question, patience = load.question(), load.patience()
            question.answer = await client.ask(question, patience)
            if question.answer is None:
                load.counts["hung up"] += 1
            else:
                load.answered.append(question)
            memory.look()
            progress.advance(task)

    await asyncio.gather(*(one_client() for _ in range(CLIENTS)))


async def _ask_again(client: Client, load: Load, memory: Memory, progress: Progress) -> tuple[list[str], int]:
    """Returns what differs, in sentences, and how many comparisons ended at an undecided token."""
    different, undecided = [], 0
    for number, question in enumerate(progress.track(load.answered, description="quiet")):
        quiet = await client.ask_quietly(question, salt=f"quiet {number}")
        memory.look()
        answer = question.answer or []
        place = next((i for i, pair in enumerate(zip(answer, quiet.tokens, strict=False)) if pair[0] != pair[1]), None)
        if len(answer) != len(quiet.tokens):
            different.append(f"Question {number}: {len(answer)} tokens, in quiet {len(quiet.tokens)}.")
        elif place is not None and quiet.margins[place] < UNDECIDED:
            undecided += 1
        elif place is not None:
            different.append(
                f"Question {number} ({len(question.prompt)} tokens): token {place} is {answer[place]}, in quiet "
                f"{quiet.tokens[place]}, by {quiet.margins[place]:.3f}."
            )
    return different, undecided


class Memory:
    """Resident memory of a server and its processes, MiB."""

    def __init__(self, pid: int) -> None:
        """Looks for the first time."""
        self._process = psutil.Process(pid)
        self.most = 0
        self.first = self.look()

    def look(self) -> int:
        """What it is now."""
        processes = [self._process, *self._process.children(recursive=True)]
        self.last = sum(process.memory_info().rss for process in processes if process.is_running()) // 2**20
        self.most = max(self.most, self.last)
        return self.last


if __name__ == "__main__":
    raise SystemExit(main())
