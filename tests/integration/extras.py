"""What some engines have beside the model: a draft model, adapters, a tokenizer, quantised weights; and sleep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sharp_model import HEAD_SIZE, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCABULARY, write_sharp_model

Options = dict[str, Any]
ADAPTERS = 2


def draft_model(model: Path, folder: Path) -> Options:
    """The model itself with noise on its weights, so that some of what it drafts is accepted."""
    write_sharp_model(folder)
    generator, path = torch.Generator().manual_seed(3), folder / "model.safetensors"
    noisy = {
        name: weight * (1 + 0.02 * torch.randn(weight.shape, generator=generator))
        for name, weight in load_file(path).items()
    }
    save_file(noisy, path, metadata={"format": "pt"})
    return {"speculative_config": {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}}


def adapters(model: Path, folder: Path) -> Options:
    """Low-rank adapters of the projections of attention; `scenarios.adapters` asks for them by number."""
    shapes = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS}
    for number in range(1, ADAPTERS + 1):
        generator = torch.Generator().manual_seed(number)
        weights = {}
        for layer in range(LAYERS):
            for name, heads in shapes.items():
                prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                weights[f"{prefix}.lora_A.weight"] = torch.randn(8, HIDDEN, generator=generator) * 0.1
                weights[f"{prefix}.lora_B.weight"] = torch.randn(heads * HEAD_SIZE, 8, generator=generator) * 0.1
        path = folder / str(number)
        path.mkdir()
        save_file(weights, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(shapes), "bias": "none"}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": 8}


def tokenizer(model: Path, folder: Path) -> Options:
    """Every token is its number, in three digits."""
    words = {f"{token:03d}": token for token in range(VOCABULARY)}
    form = {"type": "WordLevel", "vocab": words, "unk_token": "000"}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": form}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return {"skip_tokenizer_init": False, "tokenizer": str(folder)}


def embedding(model: Path, folder: Path) -> Options:
    """The model gives the last token's state; such an engine wants a tokenizer."""
    return tokenizer(model, folder) | {"runner": "pooling", "convert": "embed"}


def quantised(model: Path, folder: Path) -> Options:
    """Weights in 8 bits with a scale per row, as compressed-tensors stores them; activations in 8 bits per token.

    Not symmetric: for symmetric ones vLLM takes a kernel that AMX has and that computes no float32.
    """
    write_sharp_model(folder)
    path = folder / "model.safetensors"
    weights = {}
    for name, weight in load_file(path).items():
        if "_proj" not in name:
            weights[name] = weight
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        weights[name] = (weight / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    save_file(weights, path, metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True, "symmetric": False},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return {"model": str(folder)}


EXTRAS: dict[str, Callable[[Path, Path], Options]] = {
    extra.__name__: extra for extra in (draft_model, adapters, tokenizer, embedding, quantised)
}
"""Each writes into an empty folder, and returns options of `vllm.LLM`."""


def sleep_and_wake(engine: Any) -> None:
    """What a sleep of level 2 leaves on a GPU: vLLM's CPU worker does not sleep.

    The prefix cache is empty, parameters are loaded anew, the model's buffers are brought back (`Worker.sleep`), and
    whatever else was allocated while the model was loaded, and the KV cache, may hold anything.
    """
    from vllm_shadowkv.integration.worker.runtime import Runtime

    core = engine.engine_core.engine_core
    assert core.reset_prefix_cache()
    model = core.model_executor.driver_worker.worker.model_runner.model
    kept = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    bound = Runtime.latest().memory.bind()
    memories = bound.memories.values()
    lost = [tensor for tensor in vars(bound.workspace).values() if isinstance(tensor, torch.Tensor)]
    for memory in memories:
        lost += [memory.pages, memory.exact_pages, memory.slot_pages, memory.cos_sin]
        lost += [memory.rotary.cos_sin] if memory.rotary.cos_sin is not None else []
    for tensor in lost:
        if tensor.untyped_storage().data_ptr() not in kept:
            tensor.view(torch.uint8).fill_(255)
