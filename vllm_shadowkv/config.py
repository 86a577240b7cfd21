"""The user's settings: `--additional-config '{"shadowkv": {...}}'`, validated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SINK_CHUNKS = 1
"""Chunks at the start of a context that are always selected (the attention sink)."""

LOCAL_CHUNKS = 4
"""The newest chunks, always attended: selected by force while they are already sealed (paper, section 4)."""

OTHER_BACKEND = "use another --attention-backend"
"""The way out where a model cannot be served."""


class ShadowKVConfig(BaseModel):
    """Settings of the `shadowkv` attention backend.

    Lengths are in tokens unless a name says chunks. Construct it with `from_vllm`, which turns pydantic's report into
    one sentence that names the key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    block_size: int = Field(1024, description="Tokens in one sealed block.")
    compression: Literal[1, 2, 4, 8, 16] = Field(8, description="Sealed tokens per exact token in equal device bytes.")
    rank: int | None = Field(None, ge=16, description="Cap on the rank of a block's keys; default: what fits the page.")
    chunk_size: Literal[8, 16] = Field(8, description="Consecutive tokens selected together.")
    sparse_budget: int = Field(2048, ge=1, description="Tokens selected per KV head and decode step.")
    num_outlier_chunks: int = Field(
        1, ge=0, description="Chunks per block and KV head whose keys stay exact and are always selected."
    )
    slot_chunks: int = Field(
        384, ge=1, description="Chunks per KV head and request whose keys and values stay on the device."
    )
    dense_threshold: int = Field(4096, ge=0, description="Below this many tokens a request is attended exactly.")
    prefill_exact_tokens: int | None = Field(
        None,
        ge=0,
        description="Newest tokens kept exact while a prompt is prefilled; default: 16384, or half of the pool.",
    )
    decode_exact_tokens: int = Field(
        0, ge=0, description="Newest tokens kept exact in decode, beyond those of the open block."
    )
    resident_pages: bool = Field(
        True,
        description="Use the exact pages of sealed blocks until they are given away; off: results do not depend on it.",
    )
    key_codec: Literal["int8", "none"] = Field("int8", description="Low-rank factors in 8 and 4 bits, or exact keys.")
    value_dtype: Literal["auto", "int8"] = Field(
        "int8", description="Values in the host pool: int8, or the model's dtype."
    )
    host_memory_gib: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Size of the host pool of all ranks of this machine; default: most of the free memory.",
    )

    @model_validator(mode="after")
    def _check_combination(self) -> ShadowKVConfig:
        if self.block_size < 64 or self.block_size % 64:
            raise ValueError(f"block_size must be a positive multiple of 64, got {self.block_size}")
        if self.block_size // self.compression % 16:
            raise ValueError(
                f"block_size / compression must be a multiple of 16, got {self.block_size} / {self.compression}"
            )
        if self.rank is not None and self.rank % 16:
            raise ValueError(f"rank must be a multiple of 16, got {self.rank}")
        if self.sparse_budget % self.chunk_size:
            raise ValueError(
                f"sparse_budget must be a multiple of chunk_size {self.chunk_size}, got {self.sparse_budget}"
            )
        if self.num_outlier_chunks > self.block_size // self.chunk_size:
            raise ValueError(
                f"num_outlier_chunks must be at most the {self.block_size // self.chunk_size} chunks of a block, "
                f"got {self.num_outlier_chunks}"
            )
        if self.slot_chunks < self.forced_chunks + self.budget_chunks:
            raise ValueError(
                f"slot_chunks must be at least {self.forced_chunks + self.budget_chunks} for a sparse_budget of "
                f"{self.sparse_budget} tokens, got {self.slot_chunks}"
            )
        return self

    @property
    def budget_chunks(self) -> int:
        """Chunks selected by score per KV head and step."""
        return self.sparse_budget // self.chunk_size

    @property
    def forced_chunks(self) -> int:
        """Chunks selected whatever their score, outliers not counted."""
        return SINK_CHUNKS + LOCAL_CHUNKS

    @property
    def exact_tokens_per_page(self) -> int:
        """Tokens in one exact page."""
        return self.block_size // self.compression

    @property
    def chunks_per_block(self) -> int:
        """Chunks in one sealed block."""
        return self.block_size // self.chunk_size

    @classmethod
    def from_vllm(cls, additional_config: Mapping[str, Any] | None) -> ShadowKVConfig:
        """Reads the `shadowkv` entry of vLLM's `--additional-config`.

        Args:
            additional_config: vLLM's `additional_config`, or None.

        Returns:
            The validated settings; the defaults where there is no entry.

        Raises:
            ValueError: an unknown key, a wrong type or an impossible combination; the sentence names it.
        """
        entry = (additional_config or {}).get("shadowkv", {})
        if not isinstance(entry, Mapping):
            raise ValueError(
                "--additional-config: 'shadowkv' must be an object like "
                f'{{"sparse_budget": 2048}}, got {type(entry).__name__}.'
            )
        try:
            return cls.model_validate(dict(entry))
        except ValidationError as error:
            raise ValueError(_one_sentence(error, "--additional-config shadowkv", cls)) from None


class StoreConfig(BaseModel):
    """Settings of `ShadowKVConnector`: the `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: str = Field(min_length=1, description="Folder of sealed blocks, which engines may share; made if missing.")
    max_gib: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Most that all its files may take; default: half of what would be free without them, at start-up.",
    )

    @classmethod
    def from_vllm(cls, extra_config: Mapping[str, Any]) -> StoreConfig:
        """Reads vLLM's `kv_connector_extra_config`.

        Raises:
            ValueError: an unknown key, a missing path or a wrong type; the sentence names it.
        """
        try:
            return cls.model_validate(dict(extra_config))
        except ValidationError as error:
            raise ValueError(
                _one_sentence(error, "--kv-transfer-config kv_connector_extra_config of ShadowKVConnector", cls)
            ) from None


def _one_sentence(error: ValidationError, where: str, settings: type[BaseModel]) -> str:
    """Says what is wrong with the settings in one sentence."""
    parts = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key {key!r} (known: {', '.join(settings.model_fields)})")
        elif item["type"] == "missing":
            parts.append(f"{key!r} is missing")
        elif key:
            parts.append(f"'{key}': {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}")
        else:
            parts.append(item["msg"].removeprefix("Value error, "))
    return f"{where}: {'; '.join(parts)}."
