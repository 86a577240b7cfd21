"""An attention layer over every batch shape of vLLM's own tests of backends, against full attention in PyTorch.

The shapes are `BATCH_SPECS` of vLLM's tests/v1/attention/test_attention_backends.py, those of encoders aside, which are
refused. The layer, its three groups' builders and its memory are real; only the scheduler is missing: every row has
pages of its own, in random places. A row's context goes through the layer in steps, so that its blocks are sealed as
in an engine; then pages that the batch must not read are filled with NaN, and it follows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import generators
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from simulation import write_tiny_llama
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaAttention
from vllm.v1.attention.backend import CommonAttentionMetadata

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64
SCALE = HEAD_SIZE**-0.5
LONGEST = 4096
STEP = 512
"""Tokens of a row and step while its context is computed."""

# Seals lose nothing, and the budget covers every context: only rounding may differ.
LOSSLESS = {"block_size": 256, "compression": 1, "key_codec": "none", "sparse_budget": 4096, "slot_chunks": 520}
LOSSLESS |= {"value_dtype": "auto", "resident_pages": False}
SETTINGS: dict[str, dict[str, int]] = {
    "everything sealed": {"dense_threshold": 0, "prefill_exact_tokens": 0},
    "windows": {"dense_threshold": 700, "prefill_exact_tokens": 600, "decode_exact_tokens": 300},
    "dense": {"dense_threshold": LONGEST + 1},
}
TOLERANCE = 2e-5
"""Measured: at most 3e-6. The oldest token left out changes 1.8e-4 or more."""


@dataclass(frozen=True)
class Shape:
    """Tokens of each row with its context, and those of them that this step computes."""

    seq_lens: list[int]
    query_lens: list[int]


SHAPES = {
    "small_decode": Shape([32, 40], [1, 1]),
    "small_prefill": Shape([32, 40], [8, 8]),
    "mixed_small": Shape([32, 40, 48, 56], [1, 1, 5, 5]),
    "medium_decode": Shape([128, 256, 512, 1024] * 2, [1] * 8),
    "medium_prefill": Shape([256, 512, 1024, 2048], [16] * 4),
    "mixed_medium": Shape([512, 1024, 2048] * 2, [1, 1, 1, 7, 7, 7]),
    "large_decode": Shape([2048] * 32, [1] * 32),
    "large_prefill": Shape([4096] * 8, [32] * 8),
    "mixed_large": Shape([1024, 2048, 4096] * 2, [1, 1, 1, 32, 32, 32]),
    "single_decode": Shape([1024], [1]),
    "single_prefill": Shape([1024], [64]),
}


@dataclass
class Rows:
    """What the rows of a batch hold: keys and values `[tokens, Hkv, D]` each, and pages by group."""

    keys: list[Tensor]
    values: list[Tensor]
    tables: dict[str, Tensor]
    computed: list[int] = field(default_factory=list)


class Layer:
    """One attention layer of an engine that is not there."""

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        with set_current_vllm_config(config):
            parent = object.__new__(LlamaAttention)  # it would want weights, and other ranks
            torch.nn.Module.__init__(parent)
            parent.rotary_emb = get_rope(HEAD_SIZE, LONGEST, rope_parameters={"rope_theta": 10_000.0})
            parent.attn = Attention(HEADS, HEAD_SIZE, SCALE, num_kv_heads=KV_HEADS, prefix="layers.0.attn")
            parent.attn.impl.process_weights_after_loading(torch.float32)
        self._parent = parent
        self._impl: Any = parent.attn.impl
        context = config.compilation_config.static_forward_context
        self._groups = {"shadow": parent.attn, "exact": context["layers.0.attn.exact"]}
        self._groups["slots"] = context["layers.0.attn.slots"]
        self._builders: dict[str, Any] = {}

    def allocate(self, shape: Shape, seed: str) -> Rows:
        """A KV cache that just holds the rows, and the rows."""
        layout = self._impl.runtime.geometry.layout
        generator = generators.make_generator(seed)
        counts = {
            "shadow": [-(-length // layout.block_size) for length in shape.seq_lens],
            "exact": [-(-length // layout.exact_tokens) for length in shape.seq_lens],
            "slots": [self._impl.runtime.geometry.slot_pages_per_request] * len(shape.seq_lens),
        }
        num_blocks = 1 + sum(map(sum, counts.values()))
        pages = torch.zeros(num_blocks, layout.page_bytes, dtype=torch.uint8)
        for name, group in self._groups.items():
            group.kv_cache = pages
            spec = group.get_kv_cache_spec(self.config)
            make = group.get_attn_backend().get_builder_cls()
            self._builders[name] = make(spec, [group.layer_name], self.config, torch.device("cpu"))
        ids = iter((torch.randperm(num_blocks - 1, generator=generator) + 1).int().tolist())
        tables = {}
        for name, numbers in counts.items():
            tables[name] = torch.zeros(len(numbers), max(numbers), dtype=torch.int32)
            for row, number in enumerate(numbers):
                tables[name][row, :number] = torch.tensor([next(ids) for _ in range(number)])
        keys, values = (
            [generators.randn(generator, length, KV_HEADS, HEAD_SIZE) for length in shape.seq_lens] for _ in range(2)
        )
        return Rows(keys, values, tables, [0] * len(shape.seq_lens))

    def step(self, rows: Rows, query: list[Tensor], prefilling: list[bool]) -> list[Tensor]:
        """Computes the next tokens of every row; a row with an empty query is not in the step."""
        taken = [row for row, tokens in enumerate(query) if len(tokens)]
        ends = {row: rows.computed[row] + len(query[row]) for row in taken}
        starts = torch.tensor([0, *accumulate(len(query[row]) for row in taken)], dtype=torch.int32)
        seq_lens = torch.tensor(list(ends.values()), dtype=torch.int32)
        size = self._impl.runtime.geometry.layout.exact_tokens
        places = [torch.arange(rows.computed[row], ends[row]) for row in taken]
        slots = [
            rows.tables["exact"][row, at // size].long() * size + at % size
            for row, at in zip(taken, places, strict=True)
        ]
        step: Any = None
        for group, builder in self._builders.items():
            metadata = CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=seq_lens,
                num_reqs=len(taken),
                num_actual_tokens=int(starts[-1]),
                max_query_len=int(starts.diff().max()),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=rows.tables[group][taken],
                slot_mapping=torch.cat(slots),
                positions=torch.cat(places),
                is_prefilling=torch.tensor([prefilling[row] for row in taken]),
                seq_lens_cpu_upper_bound=seq_lens,
            )
            step = builder.build(0, metadata)
        new = [slice(rows.computed[row], ends[row]) for row in taken]
        keys, values = (
            torch.cat([of[row][part] for row, part in zip(taken, new, strict=True)]) for of in (rows.keys, rows.values)
        )
        queries = torch.cat([query[row] for row in taken])
        output = torch.full_like(queries, torch.nan)
        self._impl.forward(self._parent.attn, queries, keys, values, torch.empty(0), step, output)
        for row in taken:
            rows.computed[row] = ends[row]
        return list(output.split(starts.diff().tolist()))

    def poison(self, rows: Rows, prefilling: list[bool]) -> None:
        """Seals all that is complete, and fills the exact pages that the next step must not read with NaN."""
        self._impl.runtime.planner.seal_due()
        bound, layout = self._impl.runtime.memory.bind(), self._impl.runtime.geometry.layout
        for row, computed in enumerate(rows.computed):
            end = bound.boundary.exact_start(computed, prefilling[row]) // layout.block_size
            pages = rows.tables["exact"][row, :end][bound.state.sealed[rows.tables["shadow"][row, :end].long()]]
            self._groups["exact"].kv_cache[pages.long()] = 0xFF

    @property
    def exact_tokens(self) -> int:
        return int(self._impl.runtime.geometry.layout.exact_tokens)

    def fill(self, page: int, byte: int) -> None:
        """Leaves a byte everywhere in a page."""
        self._groups["exact"].kv_cache[page] = byte

    def values(self, page: int) -> Tensor:
        """Of an exact page, `[Hkv, tokens, D]`."""
        (memory,) = self._impl.runtime.memory.bind().memories.values()
        return memory.exact_views[1][page]

    def sealed(self, rows: Rows) -> int:
        """Blocks of the rows that are sealed."""
        state = self._impl.runtime.memory.bind().state
        return int(state.sealed[rows.tables["shadow"].long()].sum())


@pytest.fixture(scope="module", params=SETTINGS)
def layer(request: pytest.FixtureRequest) -> Iterator[Layer]:
    with tempfile.TemporaryDirectory() as folder:
        config = EngineArgs(
            model=write_tiny_llama(Path(folder)),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=LONGEST,
            max_num_batched_tokens=STEP * 32,
            max_num_seqs=32,
            attention_backend="shadowkv",
            additional_config={"shadowkv": LOSSLESS | SETTINGS[request.param]},
        ).create_engine_config()
    return Layer(config)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "large" in name else []) for name in SHAPES]
)
def test_equals_full_attention(layer: Layer, name: str) -> None:
    shape, generator = SHAPES[name], generators.make_generator(name, "queries")
    rows = layer.allocate(shape, name)
    contexts = [length - new for length, new in zip(shape.seq_lens, shape.query_lens, strict=True)]
    while rows.computed != contexts:
        lengths = [min(context - done, STEP) for context, done in zip(contexts, rows.computed, strict=True)]
        layer.step(rows, [torch.zeros(length, HEADS, HEAD_SIZE) for length in lengths], [True] * len(contexts))
    prefilling = [new > 1 for new in shape.query_lens]
    layer.poison(rows, prefilling)
    query = [2 * generators.randn(generator, new, HEADS, HEAD_SIZE) for new in shape.query_lens]
    output = layer.step(rows, query, prefilling)
    for row, (ours, asked) in enumerate(zip(output, query, strict=True)):
        expected = full_attention(asked, rows.keys[row], rows.values[row])
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)
    # Below the dense threshold too.
    assert layer.sealed(rows) == sum(context // 256 for context in contexts)


def test_rows_without_pages_come_out_as_zeros(layer: Layer) -> None:
    """VLLM runs the model on such rows to warm up; what is NaN there may upset the rest of the model."""
    rows = layer.allocate(Shape([40, 8], [40, 8]), "dummy")
    rows.tables = {name: torch.zeros_like(table) for name, table in rows.tables.items()}
    query = [torch.ones(length, HEADS, HEAD_SIZE) for length in (40, 8)]
    assert not any(part.any() for part in layer.step(rows, query, [True, False]))


def test_a_page_is_cleared_by_the_step_that_begins_it(layer: Layer) -> None:
    """One that decodes too: the next may compute several tokens, and vLLM's kernel then reads the whole page."""
    rows = layer.allocate(Shape([1088], [1088]), "begun by decoding")
    while rows.computed != [1024]:
        layer.step(rows, [torch.zeros(STEP, HEADS, HEAD_SIZE)], [True])
    page = int(rows.tables["exact"][0, 1024 // layer.exact_tokens])
    layer.fill(page, 0xFF)
    layer.step(rows, [torch.zeros(1, HEADS, HEAD_SIZE)], [False])
    assert not layer.values(page)[:, 1:].any()


def full_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The newest tokens of one row, `[new, Hq, D]`, over all of it."""
    length, new = len(keys), len(query)
    seen = torch.arange(length) <= torch.arange(length - new, length)[:, None]
    keys, values = (part.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for part in (keys, values))
    logits = (query.transpose(0, 1) @ keys.mT * SCALE).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ values).transpose(0, 1)
