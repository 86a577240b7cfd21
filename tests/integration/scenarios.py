"""What the engines are asked, the same of every backend. Runs in the engine's process; see `trial.py`.

A scenario returns its sequences by name. Prompts are random tokens, so scenarios share no prefix by accident.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images import IMAGE, image
from sharp_model import VOCABULARY
from vllm import LLM, PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

FIRST_TOKEN = 3  # below are the special tokens

# Around the edges of blocks of 64 and of 256 tokens, and of the 200 tokens that one step computes.
EDGES = (1, 5, *(edge + offset for edge in (64, 128, 200, 256, 320, 400, 512, 768, 1024) for offset in (-1, 0, 1)))
EIGHT_LENGTHS = (5, 40, 90, 130, 250, 300, 520, 700)
PREEMPTED_LENGTHS = (700, 650, 600, 500, 480, 240)

Generated = dict[str, Any]
"""`tokens`, their `logprobs`, the `margins` to the runners-up (where asked for), log-probabilities of the `prompt`
without its first token (where asked for), and prompt tokens `cached`."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on."""

    prompt: list[int]
    tokens: int
    sampling: Mapping[str, Any]
    adapter: int = 0
    images: Sequence[int] = ()

    @classmethod
    def greedy(cls, prompt: list[int], tokens: int) -> Request:
        return cls(prompt, tokens, {"temperature": 0})


class Asker:
    """Drives an engine in this process, step by step."""

    def __init__(self, llm: LLM, margins: bool = False, adapters: Path | None = None) -> None:
        """Asks nothing yet.

        Args:
            llm: the engine.
            margins: ask for the runners-up of choices too.
            adapters: folder of what `Request.adapter` names.
        """
        self.engine = llm.llm_engine
        self._num_logprobs = 2 if margins else 0
        self._adapters = adapters

    def ask(
        self,
        requests: Mapping[str, Request],
        aborts: Mapping[int, Sequence[str]] | None = None,
        arrivals: Mapping[int, Sequence[str]] | None = None,
    ) -> dict[str, Generated]:
        """Runs requests side by side.

        Args:
            requests: by name.
            aborts: names of the requests to abort after that many steps.
            arrivals: names of requests that come after that many steps; the others come at once.

        Returns:
            The sequences of the requests that were not aborted; several of one request are numbered.
        """
        waiting = {name: step for step, names in (arrivals or {}).items() for name in names}
        for name, request in requests.items():
            if name not in waiting:
                self._add(name, request)
        outputs, step = {}, 0
        while self.engine.has_unfinished_requests() or any(arrival > step for arrival in waiting.values()):
            outputs.update({output.request_id: output for output in self.engine.step() if output.finished})
            step += 1
            for name in (arrivals or {}).get(step, ()):
                self._add(name, requests[name])
            self.engine.abort_request(list((aborts or {}).get(step, ())))
        aborted = {name for names in (aborts or {}).values() for name in names}
        return {
            name if len(output.outputs) == 1 else f"{name} {completion.index}": _generated(output, completion)
            for name, output in sorted(outputs.items())
            if name not in aborted
            for completion in output.outputs
        }

    def _add(self, name: str, request: Request) -> None:
        params = SamplingParams(
            max_tokens=request.tokens,
            ignore_eos=True,
            logprobs=self._num_logprobs,
            detokenize=False,
            **request.sampling,
        )
        adapter = None
        if request.adapter:
            adapter = LoRARequest(str(request.adapter), request.adapter, f"{self._adapters}/{request.adapter}")
        prompt: dict[str, Any] = {"prompt_token_ids": request.prompt}
        if request.images:
            prompt["multi_modal_data"] = {"image": [image(seed) for seed in request.images]}
        self.engine.add_request(name, prompt, params, lora_request=adapter)

    def embed(self, prompts: Mapping[str, list[int]]) -> dict[str, Generated]:
        """Embeddings, in place of log-probabilities, of prompts that run side by side."""
        for name, prompt in prompts.items():
            self.engine.add_request(name, {"prompt_token_ids": prompt}, PoolingParams(task="embed"))
        outputs = []
        while self.engine.has_unfinished_requests():
            outputs += self.engine.step()
        return {
            output.request_id: {
                "tokens": [],
                "logprobs": output.outputs.data.tolist(),
                "margins": [],
                "cached": output.num_cached_tokens,
            }
            for output in outputs
        }

    def forget_prefixes(self) -> None:
        """Empties the prefix cache.

        Raises:
            AssertionError: blocks are still in use, with no request running.
        """
        assert self.engine.reset_prefix_cache(), "a block is still in use"


