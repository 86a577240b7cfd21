"""vLLM's scheduler and our managers, and a worker without a model: pages hold the tokens that were written there.

The worker plans every step with the real `Planner`, and the slots of what it decodes with the real `plan_slots`. "Keys
and values" of a token are a number that depends on it and on all tokens before it, as those of a model do. A page or a
slot read where another number is expected is the bug to be found.
"""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_shadowkv import ops
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.integration.scheduler.exact import ExactManager
from vllm_shadowkv.integration.scheduler.managers import ShadowManager, SlotManager, see_request
from vllm_shadowkv.integration.specs import ExactSpec, ShadowSpec, SlotSpec
from vllm_shadowkv.integration.stored import Rank, StepTransfers
from vllm_shadowkv.integration.worker import sealing
from vllm_shadowkv.integration.worker.planner import Planner
from vllm_shadowkv.integration.worker.step import Step
from vllm_shadowkv.integration.worker.transfers import Transfers
from vllm_shadowkv.metrics import StepCounts
from vllm_shadowkv.page import plan_page
from vllm_shadowkv.plugin import CONNECTOR
from vllm_shadowkv.state.block_state import BlockState
from vllm_shadowkv.state.block_store import BadBlockError
from vllm_shadowkv.state.boundary import ExactBoundary
from vllm_shadowkv.state.decode import DecodeRows
from vllm_shadowkv.state.due import DueBlocks
from vllm_shadowkv.state.slot_counts import SlotCounts

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

init_none_hash(sha256)


def write_tiny_llama(folder: Path) -> str:
    """A model's configuration, without weights or tokenizer."""
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return str(folder)


@functools.cache
def vllm_config() -> VllmConfig:
    """An engine's configuration. It takes seconds to make, so there is one; `Engine` sets what it needs."""
    with tempfile.TemporaryDirectory() as folder:
        return EngineArgs(
            model=write_tiny_llama(Path(folder)),
            skip_tokenizer_init=True,
            max_model_len=131_072,
            attention_backend="shadowkv",
        ).create_engine_config()


def shadow_groups(
    boundary: ExactBoundary,
    slot_pages: int,
    page_bytes: int = 4096,
    num_kv_heads: int = 1,
    head_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    layers: Sequence[str] = ("layers.0",),
    resident: bool = True,
) -> list[KVCacheGroupSpec]:
    """The three groups, as vLLM makes them of our layers' specs."""
    shape: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_size": head_size, "dtype": dtype}
    specs = {
        "": ShadowSpec(block_size=boundary.block_size, shadow_page_bytes=page_bytes, **shape),
        ".exact": ExactSpec(
            block_size=boundary.exact_tokens,
            exact_page_bytes=page_bytes,
            boundary=boundary,
            resident=resident,
            **shape,
        ),
        ".slots": SlotSpec(
            block_size=boundary.block_size,
            slot_page_bytes=page_bytes,
            pages_per_request=slot_pages,
            boundary=boundary,
            **shape,
        ),
    }
    return [KVCacheGroupSpec([layer + suffix for layer in layers], spec) for suffix, spec in specs.items()]


def exact_boundary(
    config: ShadowKVConfig, max_step: int, max_model_len: int, asynchronous: bool = False, slot_pages: int = 3
) -> ExactBoundary:
    """The rule, as `Runtime` makes it."""
    boundary = ExactBoundary.of(config, max_step, max_model_len, steps_in_flight=2 if asynchronous else 1)
    return boundary.beside(slot_pages)


