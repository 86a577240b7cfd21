"""The scheduler's side of the KV connector: which sealed blocks are read from files, and which are written to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import get_block_hash, resolve_block_hashes

from vllm_shadowkv.integration.scheduler.managers import ShadowManager
from vllm_shadowkv.integration.stored import Rank, StepTransfers

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request


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
        self._found: dict[str, tuple[int, list[bytes]]] = {}
        """Of requests that are being scheduled: their first block that is read, and the hashes from there on."""
        self._failed: set[str] = set()
        """Requests that compute what could not be read."""

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

    def find(self, request: Request, num_computed_tokens: int) -> int:
        """Tokens behind those that are computed whose sealed blocks can be read; the last token never is.

        Args:
            request: that waits.
            num_computed_tokens: of its hit, whole blocks.
        """
        self._found.pop(request.request_id, None)
        if not self._consumes or not self._ranks or request.request_id in self._failed:
            return 0
        size = self._shadow.block_size
        first, end = num_computed_tokens // size, (request.num_tokens - 1) // size
        hashes = self._hashes(request)[first:end]
        hashes = hashes[: self._ranks[0].folder.count((rank.name for rank in self._ranks), hashes)]
        self._found[request.request_id] = first, hashes
        return len(hashes) * size

    def load(self, request: Request, block_ids: tuple[list[int], ...]) -> None:
        """Has what was found for a request read into its blocks, which are allocated."""
        first, hashes = self._found.pop(request.request_id)
        blocks = block_ids[self._shadow.kv_cache_group_id][first : first + len(hashes)]
        self._step.loads[request.request_id] = list(zip(hashes, blocks, strict=True))

    def step(self, computes: bool) -> StepTransfers:
        """What the workers do after the step that was scheduled.

        Args:
            computes: whether it has a forward pass.
        """
        step, self._step = self._step, StepTransfers(computes=False)
        step.computes = computes
        # One that was given away since has another hash, or none.
        step.saves = [
            (get_block_hash(block_hash), block.block_id)
            for block, block_hash in self._shadow.take_sealed()
            if block.block_hash == block_hash
        ]
        return step

    def failed(self, request_ids: Iterable[str]) -> None:
        """Requests that are to compute what they waited for."""
        self._failed.update(request_ids)

    def finished(self, request: Request) -> None:
        """Notes that the request's context was in use until now."""
        self._found.pop(request.request_id, None)
        self._failed.discard(request.request_id)
        if hashes := self._hashes(request)[: request.num_computed_tokens // self._shadow.block_size]:
            self._step.used.append(hashes)

    def clear(self) -> None:
        """Removes the files."""
        for rank in self._ranks[:1]:
            rank.folder.clear()

    def _hashes(self, request: Request) -> list[bytes]:
        """Of the request's complete blocks, each of all tokens up to its end."""
        hashes = resolve_block_hashes(request.block_hashes, self._pool.hash_block_size, self._shadow.block_size)
        return [bytes(hashes[place]) for place in range(len(hashes))]
