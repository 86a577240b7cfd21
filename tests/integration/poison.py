"""Poisons pages that nobody may read any more. Only where scheduler and worker share a process.

Every page is filled with bytes 0xFF, which is NaN in every float type, with its values in the host pool,

* when its last owner gives it back without a hash: freed exact pages, slots, blocks that no one can hit; and
* when it gets a new owner, who may not read what the one before left, such as an evicted sealed block.

From the moment that the scheduler frees a page nothing may read it, not even the sealing of the step that is being
scheduled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.v1.core.block_pool import BlockPool

from vllm_shadowkv.integration.worker.runtime import Runtime

poisoned = 0
"""Pages filled so far in this process."""


def install() -> None:
    """Wraps vLLM's block pool."""
    free_blocks, get_new_blocks = BlockPool.free_blocks, BlockPool.get_new_blocks

    def free_and_poison(pool: Any, ordered_blocks: Iterable[Any]) -> None:
        blocks = list(ordered_blocks)
        free_blocks(pool, blocks)
        free = (block for block in blocks if block.ref_cnt == 0 and not block.is_null)
        _fill(block.block_id for block in free if block.block_hash is None)

    def poison_and_get(pool: Any, num_blocks: int) -> Any:
        blocks = get_new_blocks(pool, num_blocks)
        _fill(block.block_id for block in blocks)
        return blocks

    BlockPool.free_blocks, BlockPool.get_new_blocks = free_and_poison, poison_and_get


@torch.inference_mode()  # as the worker allocates
def _fill(block_ids: Iterable[int]) -> None:
    global poisoned
    ids = list(block_ids)
    poisoned += len(ids)
    if torch.cuda.is_available():  # what steps in flight may still read
        torch.cuda.synchronize()
    for memory in Runtime.latest().memory.bind().memories.values():
        for pages in (memory.pages, memory.exact_pages, memory.slot_pages, memory.host_pool):
            pages[ids] = 0xFF
