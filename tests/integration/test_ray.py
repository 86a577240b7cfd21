"""Engines over two machines of Ray, as `examples/two_nodes` starts them; both machines are this one.

A server for each way to share the work. Its last test ends it, so their order matters.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from engine import ENVIRONMENT
from test_server import Traces, eventually, new_directory
from two_nodes import HERE, ROOT, TwoNodes, title

from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import make_prompt
from benchmarks.server import Server
from vllm_shadowkv.state import promised_memory

pytestmark = pytest.mark.slow

# A budget of all the chunks that a prompt's two sealed blocks have, so that their number is known.
SETTINGS = {"dense_threshold": 1024, "sparse_budget": 2048, "slot_chunks": 280, "host_memory_gib": 0.08}
SETTINGS |= {"value_dtype": "auto", "resident_pages": False}
BLOCK_SIZE, BLOCKS, BLOCK_CHUNKS = 1024, 2, 128
LAYERS, KV_HEADS, CHUNK_BYTES = 2, 2, 8 * 64 * 2
CHUNKS = LAYERS * KV_HEADS * BLOCKS * BLOCK_CHUNKS
"""Of a prompt's sealed blocks, over all ranks."""
TOKENS = 5
PROMPTS = [make_prompt("multi_value", 2100, seed) for seed in (7, 8, 9)]

TENSOR = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "1"]
PIPELINE: list[str] = []  # what the script does by itself
DATA = ["--tensor-parallel-size", "1", "--pipeline-parallel-size", "1"]
DATA += ["--data-parallel-size", "2", "--data-parallel-size-local", "1", "--data-parallel-backend", "ray"]
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": f"{HERE / 'v2_on_cpu' / 'spawned'}{os.pathsep}{HERE}"}

ONE_PROCESS = """
import json, sys
from vllm import LLM, SamplingParams
model, settings, tokens, *prompts = map(json.loads, sys.argv[1:])
options = {"max_model_len": 4096, "max_num_seqs": 4, "enforce_eager": True}
llm = LLM(model, attention_backend="shadowkv", additional_config={"shadowkv": settings}, **options)
params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
asked = [llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0] for prompt in prompts + prompts]
print("RESULT", json.dumps([[list(one.outputs[0].token_ids), one.num_cached_tokens] for one in asked]))
"""

Asked = list[tuple[list[int], int]]
"""Tokens, and how many of the prompt the prefix cache had: of every prompt, and then of every prompt again."""


def one_process(environment: dict[str, str]) -> Asked:
    """What an engine says whose scheduler and worker are one process, without Ray."""
    paths = filter(None, [environment.get("PYTHONPATH"), str(ROOT)])
    environment = environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": os.pathsep.join(paths)}
    arguments = [str(CHECKPOINT), SETTINGS, TOKENS, *(prompt.token_ids for prompt in PROMPTS)]
    command = [sys.executable, "-c", ONE_PROCESS, *map(json.dumps, arguments)]
    result = subprocess.run(command, env=os.environ | ENVIRONMENT | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    (found,) = re.findall(r"^RESULT (.*)$", result.stdout, re.MULTILINE)
    return [(tokens, cached) for tokens, cached in json.loads(found)]


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Future[Asked]]]:
    """By runner, in the background."""
    with ThreadPoolExecutor() as pool:
        yield {"v1": pool.submit(one_process, {}), "v2": pool.submit(one_process, V2)}


@contextlib.contextmanager
def started(arguments: list[str], environment: dict[str, str]) -> Iterator[TwoNodes]:
    options = ["--additional-config", json.dumps({"shadowkv": SETTINGS})]
    options += ["--max-model-len", "4096", "--max-num-seqs", "4", "--enforce-eager", "--enable-prompt-tokens-details"]
    with new_directory() as directory, TwoNodes(directory, options + arguments, environment) as nodes:
        yield nodes


@pytest.fixture(scope="module", params=["tensor", "pipeline"])
def nodes(request: pytest.FixtureRequest, alone: dict[str, Future[Asked]]) -> Iterator[TwoNodes]:
    arguments, environment = {"tensor": (TENSOR, {}), "pipeline": (PIPELINE, V2)}[request.param]
    with started(arguments, environment) as nodes:
        yield nodes


