"""The scheduler's side of the KV connector: which sealed blocks are read from files, and which are written to them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.kv_cache_utils import get_block_hash, resolve_block_hashes

from vllm_shadowkv.integration.scheduler.managers import ShadowManager
from vllm_shadowkv.integration.stored import Rank, StepTransfers

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.shadowkv")

SECONDS_BETWEEN_LOOKS = 1.0
"""At files, for a request that waits to be scheduled: vLLM asks in every step."""
MOST_FAILURES = 2
"""Of a request's loads; then it computes."""


class _Found(NamedTuple):
    """Blocks in files: the first one's place, the hashes from there on, and when they were looked for."""

    first: int
    hashes: list[bytes]
    at: float


class StoredPrefixes:
    """Finds prefixes in files, and has blocks saved as soon as they are sealed.

    A request that finds some waits for them, as vLLM has it: its blocks are allocated, and filled between steps. They
    are sealed blocks like those of any other hit, published when they are there.
    """

    def __init__(self, kv_cache_manager: KVCacheManager, config: KVTransferConfig) -> None:
        """Begins to collect what is published, where the engine is a producer."""
        managers = kv_cache_manager.coordinator.single_type_managers
        (self._shadow,) = (manager for manager in managers if isinstance(manager, ShadowManager))
        self._pool, self._consumes = kv_cache_manager.block_pool, config.is_kv_consumer
        self._shadow.keeps_published = config.is_kv_producer
        self._ranks: list[Rank] = []
        self._step = StepTransfers(computes=False)
        self._found: dict[str, _Found] = {}
        """Of requests that wait to be scheduled."""
        self._loading: dict[str, list[bytes]] = {}
        """Of requests that wait for files, what they wait for."""
        self._failed: Counter[str] = Counter()
        """How often requests have waited in vain."""

    def open(self, ranks: list[Rank]) -> None:
        """Takes what the workers have found at start-up.

        Raises:
            ValueError: they disagree.
        """
        if len({str(rank.folder) for rank in ranks}) > 1:
            folders = ", ".join(f"{rank.name} in {rank.folder}" for rank in ranks)
            raise ValueError(
                f"ShadowKVConnector: the ranks of this engine have different models or settings ({folders}); start all "
                "of them with the same ones."
            )
        self._ranks = ranks

    def find(self, request: Request, num_computed_tokens: int) -> int | None:
        """Tokens behind those that are computed whose sealed blocks can be read; the last token never is.

        Args:
            request: that waits.
            num_computed_tokens: of its hit, whole blocks.

        Returns:
            Whole blocks; None: another request waits for the first of them, and has it soon.
        """
        if not self._consumes or not self._ranks or self._failed[request.request_id] >= MOST_FAILURES:
            return 0
        size, now = self._shadow.block_size, time.monotonic()
        first, end = num_computed_tokens // size, (request.num_tokens - 1) // size
        found = self._found.get(request.request_id)
        if found is None or found.first != first or now - found.at > SECONDS_BETWEEN_LOOKS:
            hashes = self._hashes(request)[first:end]
            count = self._ranks[0].folder.count((rank.name for rank in self._ranks), hashes)
            found = self._found[request.request_id] = _Found(first, hashes[:count], now)
        if found.hashes and any(found.hashes[0] in hashes for hashes in self._loading.values()):
            return None
        return len(found.hashes) * size

    def load(self, request: Request, block_ids: tuple[list[int], ...]) -> None:
        """Has what was found for a request read into its blocks.

        Args:
            request: that vLLM has allocated for.
            block_ids: its blocks, by group.
        """
        first, hashes, _ = self._found.pop(request.request_id)
        blocks = block_ids[self._shadow.kv_cache_group_id][first : first + len(hashes)]
        self._step.loads[request.request_id] = list(zip(hashes, blocks, strict=True))
        self._loading[request.request_id] = hashes

    def step(self, computes: bool) -> StepTransfers:
        """What the workers do after the step that was scheduled.

        Args:
            computes: whether it has a forward pass.
        """
        step, self._step = self._step, StepTransfers(computes=False)
        step.computes = computes
        step.saves = [(get_block_hash(block_hash), block_id) for block_id, block_hash in self._shadow.take_sealed()]
        return step

    def received(self, request_ids: Iterable[str], failed: Iterable[str]) -> None:
        """Takes requests that wait no longer, and those among them that could not have all they waited for.

        These look again: what could not be read is removed, and what is before it is still there.
        """
        self._failed.update(request_id for request_id in failed if request_id in self._loading)
        for request_id in request_ids:
            self._loading.pop(request_id, None)

    def finished(self, request: Request) -> None:
        """Notes that the request's context was in use until now."""
        for notes in (self._found, self._loading, self._failed):
            notes.pop(request.request_id, None)
        if self._ranks:
            self._step.used.append(self._hashes(request)[: request.num_computed_tokens // self._shadow.block_size])

    def stop(self) -> None:
        """Reads and saves nothing more."""
        if self._ranks:
            logger.info("shadowkv: the KV connector's cache was reset; no files are used until the next start.")
        self._ranks, self._shadow.keeps_published = [], False

    def _hashes(self, request: Request) -> list[bytes]:
        """Of the request's complete blocks, each of all tokens up to its end."""
        hashes = resolve_block_hashes(request.block_hashes, self._pool.hash_block_size, self._shadow.block_size)
        return [bytes(hashes[place]) for place in range(len(hashes))]
