"""plan_slots against the reference, byte for byte: outputs and slot pages, over many steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import generators
import pytest
import torch
from numeric import assert_bytes_equal
from torch import Generator, Tensor

from vllm_shadowkv import ops, reference
from vllm_shadowkv.page import PageLayout

NUM_PAGES = 64


@dataclass
class State:
    """What lives from step to step, and the outputs of the last one."""

    layout: PageLayout
    block_table: Tensor
    epochs: Tensor
    clock: Tensor
    slot_table: Tensor
    slot_pages: Tensor
    chunk_ids: Tensor
    slot_ids: Tensor
    misses: Tensor
    num_misses: Tensor
    counts: Tensor

    def run(self, function=ops.plan_slots) -> None:
        function(
            self.chunk_ids, self.block_table, self.epochs, self.clock, self.slot_table, self.slot_pages,
            self.layout, self.slot_ids, self.misses, self.num_misses, self.counts,
        )  # fmt: skip

    def run_both(self) -> None:
        """The kernel on this state, the reference on a copy; every byte must agree."""
        copy = replace(self, **{name: getattr(self, name).clone() for name in ("slot_pages", "slot_ids", "misses")})
        copy.num_misses, copy.counts = self.num_misses.clone(), self.counts.clone()
        self.run()
        copy.run(reference.plan_slots)
        for name in ("slot_ids", "misses", "num_misses", "slot_pages", "counts"):
            assert_bytes_equal(getattr(self, name), getattr(copy, name), name)

    def step(self, chunk_ids: Tensor) -> None:
        """The next step, with these chunks."""
        self.clock += 1
        self.chunk_ids = chunk_ids
        before, counts = self.contents(), self.counts.clone()
        self.run_both()
        self.check_invariants(before, (self.counts - counts).tolist())

    def contents(self) -> dict[tuple[int, int, int], int]:
        """(row, head, tag) -> slot, of what the slots hold now."""
        found = {}
        tags = self.layout.view(self.slot_pages, "slot_tags")
        epochs = self.layout.view(self.slot_pages, "slot_epoch")
        for row, pages in enumerate(self.slot_table.long()):
            if not ((pages > 0) & (pages < len(self.slot_pages))).all():
                continue
            for head in range(self.layout.num_kv_heads):
                row_tags = tags[pages, head].masked_fill((epochs[pages] != self.epochs[pages])[:, None], 0).flatten()
                for slot, tag in reversed(list(enumerate(row_tags.tolist()))):
                    if tag:
                        found[row, head, tag] = slot
        return found

    def check_invariants(self, before: dict[tuple[int, int, int], int], counts: list[int]) -> None:
        """Written without the reference: a chunk has the slot that held it, else one that this step did not use."""
        after, placed, filled = self.contents(), 0, 0
        for row in range(len(self.chunk_ids)):
            for head in range(self.layout.num_kv_heads):
                chunks, slots = self.chunk_ids[row, head].tolist(), self.slot_ids[row, head].tolist()
                used = [slot for slot in slots if slot >= 0]
                assert len(used) == len(set(used)), "two chunks share a slot"
                missed = []
                for place, (chunk, slot) in enumerate(zip(chunks, slots, strict=True)):
                    if slot < 0:
                        continue
                    block = int(self.block_table[row, chunk // self.layout.chunks])
                    tag = int(self.epochs[block]) * self.layout.chunks + chunk % self.layout.chunks
                    assert after[row, head, tag] == slot, "the tag does not say what the slot holds"
                    if (row, head, tag) in before:
                        assert before[row, head, tag] == slot, "a hit moved"
                    else:
                        missed.append(place)
                count = int(self.num_misses[row, head])
                placed, filled = placed + len(used), filled + count
                assert self.misses[row, head, :count].tolist() == missed
                assert (self.misses[row, head, count:] == -1).all()
        assert counts[1:] == [placed - filled, 0, 0], "not the hits"
        assert counts[0] >= placed


def make_state(
    generator: Generator,
    *,
    rows: int = 3,
    heads: int = 2,
    columns: int = 12,
    pages_per_row: int = 3,
    max_blocks: int = 4,
    chunk_size: int = 8,
) -> State:
    layout = generators.make_layout(heads, 64, chunk_size=chunk_size)
    ids = (torch.randperm(NUM_PAGES - 1, generator=generator) + 1).int()
    taken = rows * pages_per_row
    return State(
        layout=layout,
        block_table=ids[taken : taken + rows * max_blocks].view(rows, max_blocks).clone(),
        epochs=torch.randperm(1000, generator=generator)[:NUM_PAGES] + 1,
        clock=torch.tensor([5]),
        slot_table=ids[:taken].view(rows, pages_per_row).clone(),
        slot_pages=generators.garbage_pages(generator, NUM_PAGES, layout.page_bytes),
        chunk_ids=torch.full((rows, heads, columns), -1, dtype=torch.int32),
        slot_ids=torch.full((rows, heads, columns), 77, dtype=torch.int32),
        misses=torch.full((rows, heads, columns), 77, dtype=torch.int32),
        num_misses=torch.full((rows, heads), 77, dtype=torch.int32),
        counts=torch.tensor([2**40, 3, 77, 5]),
    )


def pick(generator: Generator, state: State, *, drift: float = 0.3, most: int | None = None) -> Tensor:
    """Chunk ids of a step: most of the last step's, some new ones, ascending, then -1."""
    rows, heads, columns = state.chunk_ids.shape
    total = state.block_table.shape[1] * state.layout.chunks
    result = torch.full_like(state.chunk_ids, -1)
    for row in range(rows):
        for head in range(heads):
            last = state.chunk_ids[row, head]
            last = last[last >= 0]
            kept = last[torch.rand(len(last), generator=generator) > drift]
            new = torch.randperm(total, generator=generator).int()
            count = int(torch.randint(0, (most or columns) + 1, (1,), generator=generator))
            ids = torch.cat((kept, new[~torch.isin(new, kept)]))[:count].sort().values
            result[row, head, : len(ids)] = ids
    return result


