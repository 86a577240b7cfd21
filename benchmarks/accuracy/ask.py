"""Two ways to ask vLLM for tokens and their distributions: an engine in this process, and any server."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.accuracy.forced import KEY


@dataclass(frozen=True)
class Request:
    """Greedy decoding of a prompt.

    Attributes:
        prompt: token ids.
        max_tokens: as many are generated, end of text or not, unless `stop`.
        salt: only requests with the same salt share the prefix cache.
        forced: tokens to decode whatever the model would rather; needs the `Forced` logits processor.
        stop: end at the model's end of text.
    """

    prompt: list[int]
    max_tokens: int
    salt: str
    forced: list[int] | None = None
    stop: bool = False


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        token_ids: what was generated.
        logprobs: for each token the log-probabilities of the likeliest ones, by token id, if asked for.
        cached_tokens: of the prompt, what came from the prefix cache; None where a server does not say
            (`--enable-prompt-tokens-details`).
    """

    token_ids: list[int]
    logprobs: list[dict[int, float]]
    cached_tokens: int | None = None


class Asker(Protocol):
    """Something that answers requests, in their order."""

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """Answers."""


class Engine:
    """vLLM in this process."""

    def __init__(self, model: str, num_logprobs: int, forces: bool, **options: Any) -> None:
        """Starts it; `options` are those of `vllm.LLM`. `forces`: requests may have tokens to decode."""
        if forces:
            options["logits_processors"] = ["benchmarks.accuracy.forced:Forced"]
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # it refuses this kind of logits processor
        from vllm import LLM

        self._num_logprobs = num_logprobs
        self._llm = LLM(model, **options)

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """Answers all of them at once."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0,
                max_tokens=request.max_tokens,
                ignore_eos=not request.stop,
                detokenize=False,
                logprobs=self._num_logprobs if request.forced else None,
                extra_args={KEY: request.forced} if request.forced else None,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": r.prompt, "cache_salt": r.salt} for r in requests]
        replies = []
        for output in self._llm.generate(prompts, params, use_tqdm=False):
            answer = output.outputs[0]
            steps = [{token: value.logprob for token, value in step.items()} for step in answer.logprobs or []]
            replies.append(Reply(list(answer.token_ids), steps, output.num_cached_tokens))
        return replies


class Server:
    """An OpenAI-compatible server of vLLM."""

    def __init__(self, url: str, model: str, num_logprobs: int, parallel: int) -> None:
        """Takes the address up to `/v1`, and how many requests may be under way."""
        self._url, self._model, self._num_logprobs = url.rstrip("/") + "/completions", model, num_logprobs
        self._parallel = parallel

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """Answers, `parallel` at a time."""
        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(self._ask, requests))

    def _ask(self, request: Request) -> Reply:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": not request.stop,
            "cache_salt": request.salt,
            "return_token_ids": True,
        }
        if request.forced:
            body |= {"vllm_xargs": {KEY: request.forced}, "logprobs": self._num_logprobs}
            body |= {"return_tokens_as_token_ids": True}
        posted = urllib.request.Request(self._url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(posted, timeout=3600) as response:
            answer = json.load(response)
        choice = answer["choices"][0]
        steps = (choice.get("logprobs") or {}).get("top_logprobs") or []
        return Reply(
            choice["token_ids"],
            [{int(token.removeprefix("token_id:")): value for token, value in step.items()} for step in steps],
            (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens"),
        )
