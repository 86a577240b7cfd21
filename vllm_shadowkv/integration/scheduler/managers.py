"""The block-manager extension: who may free, keep and share which page. These run in the scheduler's process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import (
    CircularBufferManager,
    FullAttentionManager,
    SingleTypeKVCacheManager,
)

from vllm_shadowkv.integration.compat import see_requests
from vllm_shadowkv.integration.refusals import check_request

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


class ShadowManager(FullAttentionManager):
    """Sealed blocks, as full attention, but a block's hash is published only when it will be sealed before it is read.

    A block is sealed when the worker plans the step after the one that completed it. What a step completes of a prompt
    is sealed then whoever is in that step, so its hash is published before that step is scheduled, or when its request
    ends. Other blocks are sealed if their owner goes on, and published a step later. vLLM would publish while the step
    is scheduled that completes a block: a request later in it could hit what is not sealed, or never will be if the
    owner is preempted by a request that comes after it.
    """

    supports_fine_grained_hash_lookup = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        see_requests(see_request)
        # Where vLLM zeroes pages that it gives away, a block is sealed only if its owner goes on (worker/sealing.py).
        self._zeroed = self.kv_cache_spec.pages_are_zeroed
        # Of the requests of the step that is being scheduled: tokens whose blocks the next step's plan finds sealed.
        self._sealing: dict[str, tuple[Request, int]] = {}
        self._being_scheduled: str | None = None
        self._begins = 0

    def new_step_starts(self) -> None:
        """Publishes what the step before has completed, or sealed."""
        for request, tokens in self._sealing.values():
            super().cache_blocks(request, tokens, replay_boundaries=())
        self._sealing.clear()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """As full attention; notes where the request's step begins."""
        self._begins = total_computed_tokens
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """As full attention; notes whose step this is."""
        self._being_scheduled = request_id
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Notes which blocks will be sealed.

        vLLM calls it in scheduling, after it has allocated. Its asynchronous scheduler calls it again when it has the
        output of a step; that schedules nothing, so such a call changes nothing.
        """
        if self._being_scheduled != request.request_id:
            return
        self._being_scheduled, computed = None, self._begins
        of_prompt = num_tokens - computed > 1 and computed < request.num_prompt_tokens and not self._zeroed
        self._sealing[request.request_id] = (request, num_tokens if of_prompt else min(num_tokens, computed))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """A finished request's last step has run, or will; that of one that is preempted while it is scheduled not."""
        request, tokens = self._sealing.pop(request_id, (None, 0))
        if request is not None and request.is_finished():
            super().cache_blocks(request, tokens, replay_boundaries=())
        return super().pop_blocks_for_free(request_id)

    def _cache_partial_tail_block(self, *args: Any, **kwargs: Any) -> None:
        """Never: a sealed block is shared whole, and a copy-on-write would not copy the host pool's row."""


class ExactManager(SingleTypeKVCacheManager):
    """Exact pages from the exact boundary on; freed one step after the boundary has passed them."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.boundary = kv_cache_spec.boundary.resolve(self.block_pool.num_gpu_blocks)
        # vLLM sets the cap of full-sequence admission for its own recycling managers only.
        self.max_admission_blocks_per_request = self.boundary.max_exact_pages
        # The coordinator shows requests (`cache_blocks`) only to managers with this set, prefix caching or not.
        self.enable_caching = True
        self._prefill_end: dict[str, int] = {}
        self._processed: dict[str, tuple[int, int]] = {}

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Exact pages are never hit."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Publishes nothing; notes where this admission's prefill ends, with a resumed request's generated tokens."""
        self._prefill_end.setdefault(request.request_id, request.num_tokens)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens without exact pages at admission: the prefix hit, whose blocks are sealed."""
        block_size: int = self.boundary.block_size
        return num_computed_tokens // block_size * block_size

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Frees the pages below the boundary of the previous step.

        The blocks that this step seals are read from their exact pages before its forward pass, so what this step's
        boundary has passed is freed a step later. A second call in one step, after a preemption, changes nothing.
        """
        if request_id not in self.req_to_blocks:
            return
        before, now = self._processed.get(request_id, (0, 0))
        if processed_computed_tokens != now:
            before, now = now, processed_computed_tokens
            self._processed[request_id] = (before, now)
        prefill_end = max(num_prompt_tokens or 0, self._prefill_end.get(request_id, 0))
        start = self.boundary.exact_start(before, prefilling=before < prefill_end)
        held = len(self.req_to_blocks[request_id])
        self._remove_blocks_in_range(request_id, 0, min(start // self.block_size, held))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forgets the request."""
        self._prefill_end.pop(request_id, None)
        self._processed.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class SlotManager(CircularBufferManager):
    """A fixed number of slot pages per request, taken in the step that may first attend to sealed blocks."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._with_hit: set[str] = set()
        self._never_decode: set[str] = set()
        self._missing: dict[str, int] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """All pages of a request, or none: before it needs them, and once it has them.

        A request that ends with its prompt needs them only for a step of one token, which may be planned as decode.
        """
        spec, missing = self.kv_cache_spec, 0
        if not self.req_to_blocks.get(request_id):
            first = request_id not in self.req_to_blocks
            hit = num_local_computed_tokens if first else int(request_id in self._with_hit)
            decodes = request_id not in self._never_decode or num_tokens - total_computed_tokens == 1
            missing = spec.pages_per_request if decodes and spec.boundary.reads_sealed(num_tokens, hit) else 0
        self._missing[request_id] = missing
        return missing

    def expect_no_decode(self, request_id: str) -> None:
        """Notes that a request, not scheduled yet, ends with its prompt."""
        self._never_decode.add(request_id)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Takes what `get_num_blocks_to_allocate` has just said."""
        new_blocks: list[KVCacheBlock] = self.block_pool.get_new_blocks(self._missing.pop(request_id, 0))
        self.req_to_blocks[request_id].extend(new_blocks)
        return new_blocks

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Notes that a request starts on sealed blocks."""
        if num_local_computed_tokens > 0:
            self._with_hit.add(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forgets the request; one that was preempted takes slots like any other when it is resumed."""
        self._with_hit.discard(request_id)
        self._never_decode.discard(request_id)
        self._missing.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


def see_request(core: Any, request: Any) -> None:
    """Refuses a request that an engine core has received, or notes what its slots must know.

    Args:
        core: the engine core, of any backend.
        request: vLLM's, as it came.

    Raises:
        ValueError: it cannot be served; `refusals.check_request`.
    """
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    for manager in managers:
        if isinstance(manager, SlotManager):
            check_request(request, core.vllm_config)
            sampling = request.sampling_params
            if sampling is None or sampling.max_tokens == 1:  # pooling, scoring, a step of beam search
                manager.expect_no_decode(request.request_id)
