"""The block-manager extension: who may free, keep and share which page. These run in the scheduler's process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager, FullAttentionManager

from vllm_shadowkv.integration.compat import see_requests
from vllm_shadowkv.integration.refusals import check_request
from vllm_shadowkv.integration.scheduler.exact import ExactManager
from vllm_shadowkv.integration.scheduler.publishing import PublishingManager, Scheduled
from vllm_shadowkv.metrics import count_ownerless_seals, labels_of

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock


class ShadowManager(PublishingManager, FullAttentionManager):
    """Sealed blocks, as full attention."""

    supports_fine_grained_hash_lookup = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        see_requests(see_request)
        self._unsealed: set[int] = set()
        """Blocks that can be hit and that this step completes: who is in it, too, must not read them sealed."""
        self.keeps_published = False
        """Whether `take_sealed` is called in every step."""
        self._published: list[tuple[KVCacheBlock, BlockHashWithGroupId]] = []
        self._sealed: list[tuple[KVCacheBlock, BlockHashWithGroupId]] = []

    def new_step_starts(self) -> None:
        """As its base says; what the step before has completed is sealed before anyone reads it now."""
        super().new_step_starts()
        self._unsealed.clear()
        self._sealed += self._published
        self._published.clear()

    def take_sealed(self) -> list[tuple[int, BlockHashWithGroupId]]:
        """Published blocks that will be sealed when the step that was scheduled is planned, or are, with their hashes.

        Each is returned once, if it was not given away meanwhile.
        """
        sealed, self._sealed = self._sealed, []
        return [
            (block.block_id, block_hash)
            for block, block_hash in sealed
            if block.block_hash == block_hash and block.block_id not in self._unsealed
        ]

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """As full attention, over what may be hit by now, and a part of a block whose exact pages are there.

        Blocks that are sealed only after this step are hit if their exact pages come with them (`ExactManager`), and
        all of them are beyond the request's exact boundary.
        """
        managers = cls.of_pool(block_pool)
        for manager in managers:
            manager.publish()
        hits, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, *args, **kwargs
        )
        (shadow,) = (manager for manager in managers if isinstance(manager, cls))
        (exact,) = (manager for manager in managers if isinstance(manager, ExactManager))
        size = shadow.block_size
        length += exact.find_tail(block_hashes, length, max_length)
        first = next((place for place, block in enumerate(hits[0]) if block.block_id in shadow._unsealed), None)
        if first is None:
            return hits, length
        start = length - len(exact.find_hit(block_hashes, length)) * exact.block_size
        if exact.boundary.exact_start(length, prefilling=True, hit=start) > first * size:
            for blocks in hits:
                del blocks[first:]
            length = first * size + exact.find_tail(block_hashes, first * size, max_length)
        return hits, length

    def _has_partial_local_hit(self, *args: Any, **kwargs: Any) -> bool:
        """Never: a part of a block that is hit is in exact pages, and its new owner begins a shadow page for it."""
        return False

    def _publish(self, scheduled: Scheduled) -> None:
        request_id = scheduled.request.request_id
        published = self.num_cached_block.get(request_id, 0)
        super()._publish(scheduled)
        blocks = self.req_to_blocks[request_id]
        places = slice(scheduled.computed // self.block_size, scheduled.tokens // self.block_size)
        self._unsealed.update(block.block_id for block in blocks[places])
        if self.keeps_published:
            new = blocks[published : self.num_cached_block.get(request_id, 0)]
            self._published += [(block, block.block_hash) for block in new if block.block_hash is not None]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Counts blocks that the last step completed, and that are sealed without their owner."""
        scheduled = self._scheduled.get(request_id)
        if scheduled is not None and scheduled.request.is_finished() and self.labels is not None:
            ownerless = scheduled.tokens // self.block_size - scheduled.computed // self.block_size
            if ownerless > 0:
                count_ownerless_seals(self.labels, ownerless)
        return super().pop_blocks_for_free(request_id)

    def _cache_partial_tail_block(self, *args: Any, **kwargs: Any) -> None:
        """Never: a sealed block is shared whole, and a copy-on-write would not copy the host pool's row."""


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
            hit = total_computed_tokens // spec.block_size if first else int(request_id in self._with_hit)
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
        if num_local_computed_tokens + num_external_computed_tokens >= self.kv_cache_spec.block_size:
            self._with_hit.add(request_id)

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """None: slots hold nothing that could be read from elsewhere."""

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
        VLLMValidationError: it cannot be served; `refusals.check_request`.
    """
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    for manager in managers:
        if isinstance(manager, PublishingManager) and manager.labels is None:
            manager.labels = labels_of(core.vllm_config)
        if isinstance(manager, SlotManager):
            check_request(request, core.vllm_config)
            sampling = request.sampling_params
            if sampling is None or sampling.max_tokens == 1:  # pooling, scoring, a step of beam search
                manager.expect_no_decode(request.request_id)