@pytest.mark.parametrize("seed", range(6))
def test_many_random_steps(seed: int) -> None:
    generator = generators.make_generator("steps", seed)
    columns = (1, 5, 12, 20, 21, 21)[seed]  # 21 slots in a row
    chunk_size = 16 if seed == 2 else 8
    state = make_state(generator, columns=min(columns, 9) if chunk_size == 16 else columns, chunk_size=chunk_size)
    for step in range(25):
        state.step(pick(generator, state, drift=(0.0, 0.1, 0.5, 1.0)[step % 4]))
        if step % 5 == 4:  # a block is sealed anew, a slot page is given to somebody else and back
            state.epochs[int(state.block_table[0, 1])] += 1000
            state.epochs[int(state.slot_table[1, 2])] += 1000


def test_the_last_steps_chunks_hit_and_keep_their_slots() -> None:
    generator = generators.make_generator("hits")
    state = make_state(generator)
    chunks = pick(generator, state)
    chunks[0, 0] = torch.arange(12) * 3
    state.step(chunks)
    assert int(state.num_misses.sum()) == int((chunks >= 0).sum()), "garbage pages held something"
    slots = state.slot_ids.clone()
    state.step(chunks.clone())
    assert int(state.num_misses.sum()) == 0
    assert torch.equal(state.slot_ids, slots)
    state.step(chunks.flip(-1).contiguous())
    assert torch.equal(state.slot_ids, slots.flip(-1))


def test_victims_are_the_least_recently_used() -> None:
    state = make_state(generators.make_generator("lru"), rows=1, heads=1, columns=7, pages_per_row=2)
    assert state.layout.slots_per_page * 2 == 14

    def step(*chunks: int) -> list[int]:
        ids = torch.full((1, 1, 7), -1, dtype=torch.int32)
        ids[0, 0, : len(chunks)] = torch.tensor(chunks, dtype=torch.int32)
        state.step(ids)
        return state.slot_ids[0, 0, : len(chunks)].tolist()

    assert step(10, 11, 12, 13, 14, 15, 16) == [0, 1, 2, 3, 4, 5, 6], "empty slots, the lower first"
    assert step(20, 21, 22, 23, 24, 25, 26) == [7, 8, 9, 10, 11, 12, 13]
    assert step(11, 13, 26) == [1, 3, 13], "hits"
    assert step(30, 31) == [0, 2], "the oldest of those that were not hit"
    assert step(11, 32, 33, 34) == [1, 4, 5, 6]
    assert step(20, 40, 41, 42, 43, 44, 45) == [7, 8, 9, 10, 11, 12, 3], "never one of this step's own"


def test_a_new_epoch_of_the_block_is_another_chunk() -> None:
    generator = generators.make_generator("block epoch")
    state = make_state(generator, rows=2)
    chunks = torch.arange(12, dtype=torch.int32).expand(2, 2, 12).contiguous()  # all of block 0
    state.step(chunks)
    state.step(chunks)
    assert int(state.num_misses.sum()) == 0
    state.epochs[int(state.block_table[0, 0])] += 5000
    state.step(chunks)
    assert state.num_misses.tolist() == [[12, 12], [0, 0]]


