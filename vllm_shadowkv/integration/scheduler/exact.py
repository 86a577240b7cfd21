"""The manager of exact pages: who holds them, who may hit them, and which of them are given up first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import get_group_id, resolve_block_hashes

from vllm_shadowkv.integration.scheduler.publishing import PublishingManager
from vllm_shadowkv.metrics import count_hit

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


class ExactManager(PublishingManager):
    """Exact pages from the exact boundary on; freed one step after the boundary has passed them.

    A page that is freed stays what it is until its turn to be given away has come: the worker reads it in place of its
    sealed block, and a request may hit it. Eight of them hold what one sealed block holds, so theirs comes first.
    """

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.boundary = kv_cache_spec.boundary.resolve(self.block_pool.num_gpu_blocks)
        self._caches = self._caches and kv_cache_spec.prefix_cacheable
        # vLLM sets the cap of full-sequence admission for its own recycling managers only.
        self.max_admission_blocks_per_request = self.boundary.max_exact_pages
        # The coordinator shows requests (`cache_blocks`) only to managers with this set, prefix caching or not.
        self.enable_caching = True
        self._freed = _FreedPages(self.block_pool, self.kv_cache_group_id)
        self._prefill_end: dict[str, int] = {}
        self._processed: dict[str, tuple[int, int]] = {}

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
        """Pages beside the sealed blocks of a hit: null, then an unbroken run. They never shorten it.

        vLLM asks for full attention first: `max_length` is what is sealed, or will be, and the tail that `find_tail`
        has found behind it.
        """
        (manager,) = (manager for manager in cls.of_pool(block_pool) if isinstance(manager, cls))
        pages = manager.find_hit(block_hashes, max_length)
        nulls = [block_pool.null_block] * (max_length // manager.block_size - len(pages))
        return tuple([*nulls, *pages] for _ in kv_cache_group_ids), max_length

    def find_tail(self, block_hashes: Any, sealed: int, most: int) -> int:
        """Tokens behind a hit's sealed blocks whose exact pages are there, less than a block.

        Args:
            block_hashes: of the request.
            sealed: tokens of its sealed blocks.
            most: tokens of the longest hit.
        """
        if not self._caches:
            return 0
        size = self.block_size
        hashes = resolve_block_hashes(block_hashes, self.block_pool.hash_block_size, size)
        end = min(most, sealed + self.boundary.block_size - 1) // size
        pages = (
            self.block_pool.get_cached_block(hashes[place], [self.kv_cache_group_id])
            for place in range(sealed // size, end)
        )
        return size * sum(1 for _ in takewhile(bool, pages))

    def find_hit(self, block_hashes: Any, length: int) -> list[KVCacheBlock]:
        """The last pages of a hit from the begin of a block on: what its request will decode over exactly.

        Further ones, as far as its prefill is exact, only if another request holds them anyway. Pages of sealed blocks
        that nobody holds are left out, from the first on, as far as the request could be admitted without them.

        Args:
            block_hashes: of the request.
            length: tokens of the hit, of its sealed blocks and of a tail.
        """
        if not self._caches:
            return []
        boundary, per_block = self.boundary, self.boundary.block_size // self.block_size
        tail = length // self.block_size % per_block
        hashes = resolve_block_hashes(block_hashes, self.block_pool.hash_block_size, self.block_size)
        furthest = boundary.exact_start(length, prefilling=True) // self.block_size
        needed = boundary.exact_start(length, prefilling=False) // self.block_size
        run: list[KVCacheBlock] = []
        for place in range(length // self.block_size - 1, furthest - 1, -1):
            found = self.block_pool.get_cached_block(hashes[place], [self.kv_cache_group_id])
            if not found or (place < needed and not found[0].ref_cnt):
                break
            run.append(found[0])
        run = run[: tail + (len(run) - tail) // per_block * per_block][::-1]
        spare = self.block_pool.get_num_free_blocks() - self._most_needed(len(hashes), length - tail * self.block_size)
        while sum(not page.ref_cnt for page in run[: len(run) - tail]) > max(spare, 0):
            del run[:per_block]
        return run

    def _most_needed(self, num_hashes: int, sealed: int) -> int:
        """Free blocks that a request may need to be admitted, without exact pages of its sealed blocks."""
        tokens, boundary = (num_hashes + 1) * self.block_size, self.boundary
        exact = min((tokens - sealed) // self.block_size, boundary.max_exact_pages)
        beside = boundary.other_pages - boundary.max_sealed_blocks
        return beside + tokens // boundary.block_size + 1 + exact

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens that vLLM pads with nulls at admission: those of a prefix hit, if it is not asked for their pages."""
        size = self.boundary.block_size
        return 0 if self.kv_cache_spec.prefix_cacheable else num_computed_tokens // size * size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """As vLLM; what a request reads from files it holds sealed only.

        VLLM admits requests that wait for files beside what the others still need, which their nulls are no part of:
        else many could be admitted, and none have its first page.
        """
        held = self.req_to_blocks.get(request_id, ())
        reads = total_computed_tokens > num_local_computed_tokens
        if apply_admission_cap and (reads or request_id in self.num_cached_block):
            nulls = total_computed_tokens // self.block_size if reads else sum(page.is_null for page in held)
            pages = min(-(-num_tokens // self.block_size) - nulls, self.boundary.max_exact_pages)
            return max(pages - (0 if reads else len(held) - nulls), 0)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            self._nulls(total_computed_tokens) if reads else new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            *args,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )

    def _nulls(self, num_tokens: int) -> list[KVCacheBlock]:
        return [self._null_block] * (num_tokens // self.block_size)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """As vLLM; counts what was hit.

        Exact pages of a hit would end before the blocks behind it that are read from files: their run must reach the
        end, so none is held, and vLLM finds nothing to allocate for what is read.
        """
        if num_external_computed_tokens:
            new_computed_blocks = self._nulls(num_local_computed_tokens + num_external_computed_tokens)
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        exact = sum(not page.is_null for page in new_computed_blocks) * self.block_size
        if self.labels is not None and num_local_computed_tokens:
            count_hit(self.labels, exact, num_local_computed_tokens - exact)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Notes also where this admission's prefill ends, with a resumed request's generated tokens."""
        self._prefill_end.setdefault(request.request_id, request.num_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

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
        pages = self.req_to_blocks[request_id]
        last = min(start // self.block_size, len(pages))
        first = last
        while first > 0 and not pages[first - 1].is_null:
            first -= 1
        freed, pages[first:last] = pages[first:last], [self._null_block] * (last - first)
        self._freed.take(freed)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Frees the request's pages, the first ones to be given up first: a hit takes a run that reaches its end.

        VLLM would free what it is given a step later where a KV connector may write to it meanwhile. Ours does not
        (`worker/transfers.py`), so nothing is left to it.
        """
        self._prefill_end.pop(request_id, None)
        self._processed.pop(request_id, None)
        self._freed.take(super().pop_blocks_for_free(request_id))
        return []


class _FreedPages:
    """Keeps freed pages that can be hit in vLLM's queue of free blocks where their turn is.

    vLLM gives away blocks without a hash first, those never used behind them, then blocks with one, the least recently
    used first. Freed pages come between these, the first freed first. The queue is a doubly linked list of blocks.
    """

    def __init__(self, pool: BlockPool, group: int) -> None:
        self._pool, self._group = pool, group
        self._freed: dict[int, KVCacheBlock] = {}
        """In the order of the queue; some of them have left it since."""

    def take(self, pages: Iterable[KVCacheBlock]) -> None:
        """Frees pages, in the order in which they are to be given up; nulls among them are vLLM's business."""
        pages = list(pages)
        self._pool.free_blocks(pages)
        queue, last = self._pool.free_block_queue, None
        for page in pages:
            if not self._is_free(page):
                continue
            self._freed.pop(page.block_id, None)
            queue.remove(page)
            last = self._last() if last is None else last
            following = last.next_free_block
            page.prev_free_block, page.next_free_block = last, following
            last.next_free_block = following.prev_free_block = page
            queue.num_free_blocks += 1
            self._freed[page.block_id] = last = page

    def _is_free(self, page: KVCacheBlock) -> bool:
        """Whether it is one of them, still or now."""
        return not page.ref_cnt and page.block_hash is not None and get_group_id(page.block_hash) == self._group

    def _last(self) -> Any:
        """The last of them in the queue, or the last block without a hash, or the queue's head."""
        while self._freed:
            block_id, page = self._freed.popitem()
            if self._is_free(page):
                self._freed[block_id] = page
                return page
        queue = self._pool.free_block_queue
        front: Any = queue.fake_free_list_head
        back: Any = queue.fake_free_list_tail.prev_free_block
        while True:  # from both ends: one of the two kinds of blocks is few
            if front is back or back.block_hash is None:
                return back
            following = front.next_free_block
            if following.block_hash is not None:
                return front
            front, back = following, back.prev_free_block
