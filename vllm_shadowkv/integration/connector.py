"""The KV connector: sealed blocks in files, for other engines and for the next start.

vLLM makes one in the scheduler's process and one in every worker's. A sealed block is self-contained, so a file of its
page and its row of the host pool is all that another engine needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from vllm_shadowkv.integration.refusals import check_connected
from vllm_shadowkv.integration.specs import ExactSpec, ShadowSpec, SlotSpec
from vllm_shadowkv.integration.stored import Rank, StepTransfers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_shadowkv.integration.scheduler.stored_prefixes import StoredPrefixes
    from vllm_shadowkv.integration.worker.transfers import Transfers


class ShadowKVConnector(KVConnectorBase_V1, SupportsHMA):
    """VLLM's view of either side; what is not overridden does nothing."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Looks at nothing yet.

        Raises:
            ValueError: the model has other layers than ours.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        shadow = [spec for spec in specs if isinstance(spec, ShadowSpec)]
        others = [spec for spec in specs if not isinstance(spec, ShadowSpec | ExactSpec | SlotSpec)]
        check_connected(bool(shadow), bool(others) or any(spec.pages_are_zeroed for spec in shadow))
        # What a cache cannot give back is computed; vLLM's default fails the request.
        self._kv_transfer_config.kv_load_failure_policy = "recompute"
        self._prefixes: StoredPrefixes | None = None
        self._transfers: Transfers | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        """Never: a save that is dropped is a later miss."""
        return False

    # In the scheduler's process.

    @property
    def prefixes(self) -> StoredPrefixes:
        """The scheduler's side, which begins when vLLM binds its managers."""
        assert self._prefixes is not None
        return self._prefixes

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Begins the scheduler's side."""
        from vllm_shadowkv.integration.scheduler.stored_prefixes import StoredPrefixes

        super().bind_kv_cache_manager(kv_cache_manager)
        self._prefixes = StoredPrefixes(kv_cache_manager, self._kv_transfer_config)

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Takes what `get_handshake_metadata` returned in every worker."""
        self.prefixes.open([rank for rank in metadata.values() if isinstance(rank, Rank)])

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens behind the hit in memory that are in files, and whether the request waits for them."""
        tokens = self.prefixes.find(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The request has its blocks: they are to be filled."""
        if num_external_tokens:
            self.prefixes.load(request, blocks.get_block_ids())

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepTransfers:
        """What the workers do after this step."""
        return self.prefixes.step(scheduler_output.total_num_scheduled_tokens > 0)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Takes what the workers' steps came to."""
        self.prefixes.received(connector_output.finished_recving or set(), connector_output.failed_recving)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Nothing is waited for: a block is saved once it is sealed, with or without its request."""
        self.prefixes.finished(request)
        return False, None

    def reset_cache(self) -> bool:
        """Uses files no more: vLLM asks for it when weights may have changed, and files are of those of the start."""
        self.prefixes.stop()
        return True

    # In a worker.

    @property
    def transfers(self) -> Transfers:
        """The worker's side, made when it is first asked for: the layers have their caches by then."""
        from vllm_shadowkv.integration.worker.transfers import Transfers

        if self._transfers is None:
            self._transfers = Transfers.of(self._vllm_config)
        return self._transfers

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        """Where this rank's files are."""
        return self.transfers.rank

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing: all is done after the forward pass, which may read what the loads overwrite."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no layer waits for a load."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are saved when they are sealed."""

    def wait_for_save(self) -> None:
        """Nothing: not every stage of a pipeline calls it."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """After the forward pass, if there is one: begins what the step's metadata says.

        Returns:
            Requests that wait no longer.
        """
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepTransfers)
        self.transfers.begin(metadata)
        loaded, failed = self.transfers.finish_loads()
        return KVConnectorTransferResults(finished_recving=loaded | failed, failed_recving=failed)

    def shutdown(self) -> None:
        """Waits until everything is written, as far as vLLM lets a process wait that ends."""
        if self._transfers is not None:
            self._transfers.close()