def test_a_new_epoch_of_a_slot_page_empties_it() -> None:
    generator = generators.make_generator("page epoch")
    state = make_state(generator, rows=1, columns=21)
    chunks = torch.arange(21, dtype=torch.int32).expand(1, 2, 21).contiguous()
    state.step(chunks)
    state.epochs[int(state.slot_table[0, 1])] += 5000
    state.step(chunks)
    assert state.num_misses.tolist() == [[7, 7]]
    assert state.misses[0, 0, :7].tolist() == list(range(7, 14))


def test_shared_blocks_do_not_share_slots() -> None:
    generator = generators.make_generator("shared prefix")
    state = make_state(generator, rows=2)
    state.block_table[1] = state.block_table[0]
    chunks = torch.arange(12, dtype=torch.int32).expand(2, 2, 12).contiguous()
    state.step(chunks)
    assert state.num_misses.tolist() == [[12, 12], [12, 12]]


@pytest.mark.parametrize("bad", [0, -1, NUM_PAGES, 2**31 - 1, -(2**31)])
def test_a_row_with_an_invalid_slot_page_gets_no_slots(bad: int) -> None:
    generator = generators.make_generator("null slot page", bad)
    state = make_state(generator)
    state.slot_table[1, 2] = bad
    pages = state.slot_pages.clone()
    chunks = torch.arange(12, dtype=torch.int32).expand(3, 2, 12).contiguous()
    state.step(chunks)
    assert (state.slot_ids[1] == -1).all()
    assert (state.misses[1] == -1).all()
    assert state.num_misses.tolist() == [[12, 12], [0, 0], [12, 12]]
    other = state.slot_table[1, :2].long()
    assert_bytes_equal(state.slot_pages[other], pages[other], "a page of the row")


@pytest.mark.parametrize("bad", [0, -5, NUM_PAGES, 2**31 - 1])
def test_a_chunk_of_an_invalid_block_gets_no_slot(bad: int) -> None:
    generator = generators.make_generator("bad block", bad)
    state = make_state(generator, rows=1, max_blocks=2, columns=4)
    state.block_table[0, 1] = bad
    chunks = state.layout.chunks
    state.step(torch.tensor([3, chunks, chunks + 1, 2 * chunks], dtype=torch.int32).expand(1, 2, 4).contiguous())
    assert (state.slot_ids[0, 0] >= 0).tolist() == [True, False, False, False]
    assert state.num_misses.tolist() == [[1, 1]]
    huge = torch.tensor([-(2**31), 2, 2**31 - 1, 2**20], dtype=torch.int32)
    state.step(huge.expand(1, 2, 4).contiguous())
    assert (state.slot_ids[0, 1] >= 0).tolist() == [False, True, False, False]


def test_more_chunks_than_slots_leave_the_last_ones_out() -> None:
    generator = generators.make_generator("too many")
    state = make_state(generator, rows=1, columns=10, pages_per_row=1)
    chunks, counts = torch.arange(10, dtype=torch.int32).expand(1, 2, 10).contiguous(), state.counts.clone()
    state.step(chunks)
    assert state.slot_ids[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1, -1]
    assert state.num_misses.tolist() == [[7, 7]]
    assert (state.counts - counts).tolist() == [20, 0, 0, 0]
    assert int(state.num_misses.sum()) == 14, "6 were left out"
    state.run_both()  # the same clock again: everything that is used stays
    assert state.num_misses.tolist() == [[0, 0]]


def test_many_slots() -> None:
    # Several slots and columns per thread of a CTA, whose number is no power of two.
    generator = generators.make_generator("many slots")
    state = make_state(generator, rows=1, heads=1, columns=330, pages_per_row=50, max_blocks=12)
    for step in range(4):
        state.step(pick(generator, state, drift=(0.2, 0.9)[step % 2], most=330))


