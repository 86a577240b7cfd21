"""`vllm serve` as users run it, with the needle model: its metrics, and what it leaves behind.

Tests share a server as long as it lives, so their order matters.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine import ENVIRONMENT

from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import make_prompt
from benchmarks.server import Server
from vllm_shadowkv.exposition import NAME

# A budget of all the chunks that the prompt's two sealed blocks have, so that their number is known.
SETTINGS = {"dense_threshold": 1024, "sparse_budget": 2048, "slot_chunks": 280, "host_memory_gib": 0.08}
SETTINGS |= {"value_dtype": "auto"}
PROMPT_TOKENS, BLOCK_SIZE, BLOCK_CHUNKS = 2100, 1024, 128
LAYERS, KV_HEADS, HEAD_SIZE, VALUE_BYTES = 2, 2, 64, 2
HEADS = LAYERS * KV_HEADS
ROOT = Path(__file__).parents[2]


def new_server(directory: Path, *more: str) -> Server:
    """A server with more arguments, whose temporary files are in `directory / "tmp"`."""
    (directory / "tmp").mkdir()
    arguments = ["--attention-backend", "shadowkv", "--additional-config", json.dumps({"shadowkv": SETTINGS})]
    arguments += [
        "--served-model-name",
        "needle",
        str(CHECKPOINT),
        "--max-model-len",
        "4096",
        "--max-num-seqs",
        "4",
        "--enforce-eager",
        *more,
    ]
    environment = ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_LOG_STATS_INTERVAL": "1"}
    environment |= {"TMPDIR": str(directory / "tmp"), "PYTHONPATH": str(ROOT)}
    # On the CPU 0.33 gives each of several engines a NUMA node of its own, whatever the backend, and ends without one.
    environment |= {"VLLM_CPU_SIM_MULTI_NUMA": "0"}
    return Server(CHECKPOINT, directory / "server.log", arguments, environment)


def eventually(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Waits until something holds, and returns it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def new_directory() -> Iterator[Path]:
    """With a short name: vLLM makes sockets in it, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with new_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    with new_server(directory) as server:
        yield server


# -- Metrics ---------------------------------------------------------------------------------------------------------


def metrics(server: Server) -> dict[str, float]:
    """Our metrics by short name and phase. They have the labels of vLLM's own."""
    found = {}
    for name, value in server.metrics().items():
        labels = r'engine="0",(?:kind="(\w+)",)?model_name="needle"(?:,phase="(\w+)")?'
        match = re.fullmatch(rf"vllm:shadowkv_(\w+)\{{{labels}\}}", name)
        assert match or "shadowkv" not in name, name
        if match:
            found[" ".join(filter(None, match.groups()))] = value
    return found


def test_the_numbers_are_those_of_what_happened(server: Server) -> None:
    at_start = metrics(server)
    assert {name for name, value in at_start.items() if value} == {"host_pool_bytes"}
    prompt = make_prompt("multi_value", PROMPT_TOKENS, 7)
    steps = len(prompt.answer_ids) - 1  # the first token is the prefill's
    assert steps == 4
    assert server.complete(prompt.text, steps + 1).text == prompt.answer
    assert 'vllm:generation_tokens_total{engine="0",model_name="needle"}' in server.metrics()
    sealed = PROMPT_TOKENS // BLOCK_SIZE
    chunks = sealed * BLOCK_CHUNKS * HEADS
    block_bytes = HEADS * BLOCK_SIZE * HEAD_SIZE * VALUE_BYTES
    first = metrics(server)
    pool = int(SETTINGS["host_memory_gib"] * 2**30) // block_bytes * block_bytes
    table_reads, used = first.pop("table_reads_total"), first.pop("host_pool_used_bytes")
    assert first == {
        "sealed_blocks_total": sealed,
        "selected_chunks_total": steps * chunks,
        "slot_misses_total": chunks,
        "slot_hits_total": (steps - 1) * chunks,
        "resident_chunks_total": chunks,
        "resident_tokens_total": 0,
        "hit_tokens_total exact": 0,
        "hit_tokens_total sealed": 0,
        "ownerless_seals_total": 0,
        "fetched_bytes_total decode": 0,
        "fetched_bytes_total prefill": 0,
        "expanded_tokens_total": 0,
        "sealed_prefills_total": 0,
        "refused_requests_total": 0,
        "host_pool_bytes": pool,
    }
    assert table_reads >= steps + 1, "on the CPU every step reads them"
    assert used in (0, sealed * block_bytes), "counted once a second"

    # The same prompt again hits the two blocks, and reads their exact pages for what is left of it: nothing took them.
    assert server.complete(prompt.text, steps + 1).text == prompt.answer
    second = metrics(server)
    assert second["sealed_blocks_total"] == sealed
    assert second["hit_tokens_total sealed"] == second["resident_tokens_total"] == sealed * BLOCK_SIZE
    for name in ("expanded_tokens_total", "sealed_prefills_total", "fetched_bytes_total prefill"):
        assert second[name] == 0
    assert second["selected_chunks_total"] == 2 * steps * chunks
    assert second["slot_hits_total"] + second["slot_misses_total"] == second["selected_chunks_total"]


