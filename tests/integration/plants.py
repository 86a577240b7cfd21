"""Errors to plant, each of them one that the tests of a token's life must notice. Runs in the engine's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

from vllm_shadowkv.integration.scheduler.exact import ExactManager
from vllm_shadowkv.integration.worker import sealing
from vllm_shadowkv.integration.worker.planner import Planner
from vllm_shadowkv.integration.worker.runtime import Runtime
from vllm_shadowkv.rotary import Rotary
from vllm_shadowkv.state import seal
from vllm_shadowkv.state.decode import DecodeRows

ROUNDING = 8
"""Units in the last place. In float32 such a change moves log-probabilities of the model by 3e-5, as ours differ."""


@contextmanager
def _patched(owner: Any, name: str, planted: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: planted(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _once(spoil: Callable[[Any, int], None]) -> Any:
    """Spoils the first block that is sealed, in one layer: `spoil` gets the layer's memory and the block's id."""
    left = [1]

    def seal(original: Any, memories: Any, block_ids: Any, *args: Any) -> None:
        original(memories, block_ids, *args)
        if left and left.pop():
            spoil(memories[0], int(block_ids[0]))

    return _patched(sealing, "seal_blocks", seal)


def wrong_value() -> Any:
    """Zeroes the value of one token of one sealed block, one layer, one head."""

    def spoil(memory: Any, block: int) -> None:
        memory.layout.value_views(memory.host_pool)[0][block, 0, 2, 3] = 0

    return _once(spoil)


def wrong_key() -> Any:
    """Zeroes the key of one token of one sealed block, one layer, one head; for `key_codec` none."""

    def spoil(memory: Any, block: int) -> None:
        memory.layout.view(memory.pages, "exact_keys")[block, 0, 19] = 0

    return _once(spoil)


def lost_block() -> Any:
    """Zeroes all values of one sealed block, one layer."""

    def spoil(memory: Any, block: int) -> None:
        memory.host_pool[block] = 0

    return _once(spoil)


@contextmanager
def no_lag() -> Iterator[None]:
    """Frees exact pages in the step that seals them.

    That is an error on CUDA alone, so blocks are sealed as there: where they wait, nobody has written to such a page.
    """
    sealer: Any = Runtime.latest().planner._sealer

    def remove(original: Any, manager: Any, request_id: str, processed: int, *args: Any) -> None:
        manager._processed[request_id] = (processed, processed)
        original(manager, request_id, processed, *args)

    early, sealer.is_early = sealer.is_early, True
    with _patched(ExactManager, "remove_skipped_blocks", remove):
        yield
    sealer.is_early = early


def not_persistent(tensor: str) -> Any:
    """Captures graphs whose rows hold a copy of one tensor, as it was at the capture."""

    def add(original: Any, planner: Any, group: str, common: Any, capturing: bool) -> Any:
        step = original(planner, group, common, capturing)
        if capturing and step.decode:
            rows = step.decode[0].rows
            step.decode[0].rows = replace(rows, **{tensor: getattr(rows, tensor).clone()})
        return step

    return _patched(Planner, "add", add)


def not_cleared() -> Any:
    """Leaves in exact pages what their last owner wrote."""
    return _patched(Planner, "_clear_unwritten", lambda *args: None)


def not_turned_back() -> Any:
    """Compresses keys as they are after RoPE, as if the model had none."""
    return _patched(seal, "undo", lambda undo, rotary, keys, positions: keys.float())


@contextmanager
def no_sinks() -> Iterator[None]:
    """Attends as if the model had no attention sinks."""
    memories = Runtime.latest().memory.bind().memories.values()
    sinks = [memory.sinks for memory in memories]
    for memory in memories:
        object.__setattr__(memory, "sinks", None)
    yield
    for memory, of_layer in zip(memories, sinks, strict=True):
        object.__setattr__(memory, "sinks", of_layer)


def turned() -> Any:
    """Compresses keys turned by a RoPE of theta 10,000, as if a model without RoPE had one."""

    def turn(undo: Any, rotary: Any, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        size = keys.shape[-1]
        angles = torch.outer(torch.arange(8192), 10_000.0 ** -(torch.arange(0, size, 2) / size))
        return undo(Rotary(torch.cat((angles.cos(), angles.sin()), dim=-1), size, is_neox=True), keys, positions)

    return _patched(seal, "undo", turn)


def rounding() -> Any:
    """Changes what the stock backend's attention gives as another order of its sums does: in the last few bits."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    generator = torch.Generator().manual_seed(0)

    def forward(original: Any, impl: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(impl, *args, **kwargs)
        noise = torch.randn(output.shape, generator=generator) * ROUNDING * torch.finfo(output.dtype).eps
        return output.mul_(1 + noise)

    return _patched(CPUAttentionBackendImpl, "forward", forward)


def images_not_hashed() -> Any:
    """Knows a prefix by its tokens alone, which are those of any image of the same size."""
    from vllm.v1.core import kv_cache_utils

    return _patched(kv_cache_utils, "_gen_mm_extra_hash_keys", lambda original, request, start, end, mm: ([], mm))


PLANTS: dict[str, Callable[[], Any]] = {
    "wrong value": wrong_value,
    "wrong key": wrong_key,
    "lost block": lost_block,
    "no lag": no_lag,
    "not cleared": not_cleared,
    "not turned back": not_turned_back,
    "no sinks": no_sinks,
    "turned": turned,
    "rounding": rounding,
    "images not hashed": images_not_hashed,
    **{f"not persistent: {tensor.name}": partial(not_persistent, tensor.name) for tensor in fields(DecodeRows)},
    "nothing": nullcontext,
}
