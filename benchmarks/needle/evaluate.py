"""Accuracy per family: `python -m benchmarks.needle.evaluate CHECKPOINT --tokens 4096`.

A prompt counts as answered if every token of the answer is the most likely one, echo included.
The prompt is prefilled exactly; decoded tokens see the context that the column names.
"""

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from .context import ExactContext, ShadowContext, ShadowOptions
from .export import read_checkpoint, read_weights
from .model import NeedleConfig, NeedleModel, causal, rope_angles, rotate
from .tasks import FAMILIES, make_prompt

ContextMaker = Callable[[NeedleConfig, Tensor, Tensor], ExactContext]


def load_model(path: Path) -> NeedleModel:
    """The model of a checkpoint directory, or of a training run's .pt file, in fp32."""
    return (read_checkpoint if path.is_dir() else read_weights)(path).eval()


def prefill(model: NeedleModel, token_ids: list[int]) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """Runs the prompt exactly.

    Returns:
        The next token, and per layer pre-RoPE keys and values [G, T, D].
    """
    cos, sin = rope_angles(torch.arange(len(token_ids)), model.config)
    x = model.model.embed_tokens(torch.tensor([token_ids]))
    caches = []
    for i, layer in enumerate(model.model.layers):
        q, k_pre, v = layer.project(x)
        caches.append((k_pre[0], v[0]))
        k = rotate(k_pre, cos, sin)
        if i + 1 < len(model.model.layers):
            x = layer.finish(x, causal(rotate(q, cos, sin), k, v))
        else:
            q = rotate(q[0, :, -1:], cos[-1:], sin[-1:])[:, 0]
            attended = ExactContext(model.config, k_pre[0], v[0]).attend(q)
            x = layer.finish(x[:, -1:], attended[None, :, None])
    return int(model.logits(x)[0, -1].argmax()), caches


def decode(model: NeedleModel, token: int, position: int, contexts: list[ExactContext]) -> int:
    """Runs one token at `position` over one context per layer and returns the next."""
    cos, sin = rope_angles(torch.tensor([position]), model.config)
    x = model.model.embed_tokens(torch.tensor([[token]]))
    for layer, context in zip(model.model.layers, contexts, strict=True):
        q, k_pre, v = layer.project(x)
        context.append(k_pre[0], v[0])
        attended = context.attend(rotate(q[0], cos, sin)[:, 0])
        x = layer.finish(x, attended[None, :, None])
    return int(model.logits(x)[0, -1].argmax())


@torch.inference_mode()
def answers(
    model: NeedleModel, token_ids: list[int], answer: list[int], makers: dict[str, ContextMaker]
) -> dict[str, bool]:
    """Whether greedy decoding gives the answer, per kind of context."""
    first, caches = prefill(model, token_ids)
    right = {}
    for name, make in makers.items():
        contexts = [make(model.config, k_pre, v) for k_pre, v in caches]
        right[name] = first == answer[0]
        for i, (token, expected) in enumerate(pairwise(answer)):
            if not right[name]:
                break
            right[name] = decode(model, token, len(token_ids) + i, contexts) == expected
    return right


def shadow(options: ShadowOptions) -> ContextMaker:
    """A maker of ShadowContext with these options."""
    return lambda config, k_pre, v: ShadowContext(config, k_pre, v, options)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory or .pt file")
    parser.add_argument("--tokens", type=int, default=4096, help="prompt length")
    parser.add_argument("--prompts", type=int, default=200, help="prompts per family")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--budget", type=int, default=ShadowOptions.budget)
    parser.add_argument("--rank", type=int, default=ShadowOptions.rank)
    parser.add_argument("--full-only", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the accuracies here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model(args.checkpoint)
    makers: dict[str, ContextMaker] = {"full": ExactContext}
    if not args.full_only:
        sizes = {"budget": args.budget, "rank": args.rank}
        makers["shadow"] = shadow(ShadowOptions(**sizes))
        makers["mean values"] = shadow(ShadowOptions(**sizes, mean_values=True))
        makers["random"] = shadow(ShadowOptions(**sizes, random_selection=True))

    table = Table("family", *makers, title=f"{args.checkpoint}, {args.tokens} tokens, %")
    accuracies = {}
    for family in args.families:
        counts = dict.fromkeys(makers, 0)
        seeds = range(args.first_seed, args.first_seed + args.prompts)
        for seed in tqdm(seeds, desc=family, leave=False, mininterval=5):
            prompt = make_prompt(family, args.tokens, seed)
            for name, right in answers(model, prompt.token_ids, prompt.answer_ids, makers).items():
                counts[name] += right
        accuracies[family] = {name: count / args.prompts for name, count in counts.items()}
        table.add_row(family, *(f"{100 * a:.1f}" for a in accuracies[family].values()))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(vars(args) | {"accuracy": accuracies}, default=str))


if __name__ == "__main__":
    main()