def _generated(output: Any, completion: Any) -> Generated:
    places = list(zip(completion.token_ids, completion.logprobs, strict=True))
    chosen = [logprobs[token].logprob for token, logprobs in places]
    ranked = [sorted((entry.logprob for entry in logprobs.values()), reverse=True) for _, logprobs in places]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": chosen,
        "margins": [values[0] - values[1] for values in ranked if len(values) > 1],
        "prompt": [
            logprobs[token].logprob
            for token, logprobs in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False)
            if logprobs is not None
        ],
        "cached": output.num_cached_tokens,
    }


def _prompts(seed: str, *lengths: int) -> list[list[int]]:
    """Prompts of these lengths."""
    generator = random.Random(seed)
    return [[generator.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(length)] for length in lengths]


def _named(prompts: Sequence[list[int]], tokens: int) -> dict[str, Request]:
    return {f"{number}: {len(prompt)} tokens": Request.greedy(prompt, tokens) for number, prompt in enumerate(prompts)}


def edges(asker: Asker) -> dict[str, Generated]:
    """Prompts around every edge; long ones are prefilled in pieces beside others that decode."""
    return asker.ask(_named(_prompts("edges", *EDGES), tokens=8))


def eight(asker: Asker) -> dict[str, Generated]:
    """Eight requests at once."""
    return asker.ask(_named(_prompts("eight", *EIGHT_LENGTHS), tokens=40))


def generation(asker: Asker) -> dict[str, Generated]:
    """600 tokens: the blocks that are sealed hold generated tokens."""
    return asker.ask(_named(_prompts("generation", 230), tokens=600))


def generation_together(asker: Asker) -> dict[str, Generated]:
    """600 tokens each, side by side."""
    return asker.ask(_named(_prompts("generation together", 3, 180, 500), tokens=600))


def prefixes(asker: Asker) -> dict[str, Generated]:
    """Prefix-cache hits: of a finished prompt, of part of it, of generated tokens, and of a prompt in the same step."""
    base, tail, other_tail, twin = _prompts("prefixes", 740, 9, 120, 530)
    first = asker.ask({"first": Request.greedy(base, 40)})
    turn = base + first["first"]["tokens"] + tail
    return first | asker.ask(
        {
            "again": Request.greedy(base, 8),
            "longer": Request.greedy(base + tail, 8),
            "branched": Request.greedy(base[:520] + other_tail, 8),
            "next turn": Request.greedy(turn, 8),
            "twin a": Request.greedy(twin, 8),
            "twin b": Request.greedy(twin, 8),
        }
    )


def branches(asker: Asker) -> dict[str, Generated]:
    """n = 4, without chance: vLLM refuses n > 1 at temperature 0, and the two runners draw differently."""
    (prompt,) = _prompts("branches", 300)
    return asker.ask({"branch": Request(prompt, 40, {"n": 4, "temperature": 1.0, "top_k": 1})})


def seeded(asker: Asker) -> dict[str, Generated]:
    """n = 4, four different sequences on one prompt that is cached.

    Only against stock on the same runner. It must not be prefilled in pieces, which vLLM's V1 runner does not survive
    on a CPU with a seed; so all but 30 tokens come from the cache.
    """
    (prompt,) = _prompts("seeded", 542)
    first = asker.ask({"first": Request.greedy(prompt, 2)})
    return first | asker.ask({"drawn": Request(prompt, 60, {"n": 4, "temperature": 1.0, "seed": 11})})


