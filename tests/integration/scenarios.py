"""What the engines are asked, the same of every backend. Runs in the engine's process; see `trial.py`.

A scenario returns its sequences by name. Prompts are random tokens, so no two scenarios share a prefix by accident.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sharp_model import VOCABULARY
from vllm import LLM, SamplingParams

FIRST_TOKEN = 3  # below are the special tokens

# Around the edges of blocks of 64 and of 256 tokens, and of the 200 tokens that one step computes.
EDGES = (1, 5, 63, 64, 65, 127, 128, 129, 199, 200, 201, 255, 256, 257, 320, 321, 400, 511, 512, 513, 767, 769, 1024,
1025)


@dataclass(frozen=True)
class Sequence_:
    """One generated sequence.

    Attributes:
        tokens: generated.
        logprobs: of those tokens.
        margins: how much more likely each was than the runner-up; only where the engine was asked for it.
        cached: tokens of the prompt that came from the prefix cache.
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    cached: int


Results = dict[str, Sequence_]