def ask(server: Server, prompt: list[int], tokens: int = TOKENS) -> tuple[list[int], int]:
    body = {"model": str(CHECKPOINT), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": 0, "return_tokens_as_token_ids": True}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as response:
        found = json.load(response)
    cached = (found["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return [int(token.partition(":")[2]) for token in found["choices"][0]["logprobs"]["tokens"]], cached


def metrics(server: Server) -> dict[str, dict[str, float]]:
    """Ours, by engine, and by short name with the label that some have."""
    found: dict[str, dict[str, float]] = {}
    for line, value in server.metrics().items():
        if match := re.fullmatch(
            r'vllm:shadowkv_(\w+)\{(?:.*,)?engine="(\d)",(?:kind="(\w+)",)?.*?(?:phase="(\w+)")?\}', line
        ):
            name, engine, *labels = match.groups()
            found.setdefault(engine, {})[" ".join([name, *filter(None, labels)])] = value
    return found


def test_the_tokens_of_one_process(
    nodes: TwoNodes, alone: dict[str, Future[Asked]], request: pytest.FixtureRequest
) -> None:
    runner = "v2" if "pipeline" in request.node.name else "v1"
    assert ("Using V2 Model Runner" in nodes.server.log_text()) == (runner == "v2")
    asked = [ask(nodes.server, prompt.token_ids) for prompt in PROMPTS + PROMPTS]
    assert [tokens for tokens, _ in asked[: len(PROMPTS)]] == [prompt.answer_ids for prompt in PROMPTS]
    assert asked == alone[runner].result()
    assert [cached for _, cached in asked] == [0] * len(PROMPTS) + [BLOCKS * BLOCK_SIZE] * len(PROMPTS)


def test_every_rank_is_in_the_metrics(nodes: TwoNodes) -> None:
    """Six times four steps; what each rank has its own part of is the sum of both."""
    counted = metrics(nodes.server)["0"]
    asked = 2 * len(PROMPTS)
    selected = asked * (TOKENS - 1) * CHUNKS
    assert counted["sealed_blocks_total"] == len(PROMPTS) * BLOCKS
    assert counted["hit_tokens_total sealed"] == len(PROMPTS) * BLOCKS * BLOCK_SIZE
    assert counted["selected_chunks_total"] == selected
    assert counted["slot_hits_total"] + counted["slot_misses_total"] == selected
    assert counted["fetched_bytes_total decode"] == counted["slot_misses_total"] * CHUNK_BYTES
    assert 2 * 0.079 * 2**30 < counted["host_pool_bytes"] <= 2 * 0.08 * 2**30


def ranks(server: Server) -> set[tuple[int, int]]:
    """Who has planned its host memory, and for how many ranks of its machine."""
    found = re.findall(r"\(\w+ pid=(\d+)\).* shared by (\d+) rank\(s\)\)", server.log_text())
    return {(int(pid), int(number)) for pid, number in found}


def test_each_rank_has_a_machines_memory_for_itself(nodes: TwoNodes) -> None:
    expected = {(worker.pid, 1) for worker in nodes.workers()}
    eventually(lambda: ranks(nodes.server) == expected)


def test_who_is_whose_child(nodes: TwoNodes) -> None:
    """The engine core is a process below the server's; workers are Ray's, one of each raylet, and not the server's."""
    below = psutil.Process(nodes.server.pid).children(recursive=True)
    (core,) = (process for process in below if title(process) == "VLLM::EngineCore")
    raylets = [worker.parent() for worker in nodes.workers()]
    assert len(set(raylets)) == 2
    assert {raylet.name() for raylet in raylets if raylet} == {"raylet"}
    assert not set(nodes.workers()) & set(core.children(recursive=True))


def end(nodes: TwoNodes, kill_a_worker: bool = False) -> list[str]:
    """Ends a server that is at work; returns what is left of it, the other machine's Ray aside, which goes on.

    Not what stays with the stock backend too: queues of workers that Ray kills, and of the communicator for the CPU.
    """
    server = nodes.server
    answer = server.stream(PROMPTS[0].text, 1900, ignore_eos=True)
    next(answer), next(answer)
    traces = Traces(nodes.of_the_server(), nodes.temporary)
    pids = {worker.pid for worker in nodes.workers()}
    assert len(traces.sockets()) >= 2, "the workers'"
    assert notes(pids), "what the workers were promised of the host's memory"
    if kill_a_worker:
        nodes.workers()[-1].kill()
        with pytest.raises(KeyError, match="choices"):  # an error comes instead
            list(answer)
    else:
        os.kill(server.pid, signal.SIGTERM)
        eventually(lambda: not nodes.workers())
        answer.close()  # which vLLM waits for
    server.wait(60)
    left = [each for each in traces.left() if not re.match(r"/dev/shm/(psm_|\S+cpushm)", each)]
    promised_memory.promised_to_others()  # as the next server does
    return [*left, *map(title, nodes.workers()), *map(str, notes(pids))]


def notes(pids: set[int]) -> list[Path]:
    return [path for path in promised_memory._folder().glob("*") if int(path.name.split(".")[0]) in pids]


def test_nothing_is_left(nodes: TwoNodes, request: pytest.FixtureRequest) -> None:
    """Of one whose worker is killed, which says so in one sentence, and of one that is told to end."""
    killed = "tensor" in request.node.name
    assert end(nodes, kill_a_worker=killed) == []
    sentence = r"ERROR .* RayWorkerProc rank=\[\d\] died unexpectedly, shutting down executor\."
    assert len(re.findall(sentence, nodes.server.log_text())) == int(killed)


def test_data_parallel() -> None:
    """An engine on each machine, whose cores are Ray's actors, and two API servers, which read Prometheus' files."""
    with started(DATA, {}) as nodes:
        with ThreadPoolExecutor() as pool:  # both at once, so that each engine gets one
            asked = list(pool.map(lambda prompt: ask(nodes.server, prompt.token_ids), PROMPTS[:2]))
        assert asked == [(prompt.answer_ids, 0) for prompt in PROMPTS[:2]]
        assert len(nodes.workers()) == 4
        eventually(lambda: [number for _, number in ranks(nodes.server)] == [1, 1])
        selected = dict.fromkeys("01", (TOKENS - 1) * CHUNKS)
        eventually(
            lambda: (
                {engine: each.get("selected_chunks_total") for engine, each in metrics(nodes.server).items()}
                == selected
            )
        )
        for each in metrics(nodes.server).values():
            assert each["sealed_blocks_total"] == BLOCKS
            assert 0.079 * 2**30 < each["host_pool_bytes"] <= 0.08 * 2**30
        # With Ray vLLM's first process ends before it has ended its coordinator and removed Prometheus' files, whatever
        # the backend.
        theirs = re.compile(rf"\d+ (VLLM::DPCoordinator|python)|{nodes.temporary}/tmp.*")
        assert [each for each in end(nodes) if not theirs.fullmatch(each)] == []
