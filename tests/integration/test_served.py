"""`vllm serve`: prompts larger than the pool of exact pages, and requests that no client should send.

One server of each model runner for all tests, with a pool in which a quarter of the longest prompt would fit, were all
of it exact.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine import ENVIRONMENT
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import Prompt, make_prompts
from benchmarks.server import Server

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[2]
MODEL_LEN = 24_576
BLOCKS = 95
"""The least for a request of `MODEL_LEN` tokens."""
SETTINGS = {
    "block_size": 512,
    "dense_threshold": 1024,
    "prefill_exact_tokens": 0,
    "sparse_budget": 240,
    "slot_chunks": 40,
    "num_outlier_chunks": 0,
}
EXACT_TOKENS = 512 // 8

HERE = Path(__file__).parent
V2 = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (HERE / "v2_on_cpu" / "spawned", HERE, ROOT))),
}

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module", params=["v1", "v2"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    template = folder / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    options = ["--attention-backend", "shadowkv", "--additional-config", json.dumps({"shadowkv": SETTINGS})]
    options += ["--max-model-len", str(MODEL_LEN), "--max-num-batched-tokens", "256", "--max-num-seqs", "4"]
    options += ["--num-gpu-blocks-override", str(BLOCKS), "--enforce-eager", "--chat-template", str(template)]
    # A request for a million answers would be served.
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "VLLM_MAX_N_SEQUENCES": "4"}
    environment |= {"VLLM_LOGGING_LEVEL": "INFO"} | (V2 if request.param == "v2" else {})
    with Server(CHECKPOINT, folder / "log", options, environment) as started:
        assert ("Using V2 Model Runner" in started.log_text()) == (request.param == "v2")
        yield started


def ask(server: Server, path: str, body: bytes | None, patience: float = 120.0) -> tuple[int, bytes]:
    """Sends one request, and hangs up when its patience is over; the status is 0 if that was before an answer.

    Who has no patience at all hangs up once the request is sent.
    """
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=patience or None)
    try:
        connection.request("POST" if body is not None else "GET", path, body, {"Content-Type": "application/json"})
        if not patience:
            return 0, b""
        response = connection.getresponse()
        return response.status, response.read()
    except TimeoutError:
        return 0, b""
    finally:
        connection.close()


def answer(server: Server, prompt: Prompt) -> tuple[list[str], int]:
    """The greedy answer's tokens, and how much of the prompt the prefix cache had."""
    body = {"model": str(CHECKPOINT), "prompt": prompt.token_ids, "max_tokens": len(prompt.answer_ids)}
    body |= {"temperature": 0, "ignore_eos": True, "logprobs": 0, "return_tokens_as_token_ids": True}
    status, text = ask(server, COMPLETIONS, json.dumps(body).encode())
    assert status == 200, text
    found = json.loads(text)
    details = found["usage"].get("prompt_tokens_details") or {}
    return found["choices"][0]["logprobs"]["tokens"], details.get("cached_tokens") or 0


def right(prompt: Prompt) -> list[str]:
    return [f"token_id:{token}" for token in prompt.answer_ids]


def check_it_still_answers(server: Server) -> None:
    """Needles that no one has asked for yet, beyond the dense threshold; nothing runs, nothing holds blocks.

    More than one: a client that has just hung up may still be noticed, and usage is reported with a step.
    """
    for prompt in make_prompts("single", 2000, 4_000_000, 5):
        assert answer(server, prompt)[0] == right(prompt)
        status, metrics = ask(server, "/metrics", None)
        assert status == 200
        lines = metrics.decode().splitlines()
        used = [float(line.split()[-1]) for line in lines if line.startswith("vllm:kv_cache_usage_perc")]
        if used == [0.0]:
            return
    pytest.fail(f"blocks are still held: {used}")


@pytest.mark.slow
def test_a_prompt_four_times_the_device_pool(server: Server) -> None:
    """All of it is beyond `prefill_exact_tokens`; the second question about it hits its sealed blocks."""
    prompts = make_prompts("multi_key", MODEL_LEN - 64, 4_100_000, 2)
    assert len(prompts[0].token_ids) / 4 > BLOCKS * EXACT_TOKENS
    assert int(server.cache_config()["num_gpu_blocks"]) == BLOCKS
    for prompt in prompts:
        assert answer(server, prompt)[0] == right(prompt)


