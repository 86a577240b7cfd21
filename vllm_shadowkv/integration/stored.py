"""Which files hold the sealed blocks of a model, and what the scheduler tells the workers of them, step by step."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import vllm
from huggingface_hub import snapshot_download
from vllm.distributed import get_pp_group, get_tp_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata
from vllm.model_executor.models.utils import extract_layer_index

import vllm_shadowkv
from vllm_shadowkv.config import ShadowKVConfig, StoreConfig
from vllm_shadowkv.state.block_store import BlockFolder, BlockStore, used_bytes
from vllm_shadowkv.state.host_memory import GIB

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.shadowkv")

FORMAT = 1
"""Of a file; raise it with whatever changes what is in a page, in a row of the host pool, or in the file."""
OF_PAGES = ("block_size", "compression", "rank", "chunk_size", "num_outlier_chunks", "key_codec", "value_dtype")
"""The settings that say what a sealed block is; engines may differ in the others."""
NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass
class StepTransfers(KVConnectorMetadata):
    """What the workers have to do with files after a step. A block is its hash and its id.

    Attributes:
        computes: whether the step has a forward pass.
        saves: blocks that are sealed, and stay what they are during the step.
        loads: per request that waits for them, blocks to be filled.
        used: hashes of contexts that have just ended, each from its first block on.
    """

    computes: bool
    saves: list[tuple[bytes, int]] = field(default_factory=list)
    loads: dict[str, list[tuple[bytes, int]]] = field(default_factory=dict)
    used: list[list[bytes]] = field(default_factory=list)


@dataclass
class Rank(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler at start-up: where the model's files are, and which part of a block is its."""

    folder: BlockFolder
    name: str


def open_store(vllm_config: VllmConfig, layout: list[int], layers: list[str]) -> tuple[BlockStore, Rank]:
    """The files of this worker's rank; their folder is made if it is missing.

    Args:
        vllm_config: of the worker.
        layout: of its pages, as `PageLayout.ints`.
        layers: names of this rank's.

    Raises:
        ValueError: a wrong setting, or a folder that cannot be used.
    """
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    config = StoreConfig.from_vllm(transfer.kv_connector_extra_config)
    path = Path(config.path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"ShadowKVConnector cannot use its path {path}: {error.strerror}; name another.") from error
    if transfer.is_kv_producer:
        try:
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise ValueError(
                f"ShadowKVConnector cannot write to its path {path}: {error.strerror}; name another, or set kv_role to "
                "kv_consumer."
            ) from error
    if config.max_gib is None and _is_memory(path):
        raise ValueError(
            f"ShadowKVConnector's path {path} is in memory, of which the host pool takes most; set max_gib beside "
            "path, and shadowkv.host_memory_gib so that both fit."
        )
    if config.max_gib is None:
        most = (shutil.disk_usage(path).free + used_bytes(path)) // 2
    else:
        most = int(config.max_gib * GIB)
    stages, heads = get_pp_group(), get_tp_group()
    first, last = (extract_layer_index(layers[place]) for place in (0, -1))
    name = f"layers{first}to{last}-tp{heads.rank_in_group}of{heads.world_size}"
    model = _model(vllm_config)
    rank = Rank(BlockFolder(path, model), name)
    if stages.is_first_rank and heads.is_first_rank:
        logger.info("shadowkv: sealed blocks in %s, of all models at most %.1f GiB.", rank.folder, most / GIB)
    writers = stages.world_size * heads.world_size
    return BlockStore(
        rank.folder, name, {**model, "rank": name, "layout": layout, "layers": layers}, most, writers
    ), rank


def _is_memory(path: Path) -> bool:
    """Whether a folder's files are kept in memory."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in [path, *path.parents] if parent in mounts), "") in ("tmpfs", "ramfs")


def _model(vllm_config: VllmConfig) -> dict[str, Any]:
    """What a block depends on beside its tokens."""
    model, algorithm = vllm_config.model_config, vllm_config.cache_config.prefix_caching_hash_algo
    settings = ShadowKVConfig.from_vllm(vllm_config.additional_config).model_dump()
    config = {key: value for key, value in model.hf_config.to_dict().items() if key not in NOT_OF_THE_MODEL}
    return {
        "format": FORMAT,
        "versions": [vllm_shadowkv.__version__, vllm.__version__],
        "model": _weights(vllm_config),
        "config": config,
        "positions": model.max_model_len if "longrope" in str(config) else None,  # which factors it takes
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "settings": {key: settings[key] for key in OF_PAGES},
        # A block's hash is made of those of its pages where these can be hit; vLLM's default hashes pickled tokens.
        "hashes": [algorithm, os.getenv("PYTHONHASHSEED"), *sys.version_info[:2], settings["resident_pages"]],
    }


def _weights(vllm_config: VllmConfig) -> list[Any]:
    """What tells a model from others: samples of its files if they lie in a folder here, else its name."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy":
        return [model.model, "dummy", model.seed]
    path = Path(model.model)
    if not path.exists():
        try:
            path = Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
        except (OSError, ValueError):  # of another hub
            return [model.model, model.revision]
    endings = (".safetensors", ".bin", ".pt", ".gguf")
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in endings]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for place in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
                opened.seek(place)
                digest.update(opened.read(SAMPLE_BYTES))
    return [digest.hexdigest()] if files else [model.model, model.revision]
