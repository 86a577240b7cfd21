"""What needle models are trained on, and in which order.

The curriculum doubles the length whenever the answers are right, and stays at the longest; position gaps reach beyond
it. It computes all layers but the last over a window, which is fast, but leaves them free to look at tokens beyond it.
So a second phase settles the model with the far tokens in sight and with a stronger landmark loss, and a third sharpens
it on crowded haystacks with a landmark loss that is stronger still.
"""

from __future__ import annotations

from typing import NamedTuple

from .batches import BROAD, HARD, SETTLED, Mix
from .model import NeedleConfig


class Stage(NamedTuple):
    """One length of the curriculum."""

    num_tokens: int
    batch_size: int
    max_questions: int
    span: int


class Phase(NamedTuple):
    """A part of the training with its own optimizer and learning-rate schedule."""

    name: str
    stages: list[Stage]
    climb: bool
    """Go from stage to stage by accuracy; otherwise every step draws its stage."""
    steps: int
    share: float
    """Of the time, where that is limited."""
    peak_rate: float
    landmark_weight: float
    mix: Mix
    far_keys: int
    """Keys that a layer before the last samples beyond its window; 0 for none."""


class Recipe(NamedTuple):
    """A model and its phases."""

    config: NeedleConfig
    phases: list[Phase]


SMALL = Recipe(
    NeedleConfig(),
    [
        Phase(
            name="curriculum",
            stages=[
                Stage(64, 64, 4, 128),
                Stage(128, 32, 8, 256),
                Stage(256, 16, 16, 512),
                Stage(512, 8, 32, 1024),
                Stage(1024, 4, 48, 2048),
                Stage(2048, 2, 64, 8192),
                Stage(4096, 2, 64, 24576),
            ],
            climb=True,
            steps=1800,
            share=0.4,
            peak_rate=2e-3,
            landmark_weight=0.2,
            mix=BROAD,
            far_keys=0,
        ),
        Phase(
            name="settle",
            stages=[
                *[Stage(2048, 2, 128, 16384)] * 2,
                *[Stage(4096, 1, 192, 24576)] * 6,
                Stage(8192, 1, 192, 32768),
                Stage(16384, 1, 192, 32768),
            ],
            climb=False,
            steps=600,
            share=0.2,
            peak_rate=1e-3,
            landmark_weight=0.5,
            mix=SETTLED,
            far_keys=256,
        ),
        Phase(
            name="sharpen",
            stages=[Stage(4096, 1, 192, 8192)] * 7 + [Stage(8192, 1, 192, 32768)],
            climb=False,
            steps=1500,
            share=0.4,
            peak_rate=1e-3,
            landmark_weight=1.0,
            mix=HARD,
            far_keys=256,
        ),
    ],
)
"""The shipped model: minutes of one CPU core, prompts of 4K tokens, and of 16K for what a server does with them."""

_CURRICULUM, _SETTLE, _SHARPEN = SMALL.phases
LONG = Recipe(
    NeedleConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=65536,
    ),
    [
        _CURRICULUM._replace(
            stages=[
                Stage(64, 256, 4, 128),
                Stage(128, 128, 8, 256),
                Stage(256, 64, 16, 512),
                Stage(512, 32, 32, 1024),
                Stage(1024, 16, 48, 2048),
                Stage(2048, 8, 64, 8192),
                Stage(4096, 8, 64, 24576),
                Stage(8192, 4, 128, 40960),
                Stage(16384, 2, 192, 40960),
            ],
            steps=6000,
            peak_rate=1e-3,
        ),
        _SETTLE._replace(
            stages=[
                *[Stage(4096, 4, 192, 24576)] * 2,
                *[Stage(8192, 2, 192, 40960)] * 2,
                *[Stage(16384, 1, 192, 40960)] * 4,
                *[Stage(32768, 1, 192, 40960)] * 2,
            ],
            steps=3000,
            share=0.3,
            peak_rate=5e-4,
        ),
        _SHARPEN._replace(
            stages=[
                *[Stage(4096, 4, 192, 8192)] * 3,
                *[Stage(16384, 1, 192, 40960)] * 4,
                *[Stage(32768, 1, 192, 40960)] * 3,
            ],
            steps=3000,
            share=0.3,
            peak_rate=5e-4,
        ),
    ],
)
"""For a GPU: 3.9M parameters, 7.9 MB, prompts of 16K to 32K tokens. Its phases are those of the small one, longer."""

RECIPES = {"small": SMALL, "long": LONG}