class Files:
    """What `BlockFolder` and `BlockStore` are to the connector, without files."""

    def __init__(self, bad: float = 0.0) -> None:
        """Empty.

        Args:
            bad: share of the reads that find no block, or another.
        """
        self.blocks: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
        self.bad_blocks: set[bytes] = set()
        """Once each."""
        self._bad, self._draw = bad, random.Random(0)

    def count(self, ranks: Iterable[str], block_hashes: Iterable[bytes]) -> int:
        found = 0
        for block_hash in block_hashes:
            if block_hash not in self.blocks:
                break
            found += 1
        return found

    def has(self, block_hash: bytes) -> bool:
        return block_hash in self.blocks

    def write(self, block_hash: bytes, pages: torch.Tensor, values: torch.Tensor) -> int:
        assert torch.equal(pages[:, : values.shape[1]], values), "the page is of one block, and the values of another"
        self.blocks.setdefault(block_hash, (pages.clone(), values.clone()))
        return 1

    def read(self, block_hash: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        is_bad = block_hash in self.bad_blocks or self._draw.random() < self._bad
        self.bad_blocks.discard(block_hash)
        if block_hash not in self.blocks or is_bad:
            raise BadBlockError("is bad")
        return self.blocks[block_hash]

    def remove(self, block_hash: bytes) -> None:
        self.blocks.pop(block_hash, None)

    def touch(self, block_hashes: Iterable[bytes]) -> None:
        assert all(block_hashes)


class Late(Executor):
    """Runs what it is asked in order, some time later."""

    def __init__(self) -> None:
        self._asked: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._asked.append((future, functools.partial(function, *args, **kwargs)))
        return future

    def run(self, most: int) -> None:
        """The next ones."""
        for _ in range(min(most, len(self._asked))):
            future, call = self._asked.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BadBlockError as error:
                future.set_exception(error)


class Engine:
    """A scheduler with our three groups, and the worker.

    Args:
        num_blocks: of the pool, the null block included.
        max_step: tokens of a step.
        asynchronous: schedule a step before the output of the last one is known, as vLLM does on GPUs.
        slot_pages: per request.
        policy: "fcfs", or "priority", which preempts requests that the same step has already scheduled.
        runner: "v1" or "v2": what vLLM's model runner calls prefilling. "v2-cuda" also plans as on CUDA, where rows of
            one token all decode through our kernels and most steps do not read the block tables on the host.
        zeroed: vLLM zeroes pages that it gives away, as beside layers of other backends.
        files: blocks are saved to them, and loaded from them, by the KV connector.
        settings: of ShadowKV.
    """

    def __init__(
        self,
        num_blocks: int = 200,
        *,
        max_model_len: int = 640,
        max_step: int = 96,
        max_seqs: int = 8,
        caching: bool = True,
        asynchronous: bool = False,
        slot_pages: int = 3,
        policy: str = "fcfs",
        runner: str = "v1",
        zeroed: bool = False,
        files: Files | None = None,
        **settings: Any,
    ) -> None:
        settings = {"block_size": 64, "compression": 4, "dense_threshold": 128, **settings}
        self.config = ShadowKVConfig(**settings)
        vllm = vllm_config()
        vllm.scheduler_config.max_num_batched_tokens = max_step
        vllm.scheduler_config.max_num_scheduled_tokens = max_step
        vllm.scheduler_config.max_num_seqs = max_seqs
        vllm.scheduler_config.async_scheduling = asynchronous
        vllm.scheduler_config.policy = policy  # type: ignore[assignment]
        vllm.model_config.max_model_len = max_model_len
        vllm.cache_config.enable_prefix_caching = caching
        vllm.cache_config.num_gpu_blocks = num_blocks
        transfer = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both")
        vllm.kv_transfer_config = None if files is None else transfer
        boundary = exact_boundary(self.config, max_step, max_model_len, asynchronous, slot_pages)
        resident = self.config.resident_pages and not zeroed
        kind: dict[str, Any] = {"resident": resident} | ({"dtype": torch.uint8} if zeroed else {})
        self.hash_size = self.config.exact_tokens_per_page if resident else self.config.block_size
        self.asynchronous = asynchronous
        self.scheduler = (AsyncScheduler if asynchronous else Scheduler)(
            vllm_config=vllm,
            kv_cache_config=KVCacheConfig(num_blocks, [], shadow_groups(boundary, slot_pages, **kind)),
            structured_output_manager=SimpleNamespace(accept_tokens=lambda *_: True),  # type: ignore[arg-type]
            block_size=self.config.block_size,
            hash_block_size=self.hash_size,
        )
        self.worker = Worker(
            self.config, boundary.resolve(num_blocks), num_blocks, slot_pages, max_seqs, runner, zeroed, files
        )
        if files is not None:
            connector = self.scheduler.connector
            assert connector is not None
            connector.set_xfer_handshake_metadata_pp_aware({(0, 0): self.worker.transfers.rank})
        vllm.kv_transfer_config = None  # others share it
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.requests: dict[str, Request] = {}
        self.preemptions = 0
        self.hits: dict[str, int] = {}
        """Tokens that each request's latest admission found in the prefix cache."""

    @property
    def manager(self) -> KVCacheManager:
        return self.scheduler.kv_cache_manager

    @property
    def managers(self) -> tuple[ShadowManager, ExactManager, SlotManager]:
        shadow, exact, slots = self.manager.coordinator.single_type_managers
        assert isinstance(shadow, ShadowManager)
        assert isinstance(exact, ExactManager)
        assert isinstance(slots, SlotManager)
        return shadow, exact, slots

    @property
    def free_blocks(self) -> int:
        return self.manager.block_pool.get_num_free_blocks()

    def add(self, prompt: Iterable[int], max_tokens: int = 1, name: str | None = None, priority: int = 0) -> Request:
        """A new request; a lower priority comes first, where the policy asks for it."""
        request = Request(
            request_id=name or f"r{len(self.requests)}",
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            pooling_params=None,
            priority=priority,
            block_hasher=get_request_block_hasher(self.hash_size, sha256),
        )
        self.requests[request.request_id] = request
        see_request(SimpleNamespace(scheduler=self.scheduler, vllm_config=self.scheduler.vllm_config), request)
        self.scheduler.add_request(request)
        return request

    def abort(self, request: Request) -> None:
        """The client has gone."""
        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> SchedulerOutput:
        """Schedules, computes, and takes in the output (of the step before, if asynchronous)."""
        output = self.scheduler.schedule()
        self.preemptions += len(output.preempted_req_ids or ())
        for new in output.scheduled_new_reqs:
            self.hits[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self.hits[name] = computed
        if output.total_num_scheduled_tokens or output.kv_connector_metadata:
            free = [block for block in self.manager.block_pool.blocks if block.ref_cnt == 0]
            self.worker.free = {block.block_id for block in free}
            blocks = self.manager.block_pool.blocks
            given = {page for rows in self._new_blocks(output) for page in rows}
            self.worker.lost = [*given - {0}, *(block.block_id for block in free if block.block_hash is None)]
            assert all(blocks[page].ref_cnt for page in given)
            self.in_flight.append((output, self.worker.run(output)))
        at_most = int(self.asynchronous) if output.total_num_scheduled_tokens else 0
        while len(self.in_flight) > at_most:
            self._take_in()
        return output

    def finish(self, limit: int = 3000) -> None:
        """Steps until all requests are done, and checks that nothing is left behind."""
        for _ in range(limit):
            requests = self.scheduler.has_unfinished_requests() or (
                self.scheduler.connector and self.scheduler.requests
            )
            if not requests and not self.in_flight:
                break
            self.step()
        else:
            left = {name: r.num_computed_tokens for name, r in self.requests.items() if not r.is_finished()}
            raise AssertionError(f"requests never finish: {left} (tokens computed), {self.free_blocks} blocks free")
        self.check_nothing_is_left()

    def check_nothing_is_left(self) -> None:
        """Raises AssertionError where a block or a note outlives its request."""
        if connector := self.scheduler.connector:
            self.step()  # vLLM takes one more, in which a connector does what is left
            self._take_in()
            self.worker.threads.run(1000)
            transfers, prefixes = self.worker.transfers, connector.prefixes  # type: ignore[attr-defined]
            for left in (transfers._loads, prefixes._found, prefixes._loading, prefixes._failed, prefixes._step.loads):
                assert not left
        assert self.free_blocks == self.manager.block_pool.num_gpu_blocks - 1
        shadow, exact, slots = self.managers
        of_slots = (slots._with_hit, slots._never_decode, slots._missing)
        of_files = (shadow._reading, exact._reading, shadow._published, shadow._sealed)
        for notes in (shadow._scheduled, exact._scheduled, exact._prefill_end, exact._processed, *of_slots, *of_files):
            assert not notes
        for manager in (shadow, exact, slots):
            assert not any(manager.req_to_blocks.values())

    def rows(self, request: Request) -> tuple[list[int], ...]:
        """The request's block ids, by group."""
        return self.manager.get_block_ids(request.request_id)

    def _new_blocks(self, output: SchedulerOutput) -> Iterator[list[int]]:
        """What requests are given in a step, group by group, without what they hit."""
        cached = output.scheduled_cached_reqs
        admitted = [(new.req_id, new.block_ids) for new in output.scheduled_new_reqs]
        for name, given in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                assert given is not None
                admitted.append((name, given))
            else:
                yield from given or ()
        sizes = self.config.block_size, self.config.exact_tokens_per_page
        for name, (shadow, exact, slots) in admitted:
            yield shadow[self.hits[name] // sizes[0] :]
            yield exact[self.hits[name] // sizes[1] :]
            yield slots

    def _take_in(self) -> None:
        if self.in_flight:
            self.scheduler.update_from_output(*self.in_flight.popleft())


class Row:
    """A request as the worker knows it."""

    def __init__(self, prompt: list[int], block_ids: tuple[list[int], ...], computed: int) -> None:
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.prefill_end = len(prompt)
        self.marks = list[int]()
        self.blocks = [list(ids) for ids in block_ids]
        self.computed = computed

    def mark(self, position: int) -> int:
        """What keys and values of a token are here: a number that depends on all tokens up to it."""
        while len(self.marks) <= position:
            last = self.marks[-1] if self.marks else 1
            self.marks.append(hash((last, self.tokens[len(self.marks)])))
        return self.marks[position]


class Worker:
    """Plans, seals, writes and reads as a worker does, with marks in place of keys and values."""

    def __init__(
        self,
        config: ShadowKVConfig,
        boundary: ExactBoundary,
        num_blocks: int,
        slot_pages: int,
        max_rows: int,
        runner: str,
        zeroed: bool = False,
        files: Files | None = None,
    ) -> None:
        layout = plan_page(config, num_kv_heads=4, head_size=64, dtype=torch.float32)
        self.layout, self.slot_pages = layout, slot_pages
        self.block, self.page = layout.block_size, layout.exact_tokens
        self.boundary, self.runner = boundary, runner
        self.content: list[tuple[str, Any]] = [("nothing", None)] * num_blocks
        """Of every page: "exact" or "shadow" and the marks of its tokens, or "slots" and the request they are of."""
        self.lost: list[int] = []
        """Pages that the managers have freed without a hash, or given away, in this step."""
        self.gone: set[int] = set()
        """Such pages, once the step has sealed what it must, until they are written: any step may do that, so that only
        what asks for their epochs may read them."""
        self.losing: set[int] = set()
        """Such pages that others are still to be sealed from."""
        self.free: set[int] = set()
        """Pages that nobody owns in this step."""
        self.slots: dict[int, dict[tuple[int, int], list[int]]] = {}
        """Of every slot page, the marks of the chunk at each KV head and place. The tags in the page are real ones."""
        self.draw = random.Random(0)
        self.rows: dict[str, Row] = {}
        self.names: list[str] = []
        """Requests of the last step, in the order of its rows."""
        self.known: dict[str, Row] = {}
        """All rows that ever were; a request that is aborted before it runs has none."""
        pages = torch.zeros(num_blocks, layout.page_bytes, dtype=torch.uint8)
        memory = SimpleNamespace(
            layout=layout,
            pages=pages,
            exact_views=layout.exact_views(pages),
            slot_pages=pages,
            host_pool=torch.zeros(num_blocks, 8 * self.block, dtype=torch.uint8),
            worker=self,
        )
        self.bound = SimpleNamespace(
            boundary=boundary,
            state=BlockState(num_blocks, self.block // self.page, torch.device("cpu")),
            memories={"layer": memory},
            exact_start=torch.zeros(max_rows, dtype=torch.int32),
            slots=SlotCounts(torch.device("cpu")),
            due=DueBlocks(),
            reading={},
        )
        self.tables: list[torch.Tensor] = []
        """Of the last step, which on a CPU are overwritten by the next."""
        geometry: Any = SimpleNamespace(
            layout=layout,
            boundary=boundary,
            slot_pages_per_request=slot_pages,
            max_drafts=0,
            pages_are_zeroed=zeroed,
            saves_blocks=files is not None,
            has_resident_pages=config.resident_pages and not zeroed,
        )
        memory_of_worker: Any = SimpleNamespace(bind=lambda: self.bound)
        attention: Any = SimpleNamespace(
            plan=lambda batch: None,
            decodes_densely=runner == "v2-cuda",
            reads_unwritten_values=True,
        )
        self.planner = Planner(geometry, memory_of_worker, attention, StepCounts())
        sealer: Any = self.planner._sealer
        seal_due, seal = sealer.seal_due, sealer.seal

        def seal_due_and_lose(bound: Any) -> None:
            assert not (zeroed and bound.due), "seals from pages that may be zeroed"
            seal_due(bound)
            self._lose()

        def seal_and_lose(bound: Any, *args: Any, **kwargs: Any) -> None:
            seal(bound, *args, **kwargs)
            self._lose()

        sealer.seal_due, sealer.seal = seal_due_and_lose, seal_and_lose
        self.threads = Late()
        if files is not None:
            rank, labels = Rank(files, "0"), {"model_name": "simulation", "engine": "0"}  # type: ignore[arg-type]
            store: Any = files
            self.transfers = Transfers(
                self.planner, memory_of_worker, layout, store, rank, self.threads, self.threads, labels
            )
        self.loaded = self.unread = 0
        """Requests that waited for files, and those that computed what they waited for."""
        self.decoded = 0
        """Rows that decoded over sealed blocks."""
        self.prefilled_over_sealed = 0
        self.filled = self.kept = 0
        """Chunks that were read from a slot: filled in that step, or still there."""
        self.sealed = 0
        self.resident_chunks = self.resident_tokens = 0
        """Read from pages that nobody has: chunks into slots, tokens by prefills."""

    def run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """One step."""
        metadata: Any = output.kv_connector_metadata
        if metadata is not None:
            self.threads.run(self.draw.choice([0, 0, 1, 3, 100]))
        if not output.total_num_scheduled_tokens:
            self._update(output)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sealing, "seal_blocks", _seal)
                return ModelRunnerOutput.with_kv_conn_output_only(self._transfer(metadata))
        computed = self._compute(output)
        if metadata is not None:
            computed.kv_connector_output = self._transfer(metadata)
        return computed

    def _transfer(self, metadata: StepTransfers) -> KVConnectorOutput:
        """What the connector does after a step."""
        state = self.bound.state
        loading = {block for blocks in metadata.loads.values() for _, block in blocks}
        for block in loading:
            self.content[block] = ("loading", None)
            self.slots.pop(block, None)
            self.gone.discard(block)
        for block_hash, block in metadata.saves:
            assert self.content[block][0] == "shadow" or block in self.bound.due, f"saves {block}, {block_hash!r}"
        self.transfers.begin(metadata)
        waiting = {name: [block for _, block in blocks] for name, (blocks, _) in self.transfers._loads.items()}
        loaded, failed = self.transfers.finish_loads()
        self.loaded += len(loaded)
        self.unread += len(failed)
        (memory,) = self.bound.memories.values()
        for block in (block for name in loaded for block in waiting[name]):
            assert state.sealed[block]
            marks = memory.host_pool[block].view(torch.int64).tolist()
            assert marks == memory.pages[block][: 8 * self.block].view(torch.int64).tolist(), "half a block"
            self.content[block] = ("shadow", marks)
        return KVConnectorOutput(finished_recving=loaded | failed, failed_recving=failed)

    def _compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """The model's part of a step."""
        self._update(output)
        names = self.names = [name for name in self.rows if name in output.num_scheduled_tokens]
        self.draw.shuffle(names)  # rows are in any order
        counts = [output.num_scheduled_tokens[name] for name in names]
        rows = [self.rows[name] for name in names]
        self.planner.counts.wants_used_blocks = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sealing, "seal_blocks", _seal)
            step = self._plan(rows, counts)
        blocks = {block for row in rows for block in row.blocks[0]}
        self.bound.state.check_integrity(torch.tensor(sorted(blocks)))
        self._write(rows, counts, step)
        decoding = self._take_slots(names, rows, counts, step)
        for index, (name, row, count) in enumerate(zip(names, rows, counts, strict=True)):
            self._read(name, row, row.computed + count, *self._exact_part(index, row, counts, step))
        self.prefilled_over_sealed += len(step.prefills)
        if decoding:
            self._read_slots(step.decode[0].rows, decoding)
        self._check_counts(rows)
        sampled = []
        for name, row, count in zip(names, rows, counts, strict=True):
            row.computed += count
            sampled.append([hash((name, row.computed)) % 500 + 3] if row.computed == len(row.tokens) else [])
            row.tokens += sampled[-1]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
        )

    def _update(self, output: SchedulerOutput) -> None:
        for name in output.finished_req_ids:
            self.rows.pop(name, None)
        for new in output.scheduled_new_reqs:
            assert new.prompt_token_ids is not None
            row = Row(new.prompt_token_ids, new.block_ids, new.num_computed_tokens)
            self.rows[new.req_id] = self.known[new.req_id] = row
        cached = output.scheduled_cached_reqs
        for name, block_ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            row = self.rows[name]
            if name in cached.resumed_req_ids:
                assert block_ids is not None
                row.blocks = [list(ids) for ids in block_ids]
                row.computed, row.prefill_end = computed, len(row.tokens)
            elif block_ids is not None:
                for held, more in zip(row.blocks, block_ids, strict=True):
                    held.extend(more)
            assert row.computed == computed

    def _plan(self, rows: list[Row], counts: list[int]) -> Step:
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        prefill_ends = [row.num_prompt if self.runner == "v1" else row.prefill_end for row in rows]
        positions = [
            (row, position)
            for row, count in zip(rows, counts, strict=True)
            for position in range(row.computed, row.computed + count)
        ]
        slots = [row.blocks[1][at // self.page] * self.page + at % self.page for row, at in positions]
        seq_lens = torch.tensor([row.computed + n for row, n in zip(rows, counts, strict=True)]).int()
        common = {
            "num_reqs": len(rows),
            "num_actual_tokens": len(positions),
            "query_start_loc": starts,
            "query_start_loc_cpu": starts,
            "seq_lens": seq_lens,
            "seq_lens_cpu_upper_bound": seq_lens,
            "is_prefilling": torch.tensor([row.computed < end for row, end in zip(rows, prefill_ends, strict=True)]),
            "slot_mapping": torch.tensor(slots),
        }
        for table in self.tables:
            table.fill_(-1)
        self.tables.clear()
        for index, group in enumerate(("shadow", "exact", "slots")):
            table = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(row.blocks[index] + [0] * 4, dtype=torch.int32) for row in rows], batch_first=True
            )
            self.tables.append(table)
            step = self.planner.add(
                group,
                SimpleNamespace(block_table_tensor=table, **common),  # type: ignore[arg-type]
                capturing=False,
            )
        widths = {batch.rows.block_table.shape[1] for batch in step.decode}
        assert all(width <= self.boundary.max_sealed_blocks for width in widths), "the scratch memory has no room"
        return step

    def _check_counts(self, rows: list[Row]) -> None:
        """What the planner counts, against what the pages hold."""
        counts, size = self.planner.counts, self.block
        assert counts.sealed_prefills == self.prefilled_over_sealed
        assert counts.sealed_blocks == self.sealed
        if not counts.wants_used_blocks:  # it has read the block tables
            # A block that is still to be computed, or sealed, may have the same bytes from a life before.
            held = {
                block
                for row in rows
                for number, block in enumerate(row.blocks[0][: row.computed // size])
                if self.content[block] == ("shadow", row.marks[number * size : (number + 1) * size])
                and block not in self.bound.due
            }
            assert counts.used_blocks == len(held)

    def _lose(self) -> None:
        """The step has sealed; pages may be lost from now on, but those that others are to be sealed from only then."""
        kept = {page for page in self.losing.union(self.lost) if self.bound.due.of_pages([page])}
        self.gone |= self.losing.union(self.lost) - kept
        self.losing = kept

    def seal(self, block: int, exact: list[int]) -> None:
        """Copies exact pages to a shadow page."""
        self.sealed += 1
        intact = (self.content[page][0] == "exact" and page not in self.gone for page in exact)
        assert all(intact), "seals what is no exact page"
        self.slots.pop(block, None)
        self.gone.discard(block)
        marks = [mark for page in exact for mark in self.content[page][1]]
        self.content[block] = ("shadow", marks)
        (memory,) = self.bound.memories.values()
        memory.host_pool[block] = torch.tensor(marks).view(torch.uint8)
        memory.pages[block][: 8 * self.block] = memory.host_pool[block]

    def _write(self, rows: list[Row], counts: list[int], step: Step) -> None:
        marks = [
            row.mark(position)
            for row, count in zip(rows, counts, strict=True)
            for position in range(row.computed, row.computed + count)
        ]
        for slot, mark in zip(step.slot_mapping.tolist(), marks, strict=True):
            page, offset = divmod(slot, self.page)
            assert page > 0, "writes to the null block"
            assert page not in self.free, "writes to a page that nobody owns"
            self.slots.pop(page, None)
            kind, held = self.content[page]
            if kind != "exact" or page in self.gone:
                self.gone.discard(page)
                held = [0] * self.page
                self.content[page] = ("exact", held)
            held[offset] = mark

    def _exact_part(self, index: int, row: Row, counts: list[int], step: Step) -> tuple[int, list[int], int]:
        """From where on a row reads exact pages, and which: as its prefill says, or as its boundary, which is third."""
        boundary, first = int(self.bound.exact_start[index]), sum(counts[:index])
        start, exact_row = boundary, row.blocks[1]
        for prefill in step.prefills:
            if prefill.tokens.start == first:
                start, exact_row = prefill.exact_start, prefill.exact_row.tolist()
        if step.dense is not None:
            tokens = step.dense.tokens
            begins = step.dense.query_start_loc[:-1]
            begins = begins.tolist() if tokens is None else tokens[begins.long()].tolist()
            if first in begins:
                start, exact_row = 0, step.dense.block_table[begins.index(first)].tolist()
        self.resident_tokens += boundary - start
        if start < boundary:
            assert (
                row.blocks[1][boundary // self.page :]
                == exact_row[boundary // self.page :][: len(row.blocks[1]) - boundary // self.page]
            )
        return start, exact_row, boundary

    def _read(self, name: str, row: Row, seq_len: int, start: int, exact_row: list[int], boundary: int) -> None:
        assert start % self.block == 0
        row.mark(seq_len - 1)
        for kind, size, table, first, end in (
            ("shadow", self.block, row.blocks[0], 0, start),
            ("exact", self.page, exact_row, start, seq_len),
        ):
            for at in range(first, end, size):
                marks = row.marks[at : min(at + size, end)]
                held_kind, held = self.content[table[at // size]]
                if table[at // size] in self.gone and (kind == "shadow" or at >= boundary):
                    held_kind = "freed"
                if held_kind != kind or held[: len(marks)] != marks:
                    raise AssertionError(
                        f"{name} reads tokens from {at} on, of {seq_len} (exact from {start}), in a page that holds "
                        + ("other tokens" if held_kind == kind else f"{held_kind} content")
                    )

    def _take_slots(self, names: list[str], rows: list[Row], counts: list[int], step: Step) -> list[Row]:
        """The rows that decode over sealed blocks, whose slots overwrite what their pages were."""
        if not step.decode:
            return []
        batch = step.decode[0]
        first_tokens = [sum(counts[:index]) for index in range(len(rows))]
        tokens = first_tokens if batch.tokens is None else batch.tokens.tolist()
        decoding = [rows[first_tokens.index(token)] for token in tokens]
        sparse = batch.rows.exact_start > 0
        self.decoded += int(sparse.sum())
        taken = batch.rows.slot_table[sparse].flatten().tolist()
        assert 0 not in taken, "a row that attends to sealed blocks lacks slots"
        assert len(set(taken)) == len(taken), "two rows share a slot page"
        for row, reads_slots in zip(decoding, sparse.tolist(), strict=True):
            for page in row.blocks[2] if reads_slots else ():
                self.content[page] = ("slots", names[rows.index(row)])
                self.gone.discard(page)
        return decoding

    def _read_slots(self, rows: DecodeRows, decoding: list[Row]) -> None:
        """Some chunks of every row, drawn at random, through the real tags; contents are marks."""
        layout, state = self.layout, self.bound.state
        per_page, heads, width = layout.slots_per_page, layout.num_kv_heads, layout.slots_per_page * self.slot_pages
        chunk_ids = torch.full((len(decoding), heads, width), -1, dtype=torch.int32)
        for row, start in enumerate(rows.exact_start.tolist()):
            chunks = range(start // layout.chunk_size)
            for head in range(heads):
                chosen = sorted(self.draw.sample(chunks, min(len(chunks), width)))
                chunk_ids[row, head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        slot_ids, misses = torch.empty_like(chunk_ids), torch.empty_like(chunk_ids)
        num_misses = torch.empty(chunk_ids.shape[:2], dtype=torch.int32)
        pages = self.bound.memories["layer"].slot_pages
        ops.plan_slots(
            chunk_ids, rows.block_table, state.epochs, state.clock, rows.slot_table, pages, layout,
            slot_ids, misses, num_misses, slot_counts := torch.zeros(4, dtype=torch.int64),
        )  # fmt: skip
        wanted, found, *_ = slot_counts.tolist()
        assert wanted == int((chunk_ids >= 0).sum())
        assert found == wanted - int(num_misses.sum())
        chosen = (chunk_ids >= 0).nonzero().tolist()
        for row, head, place in chosen:
            chunk, slot, missed = chunk_ids[row, head, place], slot_ids[row, head, place], misses[row, head]
            assert slot >= 0, "a selected chunk got no slot"
            first = int(chunk) * layout.chunk_size
            contents = self.slots.setdefault(int(rows.slot_table[row, slot // per_page]), {})
            key = head, int(slot) % per_page
            if place in missed:
                block, place = decoding[row].blocks[0][first // self.block], first % self.block
                source = int(state.resident(torch.tensor([block]))[0, place // self.page])
                if source:
                    kind, held = self.content[source]
                    assert kind == "exact", f"a source that holds {kind} passes for resident"
                    contents[key] = held[place % self.page :][: layout.chunk_size]
                    self.resident_chunks += 1
                else:
                    contents[key] = self.content[block][1][place:][: layout.chunk_size]
                self.filled += 1
            else:
                self.kept += 1
            assert contents.get(key) == decoding[row].marks[first : first + layout.chunk_size], "a slot is stale"


def _seal(memories: list[Any], block_ids: torch.Tensor, exact_ids: torch.Tensor, first_positions: torch.Tensor) -> None:
    (memory,) = memories
    for block, exact, first in zip(block_ids.tolist(), exact_ids.tolist(), first_positions.tolist(), strict=True):
        assert first % memory.layout.block_size == 0
        memory.worker.seal(block, exact)
