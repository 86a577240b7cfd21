"""Which vLLM is supported, and every patch of it. A patch says what, why, and when it can go."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import vllm

from vllm_shadowkv.versions import ANY_VERSION, SUPPORTED, is_supported

logger = logging.getLogger(__name__)


def check_vllm_version() -> None:
    """Refuses a vLLM that was not tested.

    Raises:
        RuntimeError: with the list of versions and the variable that overrides the check.
    """
    version = vllm.__version__
    if is_supported(version):
        return
    if os.environ.get(ANY_VERSION) == "1":
        logger.warning("shadowkv is not tested with vLLM %s; going on because %s=1.", version, ANY_VERSION)
        return
    raise RuntimeError(
        f"shadowkv is tested with vLLM {', '.join(f'{minor}.x' for minor in SUPPORTED)}, this is {version}; "
        f"install one of those, or set {ANY_VERSION}=1 to go on untested."
    )


def see_requests(look: Callable[[Any, Any], None]) -> None:
    """Patches `EngineCore.preprocess_add_request`, so that every request is seen before it is scheduled.

    What: `look` is called with the engine core and the request; what it raises is the request's answer, others go on.
    Why: no seam shows a block manager a request before it must allocate for it, and an error there would end the
    engine. Upstream: none yet. Remove when a backend can refuse streaming input, and managers are given requests.

    Args:
        look: the latest one counts.
    """
    core: Any = getattr(sys.modules.get("vllm.v1.engine.core"), "EngineCore", None)
    if core is None:  # a scheduler without an engine
        return
    original = getattr(core.preprocess_add_request, "shadowkv", core.preprocess_add_request)

    @functools.wraps(original)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        look(self, request)
        return original(self, request)

    preprocess_add_request.shadowkv = original  # type: ignore[attr-defined]
    core.preprocess_add_request = preprocess_add_request


Limit = Callable[[Any, Callable[[], int]], int]
_bound: Limit | None = None


def bound_kv_cache_memory(bound: Limit) -> None:
    """Patches `determine_available_memory` of vLLM's workers, so that the pool never outgrows the host pool.

    What: a worker reports `bound(worker, measure)` bytes for its KV cache; `measure()` is vLLM's own answer.
    Why: every block may be sealed, so the host must have room for every block's values, and vLLM has no seam that
    bounds the number of blocks: `--num-gpu-blocks-override` is absolute, and `KVCacheConfigBuilder` (0.33) needs a
    platform. Nor does one tell a backend that the KV cache it sees meanwhile, for graphs, is thrown away, or let it run
    the model before there is one (`worker/probe.py`). Upstream: none yet. Remove when a backend or a KV cache spec can
    bound the number of blocks, and is told that, and a backend sees a run over random tokens.

    Args:
        bound: returns at most the bytes that vLLM has measured; the latest one counts.
    """
    global _bound
    _bound = bound
    for module, name in (("vllm.v1.worker.cpu_worker", "CPUWorker"), ("vllm.v1.worker.gpu_worker", "Worker")):
        worker = getattr(sys.modules.get(module), name, None)  # only what this process works with is loaded
        if worker is not None and not hasattr(worker.determine_available_memory, "shadowkv"):
            worker.determine_available_memory = _bounded(worker.determine_available_memory)


def _bounded(original: Callable[[Any], int]) -> Callable[[Any], int]:
    @functools.wraps(original)
    def determine_available_memory(self: Any) -> int:
        measure = functools.partial(original, self)
        return measure() if _bound is None else _bound(self, measure)

    determine_available_memory.shadowkv = True  # type: ignore[attr-defined]
    return determine_available_memory
