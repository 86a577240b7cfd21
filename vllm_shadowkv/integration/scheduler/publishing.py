"""When the hashes of a block and of its exact pages are published, so that requests may hit them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


class Scheduled(NamedTuple):
    """A request of the step that is being scheduled: what may be hit of it, and what of that the step computes."""

    request: Request
    tokens: int
    computed: int


class PublishingManager(SingleTypeKVCacheManager):
    """Publishes what is sealed, or will be before a step that reads it sealed.

    A block can be sealed when the worker plans the step after the one that completed it, and is before anyone reads it
    sealed. Of what a step completes of a prompt that holds whoever is in that step; other blocks are sealed if their
    owner goes on, and published a step later.
    vLLM would publish while the step is scheduled that completes a block, but that step's request may yet be preempted
    by one that comes after it. So hashes are published when the first request of the step looks for a hit, which vLLM
    lets none do after it has preempted another, or before the next step, or when the request ends.
    """

    _of_pool: ClassVar[weakref.WeakKeyDictionary[BlockPool, weakref.WeakSet[PublishingManager]]] = (
        weakref.WeakKeyDictionary()
    )
    """VLLM looks for hits with a class, not with a manager."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._of_pool.setdefault(self.block_pool, weakref.WeakSet()).add(self)
        self._caches = self.enable_caching
        # Where vLLM zeroes pages that it gives away, a block is sealed only if its owner goes on (worker/sealing.py).
        self._zeroed = self.kv_cache_spec.pages_are_zeroed
        self._scheduled: dict[str, Scheduled] = {}
        self._unpublished: list[str] = []
        """Requests of them; every request that waits looks for a hit in every step."""
        self._reading: set[str] = set()
        """Requests whose blocks are being read from files."""
        self._being_scheduled: str | None = None
        self._begins = self._ends = 0
        self.labels: dict[str, str] | None = None
        """Of the engine's metrics; None: not known yet."""

    @classmethod
    def of_pool(cls, pool: BlockPool) -> list[PublishingManager]:
        """The managers of a pool, of every kind."""
        return list(cls._of_pool.get(pool, ()))

    def new_step_starts(self) -> None:
        """Publishes what the step before has completed, or sealed."""
        self.publish()
        self._scheduled.clear()

    def publish(self) -> None:
        """Publishes what the step that is being scheduled completes, or finds sealed, as far as it was not yet."""
        for request_id in self._unpublished:
            if scheduled := self._scheduled.get(request_id):  # else it was preempted
                self._publish(scheduled)
        self._unpublished.clear()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """As vLLM; notes where the request's step begins."""
        self._begins = total_computed_tokens
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """As vLLM; notes whose step this is, and where it ends."""
        self._being_scheduled, self._ends = request_id, num_tokens_main_model
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def allocate_external_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """As vLLM; notes that the request waits for blocks that are read from files."""
        self._reading.add(request_id)
        super().allocate_external_computed_blocks(request_id, *args, **kwargs)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Notes which blocks will be sealed.

        vLLM calls it in scheduling, after it has allocated. Its asynchronous scheduler calls it again when it has the
        output of a step; that schedules nothing, so such a call changes nothing. And it calls it when blocks are there
        that were read from files: these are sealed.
        """
        if request.request_id in self._reading:
            self._reading.remove(request.request_id)
            super().cache_blocks(request, num_tokens, replay_boundaries=())
            return
        if self._being_scheduled != request.request_id:
            return
        self._being_scheduled, computed = None, self._begins
        tokens = min(self._ends, request.num_tokens)  # vLLM offers those of whole sealed blocks only
        of_prompt = tokens - computed > 1 and computed < request.num_prompt_tokens
        if not of_prompt or self._zeroed:
            tokens = min(tokens, computed)
        self._scheduled[request.request_id] = Scheduled(request, tokens, computed)
        self._unpublished.append(request.request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """A finished request's last step has run, or will; that of one that is preempted while it is scheduled not."""
        self._reading.discard(request_id)
        scheduled = self._scheduled.pop(request_id, None)
        if scheduled is not None and scheduled.request.is_finished():
            self._publish(scheduled)
        return super().pop_blocks_for_free(request_id)

    def _publish(self, scheduled: Scheduled) -> None:
        if self._caches:
            super().cache_blocks(scheduled.request, scheduled.tokens, replay_boundaries=())