def test_stamps_order_up_to_2_to_the_50() -> None:
    state = make_state(generators.make_generator("stamps"), rows=1, heads=1, columns=7, pages_per_row=2)
    state.step(torch.arange(7, dtype=torch.int32).view(1, 1, 7))
    stamps = [2**50 - 2, 3, 2**33, 2**33 - 1, 2**32, 1, 2**50 - 3, 2, 9, 2**49, 2**31, 7, 8, 4]
    pages = state.slot_table[0].long()
    state.layout.view(state.slot_pages, "slot_epoch")[pages] = state.epochs[pages]
    state.layout.view(state.slot_pages, "slot_used")[pages] = torch.tensor(stamps).view(2, 1, 7)
    state.clock[:] = 2**50 - 2
    state.step(torch.arange(20, 27, dtype=torch.int32).view(1, 1, 7))
    assert state.slot_ids[0, 0].tolist() == [5, 7, 1, 13, 11, 12, 8]


def test_equal_tags_hit_the_lower_slot() -> None:
    state = make_state(generators.make_generator("equal tags"), rows=1, heads=1, columns=4)
    state.step(torch.tensor([[[3, 4, 5, 6]]], dtype=torch.int32))
    tags = state.layout.view(state.slot_pages, "slot_tags")
    pages = state.slot_table[0].long()
    tags[pages[2], 0, 1:5] = tags[pages[0], 0, :4].flip(-1)
    tags[pages[1], 0] = tags[pages[0], 0, 0] + 100
    state.step(torch.tensor([[[3, 4, 7, 6]]], dtype=torch.int32))
    assert state.slot_ids[0, 0].tolist() == [0, 1, 4, 3]


def test_no_chunks_touch_nothing() -> None:
    state = make_state(generators.make_generator("nothing"))
    pages = state.slot_pages.clone()
    state.step(torch.full_like(state.chunk_ids, -1))
    assert_bytes_equal(state.slot_pages, pages, "slot_pages")
    assert (state.slot_ids == -1).all()
    assert (state.misses == -1).all()
    assert (state.num_misses == 0).all()


def test_no_rows_no_columns_no_pages() -> None:
    state = make_state(generators.make_generator("empty"))
    rows = {n: getattr(state, n)[:0] for n in ("chunk_ids", "block_table", "slot_table", "slot_ids", "misses")}
    replace(state, **rows, num_misses=state.num_misses[:0]).run()
    columns = {n: getattr(state, n)[:, :, :0].contiguous() for n in ("chunk_ids", "slot_ids", "misses")}
    none = replace(state, **columns)
    none.run_both()
    assert (none.num_misses == 0).all()
    state.chunk_ids[:] = 3
    pageless = replace(state, slot_table=state.slot_table[:, :0])
    pageless.run_both()
    assert (pageless.slot_ids == -1).all()


def test_strided_tables_and_pages() -> None:
    generator = generators.make_generator("strided")
    state = make_state(generator)
    chunks = pick(generator, state)
    wide = torch.full((3, 40), -9, dtype=torch.int32)
    wide[:, :4], wide[:, 10:13] = state.block_table, state.slot_table
    spread = torch.zeros(NUM_PAGES, 2 * state.layout.page_bytes, dtype=torch.uint8)
    spread[:, : state.layout.page_bytes] = state.slot_pages
    strided = replace(
        state, block_table=wide[:, :4], slot_table=wide[:, 10:13], slot_pages=spread[:, : state.layout.page_bytes],
        clock=state.clock.clone(), slot_ids=state.slot_ids.clone(), misses=state.misses.clone(),
        num_misses=state.num_misses.clone(), counts=state.counts.clone(),
    )  # fmt: skip
    for both in (state, strided):
        both.clock += 1
        both.chunk_ids = chunks
        both.run()
    for name in ("slot_ids", "misses", "num_misses", "slot_pages", "counts"):
        assert_bytes_equal(getattr(strided, name), getattr(state, name), name)


