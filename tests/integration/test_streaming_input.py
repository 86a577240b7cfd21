"""A prompt that comes in pieces is refused while the engine serves others; a client of vLLM 0.33 is told why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine import ENVIRONMENT

from benchmarks.needle import CHECKPOINT

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[2]

CLIENT = """
import asyncio, json, sys
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

def prompt(seed):
    return TokensPrompt(prompt_token_ids=[3 + (seed + 7 * i) % 900 for i in range(40)])

async def pieces():
    for seed in range(2):
        yield StreamingInput(prompt(seed))

async def answer(engine, request, name):
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.CUMULATIVE)
    try:
        async for output in engine.generate(request, params, name):
            last = output
        error = getattr(last, "error", None)
        return [last.outputs[0].finish_reason, len(last.outputs[0].token_ids), error and str(error)]
    except Exception as error:
        return ["raised", 0, f"{type(error).__name__}: {error}"]

async def main():
    options = dict(model=sys.argv[1], attention_backend="shadowkv", enforce_eager=True, max_model_len=2048)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options, dtype="float32", skip_tokenizer_init=True))
    refused, whole = await asyncio.gather(answer(engine, pieces(), "in pieces"), answer(engine, prompt(5), "whole"))
    later = await answer(engine, prompt(6), "later")
    print("answers", json.dumps([refused, whole, later]), flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_prompt_in_pieces_is_answered_with_the_sentence(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script), str(CHECKPOINT)], env=environment, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("answers ")]
    assert lines, result.stdout[-3000:] + result.stderr[-3000:]
    refused, whole, later = json.loads(lines[0].removeprefix("answers "))
    assert whole == later == ["length", 4, None]
    from vllm.v1.engine.core import EngineCoreProc

    sentence = "shadowkv does not support streaming input; send the whole prompt at once"
    if hasattr(EngineCoreProc, "_handle_request_validation_error"):
        assert refused[0] == "raised"
        assert refused[2].startswith(f"VLLMValidationError: {sentence}")
    else:  # 0.32
        assert refused == ["error", 0, None]
        assert sentence in result.stdout + result.stderr, "the log does not say it"