def preemption(asker: Asker) -> dict[str, Generated]:
    """Requests that a small pool cannot hold together once they grow."""
    return asker.ask(_named(_prompts("preemption", *PREEMPTED_LENGTHS), tokens=90))


def longest(asker: Asker) -> dict[str, Generated]:
    """Two requests that end at `max_model_len`."""
    return asker.ask(_named(_prompts("longest", 2000, 1780), tokens=48))


def aborts(asker: Asker) -> dict[str, Generated]:
    """Requests that are aborted while they prefill or decode; others then get their blocks."""
    prompts = _prompts("aborts", 300, 260, 520, 700, 130, 90)
    requests = {f"request {number}": Request.greedy(prompt, 40) for number, prompt in enumerate(prompts)}
    survivors = asker.ask(requests, aborts={3: ["request 1"], 6: ["request 3"], 20: ["request 0", "request 5"]})
    again = {f"again {number}": Request.greedy(prompts[number], 12) for number in (0, 1, 3)}
    return survivors | asker.ask(again)


def alone(asker: Asker) -> dict[str, Generated]:
    """The requests of `eight`, one after the other, each computed from nothing."""
    found: dict[str, Generated] = {}
    for name, request in _named(_prompts("eight", *EIGHT_LENGTHS), tokens=40).items():
        asker.forget_prefixes()
        found |= asker.ask({name: request})
    asker.forget_prefixes()
    return found


def reset(asker: Asker) -> dict[str, Generated]:
    """Prompts that fill a small pool, and one of them again: with the prefix cache emptied, and filled anew."""
    prompts = _prompts("reset", 700, 690, 680)
    first = asker.ask(_named(prompts, tokens=20))
    asker.forget_prefixes()
    again = asker.ask({"forgotten": Request.greedy(prompts[0], 8)})
    return first | again | asker.ask({"known": Request.greedy(prompts[0], 8)})


def storm(asker: Asker) -> dict[str, Generated]:
    """Requests with common beginnings come at random, more than fit, and a third of them goes at a random step."""
    draw = random.Random("storm")
    heads = _prompts("storm", 900, 900)
    requests, aborts, arrivals = {}, {}, {}
    for number in range(36):
        tail = [draw.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(draw.choice([1, 7, 60, 200]))]
        name = f"storm {number}"
        head = draw.choice(heads)[: draw.choice([0, 63, 256, 500, 768, 900])]
        requests[name] = Request.greedy(head + tail, draw.choice([1, 2, 20, 90, 150]))
        came = draw.randrange(1, 120)
        arrivals.setdefault(came, []).append(name)
        if draw.random() < 0.35:
            aborts.setdefault(came + draw.randrange(1, 40), []).append(name)
    survivors = asker.ask(requests, aborts, arrivals)
    asker.forget_prefixes()
    return survivors


def short(asker: Asker) -> dict[str, Generated]:
    """The least that still seals blocks of 64 and decodes over them across a boundary."""
    return asker.ask(_named(_prompts("short", 150, 210), tokens=60))


def twice(asker: Asker) -> dict[str, Generated]:
    """The same again: what was said the first time can be drafted (`trial.py`)."""
    requests = _named(_prompts("twice", 230, 500, 90), tokens=120)
    first = asker.ask(requests)
    return {f"first {name}": sequence for name, sequence in first.items()} | asker.ask(requests)


def stored(asker: Asker) -> dict[str, Generated]:
    """Prompts, then the same again: what can be hit by then lies in memory."""
    requests = _named(_prompts("stored", 700, 1100, 520), tokens=12)
    first = asker.ask(requests)
    return {f"first {name}": sequence for name, sequence in first.items()} | asker.ask(requests)


def needles(asker: Asker) -> dict[str, Generated]:
    """A question of every family to the needle model, then the same again."""
    sys.path.append(str(Path(__file__).parents[2]))
    from benchmarks.needle.tasks import FAMILIES, make_prompts

    prompts = {family: make_prompts(family, 4080, 2_000_000, 1)[0] for family in FAMILIES}
    requests = {
        name: Request.greedy(list(prompt.token_ids), len(prompt.answer_ids)) for name, prompt in prompts.items()
    }
    first = asker.ask(requests)
    return {f"first {name}": sequence for name, sequence in first.items()} | asker.ask(requests)


