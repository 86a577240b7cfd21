"""Every refusal at start-up, met as a user meets it, each in a process of its own; and each way out that it names."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doors import Answer, Door, Host, Platform
from refusal_cases import LLAMA, ONE_KIND, OTHER, changed, options, ours
from refused_engines import COMPRESSED_TENSORS, ENGINES, MODELOPT
from refused_models import GEMMA_3, MODELS, RNJ_1

from vllm_shadowkv.integration import refusals

DECODE_CONTEXT = (
    "ValueError: shadowkv does not support decode context parallelism; drop --decode-context-parallel-size."
)
NO_DOOR = (
    *("prefill context parallelism", "enable_adaptive_verification", "plans a step", "runs on CUDA and on the CPU"),
    # Models that take images import torchvision, which does not import beside a CPU torch.
    *("turns keys back by their place", "which would lose too much", "shadowkv.compression to 1, or"),
)
Ask = Callable[[Door], Answer]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Tries a door."""
    hosts: dict[str, Host] = {}

    def ask(door: Door) -> Answer:
        if door.runner not in hosts:
            hosts[door.runner] = Host(door.runner)
        return hosts[door.runner](door)

    yield ask
    for host in hosts.values():
        host.close()


def each_refusal() -> pytest.MarkDecorator:
    """Parametrises a test with `door` and `says`."""
    cases = [
        pytest.param(
            changed(case.door, {"platform": platform}),
            case.says,
            id=f"{case.name}, {platform}",
            marks=_marks(case.quick),
        )
        for case in ENGINES + MODELS
        for platform in case.platforms
    ]
    return pytest.mark.parametrize(("door", "says"), cases)


def each_way_out() -> pytest.MarkDecorator:
    """Parametrises a test with `door`. Other backends are the CPU's on emulated CUDA, too, so they are tried once."""
    cases = [
        pytest.param(
            changed(case.door, {"platform": platform, **change}),
            id=f"{case.name}, {platform}, {number}",
            marks=_marks(case.quick),
        )
        for case in ENGINES + MODELS
        for platform in case.platforms
        for number, change in enumerate(case.ways_out)
        if not (change == OTHER and platform == "cuda" and "cpu" in case.platforms)
    ]
    return pytest.mark.parametrize("door", cases)


def _marks(quick: bool) -> list[pytest.MarkDecorator]:
    return [] if quick else [pytest.mark.slow]


on_both = pytest.mark.parametrize("platform", ["cpu", "cuda"])


def check_open(door: Door, answer: Answer) -> None:
    """The engine has started and answered; with our backend, if it was asked for."""
    assert not answer.error, answer.log
    assert not [found for found in answer.tokens if isinstance(found, str)]
    asked = door.options.get("attention_backend", "shadowkv") or "SHADOWKV" in str(door.options.get("attention_config"))
    assert bool(answer.boundaries) == bool(asked)


@each_refusal()
def test_a_refusal_is_one_sentence_that_is_true(door: Door, says: str, ask: Ask) -> None:
    answer = ask(door)
    pattern = ".*".join(map(re.escape, says.split("…")))
    assert re.fullmatch(pattern, answer.error), f"{answer.error or answer.tokens}\n{answer.log}"


@each_way_out()
def test_the_way_out_leads_out(door: Door, ask: Ask) -> None:
    check_open(door, ask(door))


def test_every_sentence_has_a_door() -> None:
    """But those of `NO_DOOR`, which vLLM or another platform stands before, and those of a single request."""
    tree = ast.parse(Path(refusals.__file__).read_text())
    said = "\n".join(case.says for case in ENGINES + MODELS) + DECODE_CONTEXT
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name != "check_request"]
    texts = [
        node.value
        for function in functions
        for statement in function.body[1:]  # the docstring
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip()
    ]
    assert len(texts) > 50
    missing = [text for text in texts if text.strip() not in said]
    assert [text for text in missing if not any(part in text for part in NO_DOOR)] == []
    assert [part for part in NO_DOOR if not any(part in text for text in missing)] == []


@pytest.mark.slow
def test_a_worker_of_several_says_why_in_the_log(ask: Ask) -> None:
    """vLLM itself tells no more than that a worker has failed."""
    door = Door(LLAMA | {"num_key_value_heads": 1}, {"tensor_parallel_size": 2, "decode_context_parallel_size": 2})
    answer = ask(door)
    assert answer.error.startswith("Exception: WorkerProc initialization failed")
    assert DECODE_CONTEXT in answer.log
    answer = ask(changed(door, options(decode_context_parallel_size=None)))
    assert not answer.error, answer.log
    assert len(answer.tokens[0]) == 1


@on_both
def test_the_first_engine_of_a_process_may_name_ours_in_a_dictionary(platform: Platform, ask: Ask) -> None:
    asked = {"attention_backend": None, "attention_config": {"backend": "SHADOWKV"}}
    door = Door(LLAMA, asked, platform=platform)
    check_open(door, ask(door))


@on_both
def test_layers_with_windows_stay_with_vllms_backend(platform: Platform, ask: Ask) -> None:
    """What they compute is what `test_models.py` compares."""
    door = Door(GEMMA_3, platform=platform)
    check_open(door, ask(door))


def test_the_first_engine_of_a_process_may_name_ours_for_one_kind(ask: Ask) -> None:
    door = Door(GEMMA_3, ONE_KIND, platform="cuda")
    check_open(door, ask(door))


@pytest.mark.slow
@on_both
def test_a_layer_that_is_told_to_look_at_no_chunk_is_plain(platform: Platform, ask: Ask) -> None:
    """The full layers of Rnj-1."""
    door = Door(RNJ_1, platform=platform)
    check_open(door, ask(door))


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("model", [COMPRESSED_TENSORS, MODELOPT], ids=["compressed-tensors", "ModelOpt"])
def test_scales_of_an_fp8_cache_are_left_unused(model: dict[str, Any], platform: Platform, ask: Ask) -> None:
    asked: dict[str, Any] = {"platform": platform, "prompts": (40, 150, 300, 400), "generated": 8}
    scaled = ask(Door(model, {"kv_cache_dtype": "bfloat16"}, weights="scales", **asked))
    plain = Door({}, weights="plain", **asked)
    check_open(plain, ask(plain))
    assert scaled.tokens == ask(plain).tokens
    assert len({token for found in scaled.tokens for token in found}) > 20


@on_both
def test_auto_fits_the_length_to_host_memory(platform: Platform, ask: Ask) -> None:
    """The longest prompt is served, one token more is refused, and what comes then is served."""
    door = Door(LLAMA, ours(host_memory_gib=0.02) | {"max_model_len": -1}, platform=platform, prompts=(-1, 0, 40))
    answer = ask(door)
    assert not answer.error, answer.log
    longest, refused, after = answer.tokens
    assert len(longest) == len(after) == 1
    assert 512 < answer.max_model_len < 8192
    assert refused.startswith("VLLMValidationError: The decoder prompt ")
    assert f"longer than the maximum model length of {answer.max_model_len}" in refused
    worker, scheduler = answer.boundaries
    assert worker == scheduler
    assert worker["max_model_len"] == answer.max_model_len