@pytest.mark.cpu_kernel
def test_opcheck() -> None:
    generator = generators.make_generator("opcheck")
    state = make_state(generator)
    state.chunk_ids = pick(generator, state)
    torch.library.opcheck(
        torch.ops.shadowkv.plan_slots.default,
        (
            state.chunk_ids, state.block_table, state.epochs, state.clock, state.slot_table, state.slot_pages,
            state.layout.ints, state.slot_ids, state.misses, state.num_misses, state.counts,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("chunk_ids", lambda t: t.long(), r"chunk_ids: expected dtype Int, got Long"),
        ("chunk_ids", lambda t: t[:, :1].contiguous(), r"chunk_ids: expected shape \[any, 2, any\], got \[3, 1, 12\]"),
        ("block_table", lambda t: t[:2], r"block_table: expected shape \[3, any\], got \[2, 4\]"),
        ("epochs", lambda t: t[:-1], r"epochs: expected shape \[64\], got \[63\]"),
        ("epochs", lambda t: t.int(), r"epochs: expected dtype Long, got Int"),
        ("clock", lambda t: t[0], r"clock: expected 1 dimensions \[1\], got 0 dimensions \[\]"),
        ("slot_table", lambda t: t.T.contiguous().T, r"slot_table: expected contiguous memory within a row, got"),
        ("slot_pages", lambda t: t[:, 64:].contiguous(), r"slot_pages: expected shape \[any, \d+\], got"),
        ("slot_ids", lambda t: t[:, :, :-1].contiguous(), r"slot_ids: expected shape \[3, 2, 12\], got \[3, 2, 11\]"),
        ("slot_ids", lambda t: t.mT.contiguous().mT, r"slot_ids: expected contiguous memory, got strides"),
        ("misses", lambda t: t.long(), r"misses: expected dtype Int, got Long"),
        ("num_misses", lambda t: t[:2], r"num_misses: expected shape \[3, 2\], got \[2, 2\]"),
        ("counts", lambda t: t[:3], r"counts: expected shape \[4\], got \[3\]"),
        ("counts", lambda t: t.int(), r"counts: expected dtype Long, got Int"),
        ("layout", lambda x: replace(x, slot_tags=4), r"layout: slot_tags must be \d+ bytes inside a page of \d+"),
        ("layout", lambda x: replace(x, slots_per_page=0), r"layout: slots_per_page must be positive, got 0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(name: str, change, message: str) -> None:
    state = make_state(generators.make_generator("errors"))
    state.run()  # the control
    setattr(state, name, change(getattr(state, name)))
    with pytest.raises(RuntimeError, match=message):
        state.run()


def test_unaligned_pages_are_refused() -> None:
    state = make_state(generators.make_generator("unaligned"))
    size = state.layout.page_bytes
    memory = torch.zeros(4 * size + 8, dtype=torch.uint8)
    state.epochs = state.epochs[:4]
    state.slot_pages = memory[: 4 * size].view(4, size)
    state.run()
    state.slot_pages = memory[4 : 4 * size + 4].view(4, size)
    with pytest.raises(RuntimeError, match="slot_pages: expected rows aligned to 8 bytes"):
        state.run()


def test_more_slots_than_the_cuda_kernel_takes(kernel: str) -> None:
    if kernel == "cpu":
        pytest.skip("the CPU kernel takes any number")
    state = make_state(generators.make_generator("too many slots"), rows=1)
    state.slot_table = torch.zeros(1, 878, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"slot_table: expected pages of at most 6144 slots per row, got 878 pages"):
        state.run()
    state.slot_table = state.slot_table[:, :877]
    state.run()
    assert (state.slot_ids == -1).all()


@pytest.mark.parametrize("num_pages", [300, 877])
def test_full_hash_tables(num_pages: int) -> None:
    # Random tags in every slot: chains of the CUDA kernel's table, up to its most slots.
    generator = generators.make_generator("full", num_pages)
    state = make_state(generator, rows=1, heads=1, columns=40, pages_per_row=1, max_blocks=4)
    layout = state.layout
    state.slot_pages = generators.garbage_pages(generator, 1, layout.page_bytes).expand(num_pages + 5, -1).contiguous()
    state.epochs = torch.randperm(5000, generator=generator)[: num_pages + 5] + 1
    state.block_table = torch.arange(num_pages + 1, num_pages + 5, dtype=torch.int32)[None]
    state.slot_table = (torch.randperm(num_pages, generator=generator).int() + 1)[None]
    layout.view(state.slot_pages, "slot_epoch")[:] = state.epochs
    known = state.epochs[state.block_table.long()] * layout.chunks
    tags = layout.view(state.slot_pages, "slot_tags")
    tags[:] = torch.randint(1, 2**40, tags.shape, generator=generator)
    tags[17, 0, 3], tags[num_pages, 0, 6] = known[0, 1] + 5, known[0, 2]
    for slot in (500, 1100):  # the higher one may come first into the table
        tags[state.slot_table[0, slot // layout.slots_per_page], 0, slot % layout.slots_per_page] = known[0, 3]
    layout.view(state.slot_pages, "slot_used")[:] = torch.randint(0, 5, tags.shape, generator=generator)
    ids = torch.full_like(state.chunk_ids, -1)
    ids[0, 0, :4] = torch.tensor([2, layout.chunks + 5, 2 * layout.chunks, 3 * layout.chunks])
    state.step(ids)
    assert state.slot_ids[0, 0, 3] == 500
    state.step(pick(generator, state, most=40))