# What a field should be, what it may be, and what it must not be.
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1, 0.5, 1e9, -1e9, 2**31, 2**63, 2**70, "", "k1", "\x00\ud83d", [], [1], {}, {"a": 1}, [[]]]
)
TOKENS = st.lists(st.integers(0, 1000), max_size=40)
LONG = [7] * 1500
TEXT = st.sampled_from(["? k1", "@ k1 v1 v2 " * 300, "☃" * 50, " "])
PROMPTS = st.one_of(
    TEXT,
    TOKENS.filter(bool),
    st.sampled_from([LONG, LONG + [9] * 50]),
    st.lists(TOKENS, max_size=3),
    st.lists(st.sampled_from([-1, 2**31, 2**64, 1040, 10**6, 1.5, "x", None]), min_size=1, max_size=3),
    st.just([5] * MODEL_LEN) | ODD,
)
ROLES = st.sampled_from(["user", "system", "assistant"])
MESSAGES = st.one_of(
    st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXT}), min_size=1, max_size=3),
    st.lists(
        st.fixed_dictionaries({"role": ROLES, "content": st.just([{"type": "text", "text": "? k1"}])}), max_size=3
    ),
    st.lists(st.fixed_dictionaries({}, optional={"role": ROLES | ODD, "content": TEXT | ODD}), max_size=4),
    ODD,
)
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.sampled_from([1, 9, MODEL_LEN, 10**9]) | ODD,
    "min_tokens": st.sampled_from([0, 3, 10**9]) | ODD,
    "temperature": st.sampled_from([0, 0.7, 2, float("nan"), float("inf")]) | ODD,
    "top_p": st.sampled_from([0.1, 1, float("nan")]) | ODD,
    "top_k": st.sampled_from([1, 50, -1, 10**6]) | ODD,
    "min_p": st.sampled_from([0.1, 1]) | ODD,
    "n": st.sampled_from([1, 2, 5]) | ODD,
    "seed": st.integers(-(2**65), 2**65) | ODD,
    "stop": st.sampled_from(["v1", ["v1", ""]]) | ODD,
    "stop_token_ids": TOKENS | ODD,
    "logprobs": st.sampled_from([1, 20, 21]) | ODD,
    "top_logprobs": st.sampled_from([1, 21]) | ODD,
    "prompt_logprobs": st.sampled_from([0, 3]) | ODD,
    "echo": st.booleans() | ODD,
    "presence_penalty": st.sampled_from([1, -2, 3]) | ODD,
    "repetition_penalty": st.sampled_from([1.2, 0, -1]) | ODD,
    "logit_bias": st.sampled_from([{"5": 100}, {"5": 1e9}, {"1040": 1}, {"-1": 1}, {"x": 1}, {"99999999": 1}]) | ODD,
    "ignore_eos": st.booleans() | ODD,
    "stream": st.booleans() | ODD,
    "stream_options": st.just({"include_usage": True}) | ODD,
    "truncate_prompt_tokens": st.sampled_from([1, 30, -1, -2]) | ODD,
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "nonsense"}]) | ODD,
    # Only objects: vLLM 0.32.0 answers anything else with 500, before a backend knows of it.
    "structured_outputs": st.sampled_from([{"choice": ["k1", "k2"]}, {"choice": []}, {"regex": "("}, {}, {"a": 1}]),
    "cache_salt": st.just("a") | ODD,
    "priority": st.integers(-5, 5) | ODD,
    "model": st.just("another") | ODD,
}
RAW = ODD.map(lambda body: json.dumps(body).encode()) | st.sampled_from([b"", b"{", b'{"prompt":', b"\xff"])


def bodies(first: str, of: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Few odd fields at a time: the first one that is refused hides the others."""
    few = st.lists(st.sampled_from(sorted(SAMPLING)), max_size=2).flatmap(
        lambda names: st.fixed_dictionaries({name: SAMPLING[name] for name in names})
    )
    start = {"model": str(CHECKPOINT), "ignore_eos": True}
    whole = st.builds(
        lambda value, tokens, rest: json.dumps(start | {"max_tokens": tokens, first: value} | rest).encode(),
        of,
        st.sampled_from([4, 4, 300]),
        few,
    )
    return st.one_of(whole, whole, whole, whole, RAW)


REQUESTS = st.tuples(st.just(COMPLETIONS), bodies("prompt", PROMPTS)) | st.tuples(
    st.just(CHAT), bodies("messages", MESSAGES)
)
# On a fast machine 0.03 seconds may be enough for every answer: the zero always hangs up.
PATIENCE = st.sampled_from([30.0, 30.0, 30.0, 30.0, 0.3, 0.03, 0.0])


@pytest.mark.slow
def test_odd_requests_hurt_nobody(server: Server) -> None:
    """They come three at a time, and some clients hang up: none of them is the server's fault, and it goes on."""
    seen: set[int] = set()

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
    @given(st.lists(st.tuples(REQUESTS, PATIENCE), min_size=3, max_size=3))
    def send(requests: list[tuple[tuple[str, bytes], float]]) -> None:
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(lambda request: ask(server, *request[0], patience=request[1]), requests))
        for (status, text), (request, _) in zip(results, requests, strict=True):
            assert status < 500, f"{request}: {status} {text[:300]!r}"
            if status == 200 and b'"stream": true' not in request[1]:
                json.loads(text)
            seen.add(status)

    send()
    assert {0, 200, 400} <= seen, f"the requests were not odd enough, or too odd: {seen}"
    check_it_still_answers(server)
