"""A small decoder language model with RoPE and grouped-query attention, trained on any folder of text.

`python -m benchmarks.accuracy.text_model DIRECTORY TEXT_FOLDER...` writes a Hugging Face Llama checkpoint, and beside
it `held_out.txt`, the text it has not seen. It is there for its keys: those of a network that models text and was never
trained for ShadowKV. Minutes of one core do not make a good language model, and what is measured with it says so.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import time
import zlib
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SUFFIXES = (".txt", ".md", ".rst", ".html")
HELD_OUT_PERCENT = 8
END = "<|end|>"
"""Token 0. Never trained; some tools want a tokenizer to have one."""
STAGES = [(0.0, 512, 2), (0.6, 2048, 1), (0.85, 4096, 1)]
"""From which share of the time on, tokens per sequence, sequences per step."""


def read_texts(folders: list[Path]) -> tuple[str, str]:
    """The text to train on, and the held-out text: whole files, chosen by a checksum of their names."""
    seen, held_out = [], []
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
            text = path.read_text(errors="ignore")
            if path.suffix == ".html":
                text = re.sub(r"(?s)<(script|style|nav|head).*?</\1>|<[^>]+>", " ", text)
                text = html.unescape(text)
            text = re.sub(r"[ \t]+", " ", re.sub(r"\n\s*\n+", "\n\n", text))
            (held_out if zlib.crc32(path.name.encode()) % 100 < HELD_OUT_PERCENT else seen).append(text)
    return "\n\n".join(seen), "\n\n".join(held_out)


def make_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (text[i : i + 10_000] for i in range(0, len(text), 10_000)), vocab_size, show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """4 layers, hidden 256, 8 query and 4 KV heads of 64; 3.7M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


def train(model: LlamaForCausalLM, tokens: torch.Tensor, minutes: float) -> float:
    """Trains for so many minutes of processor time; returns the smoothed loss, in nats per token."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started, smoothed, step = time.process_time(), 0.0, 0
    bar = tqdm(total=100, desc="training", mininterval=10, unit="%")
    while (share := (time.process_time() - started) / (60 * minutes)) < 1:
        _, length, batch = max(stage for stage in STAGES if stage[0] <= share)
        rate = min(1.0, (step + 1) / 20, (1 - share) / 0.5 + 0.02)
        for optimizer, values in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, values, strict=True):
                group["lr"] = peak * rate
        starts = torch.randint(len(tokens) - length - 1, (batch,))
        ids = torch.stack([tokens[s : s + length] for s in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smoothed += (loss.item() - smoothed) * max(0.05, 1 / (step + 1))
        step += 1
        bar.update(round(100 * share, 1) - bar.n)
        bar.set_postfix_str(f"step {step}, {length} tokens, loss {smoothed:.3f}")
    return smoothed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where checkpoint and held-out text go")
    parser.add_argument("folders", nargs="+", type=Path, help=f"folders with {', '.join(SUFFIXES)} files")
    parser.add_argument("--minutes", type=float, default=20, help="of processor time")
    parser.add_argument("--vocab-size", type=int, default=2048)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    seen, held_out = read_texts(arguments.folders)
    tokenizer = make_tokenizer(seen, arguments.vocab_size)
    model = make_model(arguments.vocab_size)
    tokens = torch.tensor(tokenizer(seen)["input_ids"])
    print(f"{len(seen):,} characters, {len(tokens):,} tokens; {len(held_out):,} characters held out", flush=True)
    loss = train(model, tokens, arguments.minutes)
    with torch.inference_mode():
        ids = torch.tensor(tokenizer(held_out)["input_ids"])[: 8 * 4096]
        unseen = sum(model(input_ids=row[None], labels=row[None]).loss.item() for row in ids.split(4096)) / 8
    model.bfloat16().save_pretrained(arguments.directory)
    tokenizer.save_pretrained(arguments.directory)
    (arguments.directory / "held_out.txt").write_text(held_out)
    about = {
        "characters": len(seen),
        "tokens": len(tokens),
        "minutes": arguments.minutes,
        "loss": loss,
        "unseen": unseen,
    }
    (arguments.directory / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"loss {loss:.3f}, on unseen text {unseen:.3f} nats per token")


if __name__ == "__main__":
    main()
