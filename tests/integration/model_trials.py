"""What the trials of architectures have in common: engines, and what some of them ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from architectures import IMAGES
from engine import Result, Trial

# Measured: at most 4e-5.
TOLERANCE = 5e-4

SMALL = {"block_size": 64, "compression": 1, "dense_threshold": 0, "prefill_exact_tokens": 0, "slot_chunks": 304}
SMALL |= {"value_dtype": "auto", "resident_pages": False}
POOL = {"max_model_len": 512, "num_gpu_blocks_override": 96, "enable_prefix_caching": False}

STOCK = Trial("stock", ("short", "scored"), shadowkv=None, options=POOL)
LOSSLESS = Trial("lossless", ("short", "scored"), SMALL | {"key_codec": "none"}, options=POOL, poison=True)


MAMBA2 = {"granite-4-h", "falcon-h1", "nemotron-h"}
MIXED = "gemma-3"
WINDOWED = {
    MIXED,
    "command-a",
    "olmo-3",
    "exaone-4",
    "exaone-moe",
    "trinity",
    "llama-4",
    "gpt-oss",
    "gemma-3-mm",
}
"""Those with layers that stay with vLLM's own backend."""
BESIDE = POOL | {"block_size": 64, "num_gpu_blocks_override": 200}  # the others' pages fit ours


def of(name: str, engine: Trial, **options: Any) -> Trial:
    """An engine with the options that an architecture asks for."""
    if name in IMAGES:  # vLLM asks for a processor of images where it may get one
        options["language_model_only"] = True
    if name in MAMBA2:  # beside cached prefixes vLLM 0.32 takes one prompt a step on the CPU
        options["enable_prefix_caching"] = False
    return replace(engine, options={**engine.options, **options})


def check_choices(stock: Result, scenario: str) -> None:
    """Greedy choices that noise cannot turn, and not the same one all the time; else choose another seed."""
    sequences = stock.sequences[scenario].values()
    assert min(margin for found in sequences for margin in found["margins"]) > 1e-4
    assert len({token for found in sequences for token in found["tokens"]}) > 20
