"""What is assumed of machines and of kernels, and the cases that are predicted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_shadowkv.config import ShadowKVConfig


def number(value: float, meaning: str, low: float | None = None, high: float | None = None) -> Any:
    """A field that has a meaning, and where it is uncertain its worst and its best value."""
    return field(default=value, metadata={"meaning": meaning, "low": low, "high": high})


@dataclass(frozen=True)
class Machine:
    """A GPU and its host; bandwidths in GB/s."""

    memory_gbs: float = number(3350, "device memory, as the data sheet says")
    link_gbs: float = number(55, "a pinned copy from the host: PCIe 5.0 with 16 lanes")
    sms: float = number(132, "multiprocessors")
    clock_ghz: float = number(1.8, "their clock under load")
    kv_cache_gib: float = number(53.5, "for the KV cache: 0.9 of all memory less 18 GiB of weights and scratch")
    host_gib: float = number(2048, "free host memory, of which the pool takes 85 %")


MACHINES = {"H100": Machine(), "H200": Machine(memory_gbs=4800, kv_cache_gib=108)}


@dataclass(frozen=True)
class Assumed:
    """What is assumed of kernels, in µs unless a name says otherwise; docs/gpu_predictions.md says where from."""

    link_share: float = number(0.864, "of a pinned copy that kernels reach reading mapped host memory", 0.64, 0.95)
    fill_wait: float = number(4.5, "`fill_slots`: launch, tables, the last rows written")
    resident_wait: float = number(4.5, "and five dependent loads that find a resident chunk", 10.5, 0.5)
    gather_share: float = number(0.885, "of device memory that `sparse_attention` and copies reach", 0.77, 0.97)
    attend_wait: float = number(10.6, "`sparse_attention`: launches, a split's tables, the merge")
    attend_least: float = number(18, "`sparse_attention` with few rows: one after the other, a split's steps", 23, 13)
    logits_instructions: float = number(157, "`logits`: instructions of a warp for 8 chunks of a row and KV head")
    logits_issue: float = number(0.48, "of four a cycle and SM: it waits for scales after the products", 0.36, 0.64)
    logits_wait: float = number(5.2, "`logits`: launch, first and last tiles")
    pick_wait: float = number(15, "`pick`: launch and more, one SM per row and KV head, so in waves")
    pick_chunk: float = number(0.00176, "`pick`: a chunk in a wave", 0.0026, 0.00098)
    rest_wait: float = number(3, "`rest`: launch, merge")
    rest_block: float = number(0.108, "`rest`: a block, one after the other")
    rest_row: float = number(0.25, "`rest`: a row, while its SMs are not full")
    rest_row_block: float = number(0.01383, "`rest`: a block of a row, once they are")
    plan_wait: float = number(12.5, "`plan_slots`: hash table, bitonic sort, all latency", 17.5, 8.5)
    plan_row: float = number(0.08, "`plan_slots`: a row")
    write: float = number(3, "writing the new token's key and value")
    flash_bf16_share: float = number(0.85, "of device memory that FlashAttention 3 reaches in bf16")
    flash_fp8_share: float = number(0.76, "and in fp8", 0.65, 0.85)
    flash_wait: float = number(9, "FlashAttention: launches, the merge of its splits")
    weights_share: float = number(0.85, "of device memory that the matrices' products reach")
    step_rest: float = number(1000, "all else of a step: norms, RoPE, launches, sampling", 1500, 500)
    step_row: float = number(15, "of it for each row")


@dataclass(frozen=True)
class Case:
    """What is predicted: a backend, and settings or changes of ours, not all of which are built."""

    name: str
    backend: str = "shadowkv"
    hits: float | None = None  # of the selected chunks; None: by slots, as SmolLM2
    of_scored: bool = False  # hits are those of the budget: whatever is forced stays
    slots: int = ShadowKVConfig().slot_chunks
    slot_bits: int = 16  # 8: twice the slots in a page, a change that is not built
    bf16_values: bool = False  # value_dtype auto
    parts: int = 1  # of a step's rows; the next part's values are fetched beside the ops of others: not built
    resident: float = 0.0  # share of the missed chunks that are copied from exact pages
    host_gib: float | None = None
    requests: int | None = None  # None: as many as fit
    at_limit: bool = False

    @property
    def config(self) -> ShadowKVConfig:
        """The settings."""
        values = "auto" if self.bf16_values else "int8"
        return ShadowKVConfig.from_vllm({"shadowkv": {"slot_chunks": self.slots, "value_dtype": values}})


HIT = 0.6
CASES = (
    Case("FlashAttention, bf16", "bf16"),
    Case("FlashAttention, fp8", "fp8"),
    Case("**shadowkv**, 60 % of all hit", hits=HIT),
    Case("60 % of the scored hit", hits=HIT, of_scored=True),
    Case("384 slots, hits as SmolLM2's"),
    Case("512 slots, hits as SmolLM2's", slots=512),
    Case("768 slots, hits as SmolLM2's", slots=768),
    Case("60 %, bf16 values", hits=HIT, bf16_values=True),
    Case("384 slots, SmolLM2's hits, bf16 values", bf16_values=True),
    Case("60 %, 128 GiB of host memory free", hits=HIT, host_gib=128),
    Case("not built: 60 %, rows in 2 parts", hits=HIT, parts=2),
    Case("not built: 60 %, rows in 4 parts", hits=HIT, parts=4),
    Case("not built: 8-bit slots, 768 in as many pages", slots=768, slot_bits=8),
    Case("not built: 768 slots, rows in 2 parts", slots=768, parts=2),
    Case("60 %, every op at its limit", hits=HIT, at_limit=True),
)
