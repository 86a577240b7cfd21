"""Trains the needle model: `python -m benchmarks.needle.train --out needle.pt [--no-aux]`.

The curriculum doubles the length whenever the answers are right, 64 tokens to 4096, and stays
there; position gaps reach 24K. It computes layer 0 over a window, which is fast, but leaves that
layer free to look at tokens beyond it. So a second phase settles the model with the far tokens in
sight, at 2048 to 16384 tokens and with a stronger landmark loss, and a third sharpens it on crowded
haystacks with a landmark loss that is stronger still.
"""

import argparse
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .batches import BROAD, HARD, SETTLED, Batch, Mix, make_batch
from .export import write_checkpoint
from .model import NeedleModel, Window

CHUNK = 8
WINDOW = 128


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
    peak_rate: float
    landmark_weight: float
    mix: Mix
    far_keys: int
    """Keys that layer 0 samples beyond its window; 0 for none."""


CURRICULUM = Phase(
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
    peak_rate=2e-3,
    landmark_weight=0.2,
    mix=BROAD,
    far_keys=0,
)
SETTLE = Phase(
    name="settle",
    stages=[
        *[Stage(2048, 2, 128, 16384)] * 2,
        *[Stage(4096, 1, 192, 24576)] * 6,
        Stage(8192, 1, 192, 32768),
        Stage(16384, 1, 192, 32768),
    ],
    climb=False,
    steps=600,
    peak_rate=1e-3,
    landmark_weight=0.5,
    mix=SETTLED,
    far_keys=256,
)
SHARPEN = Phase(
    name="sharpen",
    stages=[Stage(4096, 1, 192, 8192)] * 7 + [Stage(8192, 1, 192, 32768)],
    climb=False,
    steps=1500,
    peak_rate=1e-3,
    landmark_weight=1.0,
    mix=HARD,
    far_keys=256,
)
PHASES = [CURRICULUM, SETTLE, SHARPEN]
ADVANCE_AT = 0.9


def landmark_loss(batch: Batch, queries: Tensor, keys: Tensor, phase: int) -> Tensor:
    """Cross-entropy of the chunk that holds the answer, under the query's landmark scores.

    It is enough that one query head of each KV head finds it, as in ShadowKV's selection.

    Args:
        batch: what the queries and keys were computed from.
        queries: post-RoPE [B, H, Q, D] of the last layer.
        keys: post-RoPE [B, G, T, D].
        phase: where the first chunk starts, 0 to CHUNK - 1.
    """
    num_chunks = (keys.shape[2] - phase) // CHUNK
    chunks = keys[:, :, phase : phase + num_chunks * CHUNK].unflatten(2, (num_chunks, CHUNK))
    landmarks = chunks.mean(3).repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    scores = queries @ landmarks.transpose(-1, -2) * queries.shape[-1] ** -0.5
    ends = torch.arange(num_chunks) * CHUNK + phase + CHUNK - 1
    seen = ends <= batch.wanted[..., None]
    target = (batch.sources - phase).div(CHUNK, rounding_mode="floor")
    valid = (batch.sources >= phase) & (target < num_chunks)
    target = target.clamp(0, num_chunks - 1)
    valid &= seen.gather(2, target[..., None])[..., 0]
    logprobs = scores.masked_fill(~seen[:, None], -1e9).log_softmax(-1)
    index = target[:, None, :, None].expand(-1, scores.shape[1], -1, 1)
    picked = logprobs.gather(3, index)[..., 0]
    best = picked.unflatten(1, (keys.shape[1], -1)).logsumexp(2).mean(1)
    return -(best * valid).sum() / valid.sum().clamp(min=1)


def learning_rate(step: int, phase: Phase) -> float:
    """Linear warm-up over 50 steps, linear decay to 2 % over the last half."""
    left = (phase.steps - step) / (phase.steps / 2)
    return phase.peak_rate * min(1.0, (step + 1) / 50, max(left, 0.02))


def run_phase(model: NeedleModel, phase: Phase, seed: int, use_landmarks: bool, out: Path) -> None:
    """Trains the model in place for the steps of one phase; saves it to `out` now and then."""
    rng = random.Random(f"train/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    level, accuracy, tokens = 0, 0.0, 0
    weight = phase.landmark_weight if use_landmarks else 0.0
    bar = tqdm(range(phase.steps), desc=phase.name, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, phase)
        stage = phase.stages[level] if phase.climb else rng.choice(phase.stages)
        batch = make_batch(stage.batch_size, stage.num_tokens, stage.max_questions, stage.span, phase.mix, rng)
        stride = stage.num_tokens // phase.far_keys if phase.far_keys else 0
        window = Window(WINDOW, stride, rng.randrange(stride) if stride else 0)
        logits, queries, keys = model(batch.token_ids, batch.positions, batch.wanted, window)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        landmark = torch.zeros(())
        if use_landmarks:
            landmark = landmark_loss(batch, queries, keys, rng.randrange(CHUNK))
        optimizer.zero_grad(set_to_none=True)
        (loss + weight * landmark).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        retrieved = batch.sources >= 0
        right = (logits.argmax(-1) == batch.targets)[retrieved].float().mean().item()
        accuracy += (right - accuracy) * 0.1
        tokens += batch.token_ids.numel()
        bar.set_postfix_str(
            f"{stage.num_tokens} tokens, loss {loss.item():.3f}, "
            f"landmark {landmark.item():.3f}, accuracy {accuracy:.3f}"
        )
        if phase.climb and accuracy > ADVANCE_AT and level + 1 < len(phase.stages):
            level, accuracy = level + 1, 0.0
            bar.write(f"step {step}: {tokens / 1e6:.2f}M tokens, level {level}")
        if (step + 1) % 50 == 0 or step + 1 == phase.steps:
            bar.write(f"step {step + 1}: {tokens / 1e6:.2f}M tokens, {bar.postfix}")
            torch.save(model.state_dict(), out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the weights go (.pt)")
    parser.add_argument("--export", type=Path, help="checkpoint directory to write in the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-aux", action="store_true", help="no landmark loss: the twin")
    parser.add_argument("--start", type=Path, help="weights (.pt) to start from")
    names = [phase.name for phase in PHASES]
    parser.add_argument("--phases", nargs="+", choices=names, default=names)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = NeedleModel()
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=True))
    started = time.monotonic()
    for phase in (phase for phase in PHASES if phase.name in args.phases):
        run_phase(model, phase, args.seed, not args.no_aux, args.out)
    if args.export:
        write_checkpoint(model.state_dict(), args.export)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
