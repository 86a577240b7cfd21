"""A plan of `plan`: what a pool of some bytes holds, by the formulas of the engine (`state/capacity.py`)."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from vllm_shadowkv.cli import arguments
from vllm_shadowkv.cli.model import ModelShape
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.state.capacity import Capacity
from vllm_shadowkv.state.host_memory import GIB

STOCK_BLOCK = 16
"""Tokens of a block of vLLM's own backends, by default."""
BACKENDS = ("bf16", "fp8", "shadowkv")


@dataclass(frozen=True)
class Plan:
    """A model, settings and a pool.

    Attributes:
        shape: of one rank's layers.
        config: the settings.
        pool: with its prefill window resolved.
        num_blocks: of one rank's pool, the null block included.
        min_blocks: that the engine starts with.
        device_bytes: of one rank's KV cache, as given.
        host_bound: whether host memory, not device memory, bounds the pool.
        ranks: on the machine.
        contexts: tokens, ascending.
    """

    shape: ModelShape
    config: ShadowKVConfig
    pool: Capacity
    num_blocks: int
    min_blocks: int
    device_bytes: int
    host_bound: bool
    ranks: int
    contexts: tuple[int, ...]

    def requests(self, backend: str, tokens: int) -> int:
        """Requests of so many tokens that decode side by side; `backend` is one of `BACKENDS`."""
        if backend == "shadowkv":
            return self.pool.requests(self.num_blocks, tokens)
        block_bytes, pages = self._stock(backend, tokens)
        return (self.device_bytes // block_bytes - 1) // pages  # the null block

    def stock_bytes(self, tokens: int) -> int:
        """Device bytes of a request with vLLM's own backend, in the model's dtype."""
        block_bytes, pages = self._stock("bf16", tokens)
        return block_bytes * pages

    def _stock(self, backend: str, tokens: int) -> tuple[int, int]:
        """Bytes of a stock backend's block, and the blocks that a request takes while it decodes.

        vLLM makes blocks longer until a page holds a state.
        """
        token_bytes, layers = self.stock_token_bytes(backend), self.shape.num_layers
        states = max((other.size for other in self.shape.others if other.kind == "state"), default=0)
        block = STOCK_BLOCK * max(-(-states * layers // (STOCK_BLOCK * token_bytes)), 1)
        steps = self.pool.boundary.steps_in_flight + 1
        beside = sum(other.held(layers, block, tokens, steps) for other in self.shape.others)
        return block * token_bytes, -(-tokens // block) + beside

    @property
    def gain(self) -> float:
        """How many times the device memory a request of the longest context takes with vLLM's own backend."""
        tokens = self.contexts[-1]
        return self.stock_bytes(tokens) / (self.pool.peak_decoding_pages(tokens) * self.pool.block_bytes)

    def stock_token_bytes(self, backend: str) -> int:
        """Device bytes of a token of a stock backend, layers beside ours apart: in the model's dtype, or of 8 bits."""
        itemsize = 1 if backend == "fp8" else self.shape.dtype.itemsize
        return 2 * self.shape.num_layers * self.shape.num_kv_heads * self.shape.head_size * itemsize

    @property
    def host_pool_bytes(self) -> int:
        """Host memory of all ranks' pools."""
        return self.ranks * self.num_blocks * self.pool.host_bytes

    def break_even(self, backend: str) -> int | None:
        """Tokens, in whole blocks, from which on at least as many requests fit as with a stock backend; None: never."""
        block, even = self.pool.layout.block_size, None
        for tokens in range(self.pool.boundary.max_model_len // block * block, 0, -block):
            if self.requests("shadowkv", tokens) < self.requests(backend, tokens):
                break
            even = tokens
        return even

    def with_slots(self, slot_chunks: int) -> Plan:
        """The same with another `slot_chunks`."""
        config = self.config.model_copy(update={"slot_chunks": slot_chunks})
        pool = Capacity.of(config, self.pool.layout, self.pool.num_layers, self.pool.boundary, self.pool.others)
        return replace(self, config=config, pool=pool)


def make(given: argparse.Namespace) -> Plan:
    """Plans what the arguments say.

    Raises:
        ValueError: the engine would refuse it, or it does not fit; one sentence.
    """
    config, shape = arguments.settings(given), arguments.model(given)
    pool = arguments.capacity(given, config, shape)
    longest = pool.boundary.max_model_len
    contexts = tuple(sorted(set(given.contexts or _contexts(longest))))
    if contexts[-1] > longest:
        raise ValueError(f"shadowkv: --contexts {contexts[-1]} exceeds --max-model-len {longest}; raise that.")
    num_blocks, host_bound = arguments.num_blocks(given, config, pool)
    return Plan(
        shape=shape,
        config=config,
        pool=pool.resolve(num_blocks),
        num_blocks=num_blocks,
        min_blocks=pool.min_blocks,
        device_bytes=int(given.kv_cache_gib * GIB),
        host_bound=host_bound,
        ranks=given.tensor_parallel_size * given.pipeline_parallel_size,
        contexts=contexts,
    )


def _contexts(longest: int) -> list[int]:
    """Powers of two from 4,096 on, and the longest context."""
    return [length for length in (2**power for power in range(12, 31)) if length < longest] + [longest]
