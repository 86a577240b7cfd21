"""From assumptions to microseconds of an op and tokens a second of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from benchmarks.step_model.assumed import Assumed, Case, Machine
from vllm_shadowkv.cli.model import ModelShape
from vllm_shadowkv.cli.pool_plan import Plan
from vllm_shadowkv.cli.step_bytes import RowBytes, of_row
from vllm_shadowkv.page import plan_page
from vllm_shadowkv.state.boundary import ExactBoundary
from vllm_shadowkv.state.capacity import Capacity
from vllm_shadowkv.state.host_memory import GIB

SHAPE = ModelShape(32, 32, 8, 128, torch.bfloat16, 131_072)
WEIGHT_BYTES = 2 * (8.03e9 - 128_256 * 4096)
"""Of Llama-3.1-8B in bf16; of the input embedding a step reads a few rows."""
OPEN_TOKENS = 512
"""Of every request, beside a whole number of sealed blocks: half a block, the mean."""
STEP_TOKENS = 8192
"""`--max-num-batched-tokens`, which with the prefill window says what the last request needs to be admitted."""


@dataclass(frozen=True)
class Op:
    """Of some rows in one layer, in µs: what the bytes take at full bandwidth, and the prediction."""

    limit: float
    time: float


@dataclass(frozen=True)
class Model:
    """A machine, assumptions, a case, and requests of so many tokens."""

    machine: Machine
    assumed: Assumed
    case: Case
    tokens: int

    @cached_property
    def plan(self) -> Plan:
        """What fits, as `vllm-shadowkv plan` counts it."""
        case, machine = self.case, self.machine
        config = case.config.model_copy(update={"slot_chunks": case.slots * case.slot_bits // 16})  # in bf16's pages
        layout = plan_page(config, SHAPE.num_kv_heads, SHAPE.head_size, SHAPE.dtype)
        boundary = ExactBoundary.of(config, STEP_TOKENS, SHAPE.max_model_len, 2)
        pool = Capacity.of(config, layout, SHAPE.num_layers, boundary)
        device_bytes = int(machine.kv_cache_gib * GIB)
        free = int((case.host_gib or machine.host_gib) * GIB)
        backed = pool.backing(None, pages_on_host=False, ranks=1, free=free).blocks
        blocks = min(device_bytes // pool.block_bytes, backed)
        host_bound = backed < device_bytes // pool.block_bytes
        resolved = pool.resolve(blocks)
        return Plan(SHAPE, config, resolved, blocks, pool.min_blocks, device_bytes, host_bound, 1, (self.tokens,))

    @property
    def requests(self) -> int:
        """Requests that decode side by side."""
        return self.case.requests or self.plan.requests(self.case.backend, self.tokens)

    @cached_property
    def blocks(self) -> int:
        """Sealed blocks of a request."""
        return self.tokens // self.plan.config.block_size

    @cached_property
    def row(self) -> RowBytes:
        """Bytes of a row in a layer."""
        case, layout = self.case, self.plan.pool.layout
        row = of_row(case.config, layout, self.blocks, OPEN_TOKENS, case.hits)
        if case.hits is not None and case.of_scored:
            missed = (1 - case.hits) * self.plan.config.budget_chunks
            row = of_row(case.config, layout, self.blocks, OPEN_TOKENS, 1 - missed / row.selected)
        both = 2 * layout.width * layout.chunk_size * layout.dtype.itemsize  # keys and values of a chunk, all heads
        missed = (1 - row.hits) * row.selected
        slot_bytes = both * case.slot_bits // 16
        touched = self.blocks * (1 - (1 - 1 / self.blocks) ** (missed * (1 - case.resident)))  # anywhere alike
        read = (row.filled - missed * both) * (1 - case.resident) + touched * layout.rank * layout.width
        return replace(
            row,
            attended=row.attended - row.selected * (both - slot_bytes),
            filled=read + missed * (slot_bytes + case.resident * both),
            link=row.link * (1 - case.resident),
        )

    def ops(self, rows: int) -> dict[str, Op]:
        """Every op of a layer."""
        a, machine, row = self.assumed, self.machine, self.row
        memory, link = machine.memory_gbs * 1e3, machine.link_gbs * 1e3  # bytes per µs
        if self.case.backend != "shadowkv":
            moved = rows * self.tokens * self.plan.stock_token_bytes(self.case.backend) / SHAPE.num_layers
            share = a.flash_fp8_share if self.case.backend == "fp8" else a.flash_bf16_share
            return {"attention": Op(moved / memory, a.flash_wait + moved / memory / share)}
        heads, chunks, blocks = SHAPE.num_kv_heads, self.plan.pool.layout.chunks, self.blocks
        scored = rows * row.landmarks / memory
        issued = a.logits_instructions * rows * heads * blocks * chunks / 8
        logits = issued / (machine.sms * 4 * machine.clock_ghz * 1e3 * a.logits_issue)
        waves = math.ceil(rows * heads / machine.sms)
        attended = rows * row.attended / memory
        filled = max(rows * row.link / link / a.link_share, rows * row.filled / memory / a.gather_share)
        return {
            "logits": Op(scored, a.logits_wait + max(logits, scored)),
            "pick": Op(0, waves * (a.pick_wait + a.pick_chunk * blocks * chunks)),
            "rest": Op(
                0, max(a.rest_wait + a.rest_block * blocks + a.rest_row * rows, a.rest_row_block * blocks * rows)
            ),
            "plan_slots": Op(0, a.plan_wait + a.plan_row * rows),
            "fill_slots": Op(
                max(rows * row.link / link, rows * row.filled / memory),
                a.fill_wait + (a.resident_wait if self.case.resident else 0) + filled,
            ),
            "sparse_attention": Op(attended, max(a.attend_least, a.attend_wait + attended / a.gather_share)),
            "write": Op(0, a.write),
        }

    def layer(self, rows: int) -> float:
        """µs of a layer: parts select and plan in turn, the link fills one after the other, then they attend.

        What runs beside the link is taken to slow neither it nor itself.
        """
        parts = min(self.case.parts, rows) if self.case.backend == "shadowkv" else 1
        first = linked = 0.0
        done = []
        for part in range(parts):
            ops = self.ops(rows // parts + (part < rows % parts))
            fill, attend = (ops.pop(name, Op(0, 0)).time for name in ("fill_slots", "sparse_attention"))
            first += sum(op.time for op in ops.values())
            linked = max(first, linked) + fill
            done.append((linked, attend))
        end = first
        for filled, attend in done:
            end = max(end, filled) + attend
        return end

    @property
    def beside_limit(self) -> float:
        """Milliseconds that a step takes beside attention, at least."""
        return WEIGHT_BYTES / self.machine.memory_gbs / 1e6 + self.assumed.step_row * self.requests / 1e3

    @cached_property
    def step(self) -> float:
        """Milliseconds of a step of all requests."""
        a, rows, beside = self.assumed, self.requests, self.beside_limit
        if self.case.at_limit:
            return SHAPE.num_layers * sum(op.limit for op in self.ops(rows).values()) / 1e3 + beside
        slower = (1 / a.weights_share - 1) * WEIGHT_BYTES / self.machine.memory_gbs / 1e6
        return SHAPE.num_layers * self.layer(rows) / 1e3 + beside + slower + a.step_rest / 1e3

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return 1e3 * self.requests / self.step
