"""Poisons pages that nobody may read any more. Only where scheduler and worker share a process.

Every page is filled with bytes 0xFF, which is NaN in every float type, with its values in the host pool,

* when its last owner gives it back without a hash: freed exact pages, slots, blocks that no one can hit; and
* when it gets a new owner, who may not read what the one before left, such as an evicted sealed block.

Only one thing reads a page after that: what a step has completed of prompts is sealed later, whoever owns its pages by
then, until a step writes to them. So pages are filled when a step has sealed what it must, but for those that others
are still to be sealed from; the rest of the planning may not read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import wait
from typing import Any

import torch
from vllm.v1.core.block_pool import BlockPool

from vllm_shadowkv.integration.worker.runtime import Runtime
from vllm_shadowkv.integration.worker.sealing import Sealer

poisoned = 0
"""Pages filled so far in this process."""


def install() -> None:
    """Wraps vLLM's block pool, and the sealing of what is due."""
    free_blocks, get_new_blocks = BlockPool.free_blocks, BlockPool.get_new_blocks
    seal_due, seal = Sealer.seal_due, Sealer.seal
    waiting: list[int] = []

    def free_and_poison(pool: Any, ordered_blocks: Iterable[Any]) -> None:
        blocks = list(ordered_blocks)
        free_blocks(pool, blocks)
        free = (block for block in blocks if block.ref_cnt == 0 and not block.is_null)
        give_up(block.block_id for block in free if block.block_hash is None)

    def poison_and_get(pool: Any, num_blocks: int) -> Any:
        blocks = get_new_blocks(pool, num_blocks)
        give_up(block.block_id for block in blocks)
        return blocks

    def give_up(block_ids: Iterable[int]) -> None:
        waiting.extend(block_ids)
        runtime = Runtime.latest()
        if runtime.geometry.pages_are_zeroed:  # after this, and before the step is planned; and nothing is due then
            fill_waiting(runtime.memory.bind())

    def fill_waiting(bound: Any) -> None:
        kept = [block for block in waiting if bound.due.of_pages([block])]
        if filled := [block for block in waiting if block not in kept]:
            _fill(filled, bound)
        waiting[:] = kept

    def seal_due_and_poison(sealer: Any, bound: Any) -> None:
        seal_due(sealer, bound)
        fill_waiting(bound)

    def seal_and_poison(sealer: Any, bound: Any, *args: Any, **kwargs: Any) -> None:
        seal(sealer, bound, *args, **kwargs)
        fill_waiting(bound)

    BlockPool.free_blocks, BlockPool.get_new_blocks = free_and_poison, poison_and_get
    Sealer.seal_due, Sealer.seal = seal_due_and_poison, seal_and_poison


@torch.inference_mode()  # as the worker allocates
def _fill(block_ids: list[int], bound: Any) -> None:
    global poisoned
    poisoned += len(block_ids)
    if torch.cuda.is_available():  # what steps in flight may still read
        torch.cuda.synchronize()
    bound.state.write_exact(torch.tensor(block_ids))  # it is a write
    wait(bound.reading[block] for block in block_ids if block in bound.reading)  # whose rows nobody else writes to
    for memory in bound.memories.values():
        for pages in (memory.pages, memory.exact_pages, memory.slot_pages, memory.host_pool):
            pages[block_ids] = 0xFF
