"""Trains a needle model: `python -m benchmarks.needle.train --out needle.pt [--no-aux]`, by one of `recipes.py`."""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from .batches import Batch, make_batch
from .export import read_weights, save_weights, write_checkpoint
from .model import NeedleModel, Window
from .recipes import RECIPES, Phase

CHUNK = 8
WINDOW = 128
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
    ends = torch.arange(num_chunks, device=keys.device) * CHUNK + phase + CHUNK - 1
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


def learning_rate(step: int, done: float, phase: Phase) -> float:
    """Linear warm-up over 50 steps, linear decay to 2 % over the last half."""
    return phase.peak_rate * min(1.0, (step + 1) / 50, max(2 * (1 - done), 0.02))


class Batches(IterableDataset[tuple[int, Batch]]):
    """Endless batches of a phase, each with the number of its stage; of a phase that climbs, of stage `level`."""

    def __init__(self, phase: Phase, seed: int, level: Tensor) -> None:
        """Takes a `level` in shared memory: it is read when a batch is made, here or in a worker."""
        self.phase, self.seed, self.level = phase, seed, level
        self.rng = random.Random(f"train/{seed}")

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        worker = get_worker_info()
        rng = self.rng if worker is None else random.Random(f"train/{self.seed}/{worker.id}")
        stages = self.phase.stages
        while True:
            number = int(self.level) if self.phase.climb else stages.index(rng.choice(stages))
            tokens, size, questions, span = stages[number]
            yield number, make_batch(size, tokens, questions, span, self.phase.mix, rng)


class Progress:
    """How far a phase is.

    Attributes:
        level: int64 [] in shared memory, the stage that a phase that climbs is at.
        accuracy: running mean of the share of right answers; of a phase that climbs, of its present stage.
    """

    def __init__(self, phase: Phase) -> None:
        """At the first stage."""
        self.phase = phase
        self.level = torch.zeros((), dtype=torch.int64).share_memory_()
        self.accuracy = 0.0

    def counts(self, number: int, right: float) -> bool:
        """Notes the share of right answers to a batch of stage `number`; says whether the next stage begins.

        Workers make batches ahead: some are of the stage before, and say nothing about this one.
        """
        if self.phase.climb and number != int(self.level):
            return False
        self.accuracy += (right - self.accuracy) * 0.1
        climbs = self.phase.climb and self.accuracy > ADVANCE_AT and int(self.level) + 1 < len(self.phase.stages)
        if climbs:
            self.accuracy = 0.0
            self.level += 1
        return climbs


@dataclass(frozen=True)
class Options:
    """Of a run.

    Attributes:
        out: where the weights go.
        seed: of batches.
        use_landmarks: False: the twin.
        minutes: the training ends after so many, whatever its steps.
        workers: processes that make batches; 0: none but this one.
    """

    out: Path
    seed: int = 0
    use_landmarks: bool = True
    minutes: float = math.inf
    workers: int = 0


def run_phase(model: NeedleModel, phase: Phase, options: Options) -> None:
    """Trains the model in place for one phase; saves it now and then."""
    device = model.model.embed_tokens.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    progress, tokens = Progress(phase), 0
    batches = Batches(phase, options.seed, progress.level)
    rng = batches.rng
    weight = phase.landmark_weight if options.use_landmarks else 0.0
    loader = iter(DataLoader(batches, batch_size=None, num_workers=options.workers))
    started = time.monotonic()
    bar = tqdm(range(phase.steps), desc=phase.name, mininterval=10)
    for step in bar:
        done = max(step / phase.steps, (time.monotonic() - started) / (60 * phase.share * options.minutes))
        last = done >= 1 or step + 1 == phase.steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done, phase)
        number, batch = next(loader)
        stage = phase.stages[number]
        batch = Batch(*(tensor.to(device) for tensor in batch))
        stride = stage.num_tokens // phase.far_keys if phase.far_keys else 0
        window = Window(WINDOW, stride, rng.randrange(stride) if stride else 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, queries, keys = model(batch.token_ids, batch.positions, batch.wanted, window)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
            landmark = torch.zeros((), device=device)
            if options.use_landmarks:
                landmark = landmark_loss(batch, queries, keys, rng.randrange(CHUNK))
        optimizer.zero_grad(set_to_none=True)
        (loss + weight * landmark).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        retrieved = batch.sources >= 0
        right = (logits.argmax(-1) == batch.targets)[retrieved].float().mean().item()
        climbs = progress.counts(number, right)
        tokens += batch.token_ids.numel()
        bar.set_postfix_str(
            f"{stage.num_tokens} tokens, loss {loss.item():.3f}, "
            f"landmark {landmark.item():.3f}, accuracy {progress.accuracy:.3f}"
        )
        if climbs:
            bar.write(f"step {step}: {tokens / 1e6:.2f}M tokens, level {int(progress.level)}")
        if (step + 1) % 50 == 0 or last:
            bar.write(f"step {step + 1}: {tokens / 1e6:.2f}M tokens, {bar.postfix}")
            save_weights(model, options.out)
        if last:
            break


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the weights go (.pt)")
    parser.add_argument("--export", type=Path, help="checkpoint directory to write in the end")
    parser.add_argument("--recipe", choices=RECIPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-aux", action="store_true", help="no landmark loss: the twin")
    parser.add_argument("--start", type=Path, help="weights (.pt) to start from")
    parser.add_argument("--minutes", type=float, default=math.inf, help="the schedule fits into so many")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    names = [phase.name for phase in RECIPES["small"].phases]
    parser.add_argument("--phases", nargs="+", choices=names, default=names)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    recipe = RECIPES[args.recipe]
    model = read_weights(args.start) if args.start else NeedleModel(recipe.config)
    if model.config != recipe.config:
        parser.error(f"{args.start} is not of the recipe {args.recipe}")
    model.to(args.device)
    options = Options(args.out, args.seed, not args.no_aux, args.minutes, args.workers)
    started = time.monotonic()
    for phase in (phase for phase in recipe.phases if phase.name in args.phases):
        run_phase(model, phase, options)
    if args.export:
        write_checkpoint(model, args.export)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