def scored(asker: Asker) -> dict[str, Generated]:
    """Eight prompts whose own tokens are scored, and two tokens more: of prefill and of decode."""
    prompts = _prompts("scored", *range(150, 310, 20))
    scoring = {"temperature": 0, "prompt_logprobs": 0}
    return asker.ask({f"{len(prompt)} tokens": Request(prompt, 2, scoring) for prompt in prompts})


def long(asker: Asker) -> dict[str, Generated]:
    """Beyond the dense threshold of the default settings, beside one that stays below."""
    return asker.ask(_named(_prompts("long", 4600, 300), tokens=8))


def adapters(asker: Asker) -> dict[str, Generated]:
    """One prompt with the model and with two adapters side by side, twice: each finds its own prefix."""
    (prompt,) = _prompts("adapters", 560)
    requests = {f"adapter {adapter}": Request(prompt, 40, {"temperature": 0}, adapter) for adapter in range(3)}
    first = asker.ask(requests)
    return first | {f"{name} again": found for name, found in asker.ask(requests).items()}


def structured(asker: Asker) -> dict[str, Generated]:
    """Tokens 0 to 9 and 120 to 129, by a regular expression; with `extras.tokenizer`."""
    guided, free = _prompts("structured", 500, 300)
    sampling = {"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="((00|12)[0-9]){60}")}
    return asker.ask({"guided": Request(guided, 40, sampling), "free": Request.greedy(free, 40)})


def embedded(asker: Asker) -> dict[str, Generated]:
    """Embeddings of prompts that are computed in several steps, then of continuations that find them."""
    prompts = _prompts("embedded", 30, 256, 257, 700, 1100)
    first = {f"{len(prompt)} tokens": prompt for prompt in prompts}
    more = {f"{name}, continued": prompt + prompts[0][:end] for end, (name, prompt) in enumerate(first.items(), 1)}
    return asker.embed(first) | asker.embed(more)


def sleep(asker: Asker) -> dict[str, Generated]:
    """Two requests before and after a sleep (`extras.sleep_and_wake`)."""
    from extras import sleep_and_wake

    requests = _named(_prompts("sleep", 700, 1000), tokens=30)
    before = asker.ask(requests)
    sleep_and_wake(asker.engine)
    return {f"before {name}": found for name, found in before.items()} | {
        f"after {name}": found for name, found in asker.ask(requests).items()
    }


def images(asker: Asker) -> dict[str, Generated]:
    """Prompts with images, and prefixes of them: with the same image, and with another one."""
    head, tail, more = ([token % IMAGE for token in prompt] for prompt in _prompts("images", 70, 60, 25))
    prompt = [*head, IMAGE, *tail]
    greedy, scoring = {"temperature": 0}, {"temperature": 0, "prompt_logprobs": 0}
    first = asker.ask({"first": Request(prompt, 30, greedy, images=[1]), "text": Request.greedy([*more, *tail], 30)})
    return first | asker.ask(
        {
            "again": Request(prompt, 30, greedy, images=[1]),
            "another image": Request(prompt, 30, greedy, images=[2]),
            "longer": Request([*prompt, *more], 8, greedy, images=[1]),
            "two images": Request([*prompt, IMAGE, *more], 30, greedy, images=[1, 2]),
            "scored": Request(prompt, 2, scoring, images=[1]),
            "scored, another image": Request(prompt, 2, scoring, images=[2]),
        }
    )


SCENARIOS: dict[str, Callable[[Asker], dict[str, Generated]]] = {
    scenario.__name__: scenario
    for scenario in (
        edges,
        eight,
        generation,
        generation_together,
        prefixes,
        branches,
        seeded,
        preemption,
        longest,
        aborts,
        alone,
        reset,
        storm,
        short,
        twice,
        stored,
        needles,
        scored,
        long,
        adapters,
        structured,
        embedded,
        sleep,
        images,
    )
}
