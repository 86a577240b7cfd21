"""How much of this machine's memory a worker's KV cache may take, and who shares it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from vllm_shadowkv.state import host_pool
from vllm_shadowkv.state.capacity import Capacity
from vllm_shadowkv.state.host_memory import free_bytes

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

logger = logging.getLogger("vllm.shadowkv")


def bound_bytes(available: int, capacity: Capacity, host_memory_gib: float | None, vllm_config: VllmConfig) -> int:
    """Bounds the bytes of a worker's KV cache by what the host pool can back; says so in the log.

    Args:
        available: bytes that vLLM would use.
        capacity: of the worker.
        host_memory_gib: the setting.
        vllm_config: of the engine.

    Returns:
        At most `available`.

    Raises:
        ValueError: the host cannot back one request of `max_model_len`; the sentence names the flags.
        MemoryError: it cannot back `--num-gpu-blocks-override`, which vLLM obeys whatever this returns.
    """
    parallel = vllm_config.parallel_config
    room: dict[str, Any] = {
        "pages_on_host": current_platform.is_cpu(),
        "ranks": _ranks(parallel) * _engines(parallel),
        "free": free_bytes(),
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
    return min(available, backing.blocks * capacity.block_bytes)


def _ranks(parallel: ParallelConfig) -> int:
    """This engine's ranks on this machine; under Ray vLLM's `local_world_size` is all machines'."""
    devices = parallel.assigned_physical_gpu_ids  # of this machine, as Ray's executor tells each worker
    return len(devices) if parallel.use_ray and devices else parallel.local_world_size


def _engines(parallel: ParallelConfig) -> int:
    """Data parallel engines that share this machine's memory, at most.

    VLLM makes an engine of a dense model forget that there are others (`reconfigure_for_independent_dp_rank`). What it
    leaves is how many there are on all machines.
    """
    if parallel.data_parallel_size == 1:
        return max(1, parallel.elastic_ep_max_dp_size or 1)
    return parallel.data_parallel_size_local
