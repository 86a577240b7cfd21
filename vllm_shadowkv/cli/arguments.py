"""Arguments of `plan` and `explain`: a model, vLLM's flags that matter, and memory sizes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_shadowkv.cli.model import DTYPE_NAMES, ModelShape, read_model
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import plan_page
from vllm_shadowkv.state.boundary import ExactBoundary
from vllm_shadowkv.state.capacity import Capacity
from vllm_shadowkv.state.host_memory import GIB, free_bytes
from vllm_shadowkv.state.promised_memory import promised_to_others


def add(parser: argparse.ArgumentParser, plan: bool) -> None:
    """Adds the arguments; `plan` also needs the model and has more to show."""
    if plan:
        parser.add_argument("model", help="a config.json, or a directory with one; nothing is downloaded")
    else:
        parser.add_argument("model", nargs="?", help="a config.json, or a directory with one: shows derived values too")
    parser.add_argument(
        "--additional-config", type=_json, default={}, metavar="JSON", help="as vllm serve takes it; settings of ours"
    )
    parser.add_argument("--max-model-len", type=_positive, help="default: what config.json says")
    parser.add_argument("--max-num-batched-tokens", type=_positive, default=8192, help="default: 8192, as vllm serve")
    parser.add_argument("--no-async-scheduling", action="store_true")
    parser.add_argument("--dtype", choices=["auto", *DTYPE_NAMES], default="auto")
    parser.add_argument("--tensor-parallel-size", "-tp", type=_positive, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=_positive, default=1)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="what serves; default: cuda")
    parser.add_argument(
        "--kv-cache-gib",
        type=_size,
        required=plan,
        help="device memory of one rank's KV cache; vLLM logs it as 'Available KV cache memory'",
    )
    parser.add_argument("--host-gib", type=_size, help="free memory of the serving host; default: of this one")
    if plan:
        parser.add_argument("--contexts", type=_positive, nargs="+", help="tokens; default: powers of two")
        parser.add_argument(
            "--bandwidth-gbs",
            type=_size,
            help="GB/s of device memory (H100: 3350, H200: 4800), for a bound on tokens/s; default: no bound",
        )
        parser.add_argument(
            "--link-gbs", type=_size, default=55.0, help="GB/s of pinned copies; default: 55, of PCIe 5.0 with 16 lanes"
        )
        parser.add_argument(
            "--weights-gib",
            type=_size,
            default=0.0,
            help="weights that a rank reads in a step; vLLM logs all as 'Model loading took'; default: not counted",
        )
        parser.add_argument("--plot", metavar="FILE", help="also draw it to a .png, .svg or .pdf")


def settings(given: argparse.Namespace) -> ShadowKVConfig:
    """The settings that were given, validated as the engine does it."""
    return ShadowKVConfig.from_vllm(given.additional_config)


def model(given: argparse.Namespace) -> ModelShape:
    """The model that was given, one rank's part of it.

    Raises:
        ValueError: it cannot be read, or not served; one sentence.
    """
    return read_model(
        given.model,
        given.dtype,
        given.tensor_parallel_size,
        given.pipeline_parallel_size,
        max_model_len=given.max_model_len,
    )


def capacity(given: argparse.Namespace, config: ShadowKVConfig, shape: ModelShape) -> Capacity:
    """What the engine would make of the same flags, its prefill window not resolved.

    Raises:
        ValueError: the model's shape does not fit the settings; one sentence.
    """
    layout = plan_page(config, shape.num_kv_heads, shape.head_size, shape.dtype)
    in_flight = 1 if given.no_async_scheduling or given.device == "cpu" else 2
    steps = max(in_flight, given.pipeline_parallel_size)
    boundary = ExactBoundary.of(config, given.max_num_batched_tokens, shape.max_model_len, steps)
    return Capacity.of(config, layout, shape.num_layers, boundary, shape.others)


def num_blocks(given: argparse.Namespace, config: ShadowKVConfig, pool: Capacity) -> tuple[int, bool]:
    """Blocks of one rank's pool, and whether the host, not the device, bounds them.

    Raises:
        ValueError: host or device cannot hold one request of `max_model_len`; one sentence.
    """
    device = int(given.kv_cache_gib * GIB) // pool.block_bytes
    host = pool.backing(
        config.host_memory_gib,
        pages_on_host=given.device == "cpu",
        ranks=given.tensor_parallel_size * given.pipeline_parallel_size,
        free=max(free_bytes() - promised_to_others(), 0) if given.host_gib is None else int(given.host_gib * GIB),
    ).blocks
    blocks = min(device, host)
    if blocks < pool.min_blocks:
        raise ValueError(
            f"shadowkv: {given.kv_cache_gib:g} GiB hold {blocks} KV cache blocks, one request of "
            f"{pool.boundary.max_model_len} tokens needs {pool.min_blocks} "
            f"({pool.min_blocks * pool.block_bytes / GIB:.1f} GiB); raise --kv-cache-gib or lower --max-model-len."
        )
    return blocks, host < device


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be JSON like '{{\"shadowkv\": {{}}}}', got {text!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text}")
    return int(text)


def _size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 2**30:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value
