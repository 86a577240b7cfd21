"""How much of this machine's memory a worker's KV cache may take, and who shares it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from vllm_shadowkv.state import host_pool
from vllm_shadowkv.state.capacity import Capacity
from vllm_shadowkv.state.host_memory import GIB, free_bytes
from vllm_shadowkv.state.promised_memory import Promise, promised_to_others

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

logger = logging.getLogger("vllm.shadowkv")


def bound_bytes(
    available: int, capacity: Capacity, host_memory_gib: float | None, vllm_config: VllmConfig, server: str
) -> tuple[int, Promise]:
    """Bounds the bytes of a worker's KV cache by what the host pool can back; says so in the log.

    Args:
        available: bytes that vLLM would use.
        capacity: of the worker.
        host_memory_gib: the setting.
        vllm_config: of the engine.
        server: the same in all of its workers.

    Returns:
        At most `available`, and what other servers are told of it while it is kept.

    Raises:
        ValueError: the host cannot back one request of `max_model_len`; the sentence names the flags.
        MemoryError: it cannot back `--num-gpu-blocks-override`, which vLLM obeys whatever this returns.
    """
    parallel = vllm_config.parallel_config
    pages_on_host, promised = current_platform.is_cpu(), promised_to_others(server)
    if promised:
        logger.info(
            "shadowkv: %.1f GiB of the free host memory are left to other servers of this machine, which were promised "
            "them.",
            promised / GIB,
        )
    room: dict[str, Any] = {
        "pages_on_host": pages_on_host,
        "ranks": _ranks(parallel) * _engines(parallel),
        "free": max(free_bytes() - promised, 0),
    }
    fit = vllm_config.model_config.original_max_model_len == -1
    backing = capacity.backing(host_memory_gib, **room, fit=fit)
    blocks = available // capacity.block_bytes
    override = vllm_config.cache_config.num_gpu_blocks_override
    if override is not None:
        host_pool.check_room(override, capacity.host_bytes, capacity.block_bytes, **room)
    elif blocks > backing.blocks:
        logger.warning(
            "shadowkv: %d KV cache blocks instead of the %d that vLLM has room for: the values of more do not fit the "
            "host pool (%s, shared by %d rank(s)); %s to have more.",
            backing.blocks,
            blocks,
            backing.reason,
            room["ranks"],
            backing.way_out,
        )
    blocks = min(blocks, backing.blocks) if override is None else override
    host_bytes = blocks * (capacity.host_bytes + (capacity.block_bytes if pages_on_host else 0))
    return min(available, backing.blocks * capacity.block_bytes), Promise(host_bytes, server)


def _ranks(parallel: ParallelConfig) -> int:
    """This engine's ranks on this machine; under Ray vLLM's `local_world_size` is all machines'."""
    devices = parallel.assigned_physical_gpu_ids  # of this machine, as Ray's executor tells each worker
    return len(devices) if parallel.use_ray and devices else parallel.local_world_size


def _engines(parallel: ParallelConfig) -> int:
    """Data parallel engines that share this machine's memory, at most.

    VLLM makes an engine of a dense model forget that there are others (`reconfigure_for_independent_dp_rank`). What it
    leaves is how many there are on all machines. Ray knows where each has its devices.
    """
    dense = parallel.data_parallel_size == 1
    engines = (parallel.elastic_ep_max_dp_size or 1) if dense else parallel.data_parallel_size_local
    if not dense or engines == 1 or parallel.data_parallel_backend != "ray":
        return engines
    from ray import get_runtime_context, util

    job, here = parallel.placement_group.id.hex()[-8:], get_runtime_context().get_node_id()
    ours = (one for key, one in util.placement_group_table().items() if key.endswith(job) and one["state"] != "REMOVED")
    return sum(not {here, ""}.isdisjoint(one["bundles_to_node_id"].values()) for one in ours)  # "": not placed yet