def test_a_line_in_the_log_now_and_then(server: Server) -> None:
    line = eventually(lambda: re.search(r"Engine 000: shadowkv: sealed 2 blocks, slots held (.*)", server.log_text()))
    assert re.search(r" host pool \d\.\d\d of 0\.08 GiB used", line[0])


def test_a_small_host_pool_is_said(server: Server) -> None:
    blocks = int(server.cache_config()["num_gpu_blocks"])
    said = re.search(r"WARNING .* shadowkv: (\d+) KV cache blocks instead of the (\d+) that vLLM .*", server.log_text())
    assert said is not None
    assert int(said[1]) == blocks < int(said[2])
    assert said[0].endswith(
        "(shadowkv.host_memory_gib 0.08, shared by 1 rank(s)); raise shadowkv.host_memory_gib to have more."
    )


# -- The end ---------------------------------------------------------------------------------------------------------


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; one whose new parent has not noticed has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Traces:
    """A server's processes, and what they have outside of themselves."""

    def __init__(self, processes: list[psutil.Process], temporary: Path) -> None:
        self.processes = processes
        self.temporary = temporary
        # psutil reads smaps, which takes seconds: the answer would have ended.
        maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in self.processes)
        self.shared = {Path(path) for path in re.findall(r"/dev/shm/\S+", maps)}

    def engine(self) -> psutil.Process:
        (engine,) = (process for process in self.processes if "EngineCore" in process.cmdline()[0])
        return engine

    def sockets(self) -> set[str]:
        named = re.findall(rf"@{NAME}\.(\d+)\S*$", Path("/proc/net/unix").read_text(), re.MULTILINE)
        return {pid for pid in named if int(pid) in {process.pid for process in self.processes}}

    def left(self) -> list[str]:
        """What outlives the server, but for what vLLM leaves of its own, with the stock backend too."""
        deadline = time.monotonic() + 20
        while (alive := list(filter(runs, self.processes))) and time.monotonic() < deadline:
            time.sleep(0.1)
        files = [path for path in self.temporary.rglob("*") if not stat.S_ISSOCK(path.lstat().st_mode)]
        theirs = ("vllm_dist_", "torchinductor_")
        return [
            *(f"{process.pid} {process.name()}" for process in alive),
            *(str(path) for path in self.shared if path.exists()),
            *(str(path) for path in files if not path.relative_to(self.temporary).parts[0].startswith(theirs)),
            *self.sockets(),
        ]


def end(server: Server, directory: Path, how: str) -> None:
    """Ends a server that is at work, and looks for what is left of it."""
    answer = server.stream(make_prompt("multi_value", PROMPT_TOKENS, 8).text, 1900, ignore_eos=True)
    next(answer), next(answer)
    eventually(lambda: server.metrics()['vllm:num_requests_running{engine="0",model_name="needle"}'])
    main = psutil.Process(server.pid)
    traces = Traces([main, *main.children(recursive=True)], directory / "tmp")
    assert len(traces.processes) >= 3, "the server, the engine, a worker"
    assert 1 <= len(traces.sockets()) <= 2, "the worker's, and the engine's once a request has hit the prefix cache"
    assert traces.shared, "the engine's and the worker's queues"
    if how == "SIGTERM":
        os.kill(server.pid, signal.SIGTERM)
    elif how == "Ctrl-C":  # a terminal tells the whole group
        os.killpg(server.pid, signal.SIGINT)
    else:
        traces.engine().kill()
    psutil.wait_procs(traces.processes[1:], timeout=5)
    # vLLM's API server sends nothing any more, but waits until its clients hang up.
    answer.close()
    server.wait(60)
    assert traces.left() == []


def test_nothing_is_left_after_sigterm(server: Server, directory: Path) -> None:
    end(server, directory, "SIGTERM")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "a crash of the engine"])
def test_nothing_is_left_after(how: str) -> None:
    with new_directory() as directory, new_server(directory) as server:
        end(server, directory, how)


# -- Several engines -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_engines_share_the_work_and_the_host() -> None:
    prompts = [make_prompt("multi_value", PROMPT_TOKENS, seed) for seed in (9, 10)]
    with new_directory() as directory, new_server(directory, "--data-parallel-size", "2") as server:
        # Both are under way at once, so that vLLM gives each engine one.
        answers = [server.stream(prompt.text, 5) for prompt in prompts]
        texts = [next(answer) for answer in answers]
        for prompt, text, answer in zip(prompts, texts, answers, strict=True):
            assert "".join([text, *answer]).strip() == prompt.answer
        labels = [f'{{engine="{engine}",model_name="needle"}}' for engine in "01"]
        # With several API servers, workers write their numbers once a second.
        eventually(lambda: all(server.metrics().get(f"vllm:shadowkv_selected_chunks_total{each}") for each in labels))
        counted = server.metrics()
        pool = int(SETTINGS["host_memory_gib"] / 2 * 2**30)
        for each in labels:
            assert counted[f"vllm:shadowkv_sealed_blocks_total{each}"] == PROMPT_TOKENS // BLOCK_SIZE
            assert pool - 2**20 < counted[f"vllm:shadowkv_host_pool_bytes{each}"] <= pool
