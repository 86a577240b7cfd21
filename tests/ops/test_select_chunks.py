"""select_chunks against the reference: forced chunks exactly, scored ones up to near ties."""

from __future__ import annotations

from dataclasses import dataclass, replace

import generators
import pytest
import torch
from torch import Tensor

from vllm_shadowkv import ops, reference
from vllm_shadowkv.config import LOCAL_CHUNKS, SINK_CHUNKS
from vllm_shadowkv.page import DTYPES, HEAD_SIZES, PageLayout

GROUPS = (1, 2, 3, 4, 7, 8, 9, 16)


@dataclass
class Case:
    query: Tensor
    pages: Tensor
    block_table: Tensor
    exact_start: Tensor
    seq_lens: Tensor
    scale: float
    budget: int
    layout: PageLayout
    columns: int

    def run(
        self, function=ops.select_chunks, budget: int | None = None, columns: int | None = None, **options: Tensor
    ) -> Tensor:
        shape = (len(self.query), self.layout.num_kv_heads, self.columns if columns is None else columns)
        guarded = torch.full((len(self.query) + 1, *shape[1:]), 12345, dtype=torch.int32)
        chunk_ids = guarded[:-1]
        function(
            self.query, self.pages, self.block_table, self.exact_start, self.seq_lens, self.scale,
            self.budget if budget is None else budget, self.layout, chunk_ids, **options,
        )  # fmt: skip
        assert (guarded[-1] == 12345).all(), "a write behind the ids"
        return chunk_ids

    def scores(self, row: int, head: int) -> Tensor:
        """fp64 `[chunks of the row]`, written independently of the reference."""
        layout = self.layout
        blocks = self.block_table[row, : int(self.exact_start[row]) // layout.block_size].long()
        usable = (blocks > 0) & (blocks < len(self.pages))
        blocks = blocks.where(usable, 0)
        marks = layout.view(self.pages, "landmarks")[blocks, head].double()
        marks = (marks * layout.view(self.pages, "landmark_scales")[blocks, head].double()[..., None]).flatten(0, 1)
        group = self.query.shape[1] // layout.num_kv_heads
        queries = self.query[row, head * group : (head + 1) * group].double()
        logits = (queries @ marks.T * self.scale).masked_fill(~usable.repeat_interleave(layout.chunks), -torch.inf)
        return torch.log_softmax(logits, -1).amax(0)

    def check(self) -> Tensor:
        """Runs the kernel, then compares it with the reference."""
        actual = self.run()
        expected = self.run(reference.select_chunks)
        forced = self.run(reference.select_chunks, budget=0, columns=self.columns - self.budget)
        assert torch.equal(actual >= 0, expected >= 0), "other counts, or a hole"
        for row in range(len(self.query)):
            for head in range(self.layout.num_kv_heads):
                ids, wanted = (x[row, head][x[row, head] >= 0].tolist() for x in (actual, expected))
                assert ids == sorted(set(ids)), "not ascending and unique"
                always = forced[row, head][forced[row, head] >= 0].tolist()
                assert set(always) <= set(ids), f"forced chunks are missing: {sorted(set(always) - set(ids))}"
                if ids == wanted:
                    continue
                scores = self.scores(row, head)
                extra, missing = sorted(set(ids) - set(wanted)), sorted(set(wanted) - set(ids))
                gap = scores[missing].max() - scores[extra].min()
                assert gap <= 1e-5 * scores[wanted].abs().max() + 1e-6, f"{missing} are better than {extra} by {gap}"
        return actual


def make_case(
    seed: object,
    layout: PageLayout,
    *,
    group: int = 4,
    blocks: tuple[int, ...] = (5, 0, 2),
    budget: int = 20,
    outliers: int = 3,
    structured: bool = False,
) -> Case:
    generator = generators.make_generator(seed)
    sealed = generators.make_sealed(generator, layout, blocks, structured=structured, exact_factors=False)
    rows = len(blocks)
    query = generators.randn(generator, rows, layout.num_kv_heads * group, layout.head_size, dtype=layout.dtype)
    open_tokens = generators.randint(generator, 1, layout.block_size, rows)
    return Case(
        query, sealed.pages, sealed.block_table, sealed.exact_start, sealed.exact_start + open_tokens,
        layout.head_size**-0.5, budget, layout, generators.num_columns(layout, 0, budget, outliers),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes_and_dtypes(head_size: int, dtype: torch.dtype) -> None:
    layout = generators.make_layout(2, head_size, dtype)
    make_case((head_size, dtype), layout, group=4).check()


@pytest.mark.parametrize("chunk_size", [8, 16])
@pytest.mark.parametrize("group", GROUPS)
def test_groups_and_chunk_sizes(group: int, chunk_size: int) -> None:
    dtype = torch.bfloat16 if chunk_size == 8 else torch.float16
    layout = generators.make_layout(2, 64, dtype, chunk_size=chunk_size, num_outliers=2)
    make_case((group, chunk_size), layout, group=group, blocks=(4, 0, 2), structured=True).check()


def test_exact_key_pages() -> None:
    make_case("rank 0", generators.exact_keys_layout(2, 128, torch.float16)).check()


def test_smallest_blocks() -> None:
    # 4 chunks in a block: fewer than a vector has lanes.
    layout = generators.make_layout(1, 64, block_size=64, chunk_size=16, compression=1)
    make_case("small", layout, blocks=(9, 1, 3), budget=5).check()


@pytest.mark.parametrize("block_size", [64, 192, 640])
def test_block_sizes(block_size: int) -> None:
    # 4, 12 and 40 chunks: tiles of 8 are cut, and there are more of them than warps.
    layout = generators.make_layout(2, 80, block_size=block_size, chunk_size=16, compression=1)
    make_case(block_size, layout, group=3, blocks=(4, 1), budget=7).check()


def test_long_context() -> None:
    layout = generators.make_layout(1, 64)
    case = make_case("long", layout, blocks=(4,), budget=300)
    columns = torch.randint(0, 4, (180,), generator=generators.make_generator("long table"))
    case.block_table = case.block_table[:, columns].contiguous()
    case.exact_start[:] = 180 * layout.block_size
    case.seq_lens = case.exact_start + 9
    case.check()


def test_wide_table() -> None:
    # csrc/cuda/select_chunks.cu: the outliers of so many blocks do not fit shared memory.
    layout = generators.make_layout(1, 64, num_outliers=3)
    case = make_case("wide", layout, group=1, blocks=(3, 2), budget=9, outliers=4)
    narrow = case.check()
    case.block_table = torch.cat((case.block_table, torch.ones(2, 3000, dtype=torch.int32)), -1)
    assert torch.equal(case.run(), narrow)


def test_more_blocks_than_ctas() -> None:
    # csrc/cuda/select_chunks.cu: from 8192 on, blocks * KV heads * rows share CTAs.
    layout = generators.make_layout(1, 64, block_size=64, chunk_size=16, compression=1, rank=16)
    make_case("many", layout, group=2, blocks=(67, *(0,) * 126, 1), budget=9).check()


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
def test_a_workspace_for_some_rows_gives_the_same(rows_at_once: int) -> None:
    layout = generators.make_layout(2, 64)
    case = make_case("workspace", layout, blocks=(2, 0, 3, 1, 2))
    size = ops.select_chunks_workspace(layout, rows_at_once, case.query.shape[1], case.block_table.shape[1])
    workspace = torch.full((size + 3,), torch.nan)
    assert torch.equal(case.run(workspace=workspace), case.check())
    assert workspace[-3:].isnan().all(), "a write behind the workspace"


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_threads_do_not_change_the_choice(rows: int) -> None:
    layout = generators.make_layout(1, 64, torch.bfloat16)
    case = make_case(rows, layout, blocks=(19,) + (3,) * (rows - 1), budget=40)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(case.check())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("budget", [0, 1, 63, 64, 500])
def test_budgets_up_to_more_than_the_context(budget: int) -> None:
    layout = generators.make_layout(2, 64)
    actual = make_case(budget, layout, blocks=(2, 3), budget=budget).check()
    if budget == 500:
        assert (actual[0] >= 0).sum(-1).tolist() == [2 * layout.chunks] * 2, "not the whole context"


@pytest.mark.parametrize("room", [0, 1, 4, 9, 50])
def test_outliers_up_to_the_room(room: int) -> None:
    layout = generators.make_layout(2, 64, num_outliers=3)
    case = make_case(room, layout, blocks=(3, 4), budget=2, outliers=room, structured=True)
    for row in range(2):
        for head in range(2):
            assert (case.run(budget=0, columns=5 + room)[row, head] >= 0).sum() <= SINK_CHUNKS + LOCAL_CHUNKS + room
    case.check()


def test_outliers_of_equal_cosines_are_the_lower_ids() -> None:
    layout = generators.make_layout(2, 64, num_outliers=3)
    case = make_case("equal cosines", layout, blocks=(3, 2), budget=0, outliers=4)
    layout.view(case.pages, "outlier_cosines")[:] = torch.tensor([0.5, -0.25, 0.5])
    layout.view(case.pages, "outlier_ids")[:] = torch.tensor([9, 20, 2], dtype=torch.int32)
    case.seq_lens = case.exact_start + 100
    chunks = layout.chunks
    assert case.check()[0, 1].tolist() == [0, 2, 20, chunks + 20, 2 * chunks + 20, -1, -1, -1, -1]
    assert case.check()[1, 0].tolist() == [0, 2, 9, 20, chunks + 20, -1, -1, -1, -1]


def test_outliers_of_a_page_of_garbage_stay_in_bounds() -> None:
    layout = generators.make_layout(2, 64, num_outliers=3)
    case = make_case("garbage", layout, blocks=(3,), budget=2)
    layout.view(case.pages, "outlier_ids")[:] = torch.tensor([-7, 2**31 - 1, layout.chunks], dtype=torch.int32)
    case.seq_lens = case.exact_start + 10
    forced = case.run(budget=0, columns=8)
    newest = 3 * layout.chunks
    assert forced[0, 0].tolist() == [0, newest - 3, newest - 2, newest - 1, -1, -1, -1, -1]


@pytest.mark.parametrize("open_tokens", [0, 1, 7, 8, 9, 31, 32, 33, 200])
def test_newest_sealed_chunks_are_forced(open_tokens: int) -> None:
    layout = generators.make_layout(1, 64)
    case = make_case("local", layout, blocks=(2,), budget=1, outliers=0)
    case.seq_lens = case.exact_start + open_tokens
    forced = case.run(budget=0, columns=5)[0, 0].tolist()
    end, size = 2 * layout.block_size, layout.chunk_size
    local = [c for c in range(2 * layout.chunks) if (c + 1) * size > end + open_tokens - LOCAL_CHUNKS * size]
    assert [c for c in forced if c >= 0] == [0, *local]
    case.check()


def test_ties_go_to_the_lower_id() -> None:
    layout = generators.make_layout(2, 64)
    case = make_case("ties", layout, blocks=(4,), budget=37, outliers=0)
    layout.view(case.pages, "landmarks")[:] = 1
    layout.view(case.pages, "landmark_scales")[:] = 0.5
    case.seq_lens = case.exact_start + 100
    assert case.run()[0, 1].tolist() == [*range(38), -1, -1, -1, -1]
    layout.view(case.pages, "landmark_scales")[case.block_table[0, 2]] = 0.25
    case.query[:] = case.query.abs()
    case.budget, case.columns = 3 * layout.chunks, 3 * layout.chunks + 5
    best = [c for c in range(4 * layout.chunks) if c // layout.chunks != 2]
    assert case.run()[0, 0].tolist()[: len(best) + 1] == sorted([*best, 2 * layout.chunks])


def test_invalid_blocks_are_never_picked() -> None:
    layout = generators.make_layout(2, 80, torch.bfloat16)
    case = make_case("invalid", layout, blocks=(7, 3, 2))
    size = len(case.pages)
    for column, bad in enumerate((0, -1, size, 2**31 - 1, -(2**31))):
        case.block_table[0, column + 1] = bad
    case.block_table[2] = 0
    actual = case.check()
    bad_blocks = actual[0][actual[0] >= 0] // layout.chunks
    assert set(bad_blocks.tolist()) <= {0, 6}
    assert (actual[2] == -1).all()


def test_rows_without_sealed_blocks_pick_nothing() -> None:
    layout = generators.make_layout(2, 64)
    case = make_case("empty rows", layout, blocks=(2, 2, 2, 2))
    case.exact_start = torch.tensor([0, 512, -256, 512], dtype=torch.int32)
    case.seq_lens = torch.tensor([100, 0, 600, -1], dtype=torch.int32)
    assert (case.run() == -1).all()
    case.seq_lens[1] = 600  # the control
    assert (case.run()[1] >= 0).any()


def test_context_beyond_the_table_is_ignored() -> None:
    layout = generators.make_layout(2, 64)
    case = make_case("beyond", layout, blocks=(3,))
    case.block_table = case.block_table[:, :2].contiguous()
    case.exact_start = torch.tensor([2**31 - 1], dtype=torch.int32)
    case.seq_lens = torch.tensor([2**31 - 1], dtype=torch.int32)
    assert case.check().max() < 2 * layout.chunks


def test_more_forced_chunks_than_columns_fill_the_columns() -> None:
    layout = generators.make_layout(1, 64)
    case = make_case("short", layout, blocks=(2,), budget=1, outliers=0)
    case.seq_lens = torch.tensor([10], dtype=torch.int32)  # all chunks are newer
    assert case.run()[0, 0].tolist() == [*range(6)]


def test_no_columns_in_the_table() -> None:
    case = make_case("no columns", generators.make_layout(2, 64), blocks=(2, 1))
    case.block_table = case.block_table[:, :0]
    assert (case.run() == -1).all()


def test_no_rows() -> None:
    case = make_case("no rows", generators.make_layout(2, 64))
    for name in ("query", "block_table", "exact_start", "seq_lens"):
        setattr(case, name, getattr(case, name)[:0])
    assert case.run().shape[0] == 0


def test_strided_query_and_table() -> None:
    layout = generators.make_layout(2, 96, torch.float16)
    case = make_case("strides", layout)
    expected = case.run()
    fused = generators.randn(generators.make_generator(1), 3, 20, 96, dtype=torch.float16)
    fused[:, 5:13] = case.query
    wide = torch.full((3, 50), -9, dtype=torch.int32)
    wide[:, : case.block_table.shape[1]] = case.block_table
    strided = replace(case, query=fused[:, 5:13], block_table=wide[:, : case.block_table.shape[1]])
    assert torch.equal(strided.run(), expected)
    assert torch.equal(replace(case, block_table=wide).run(), expected)
    spread = torch.zeros(len(case.pages), 2 * layout.page_bytes, dtype=torch.uint8)
    spread[:, : layout.page_bytes] = case.pages
    assert torch.equal(replace(case, pages=spread[:, : layout.page_bytes]).run(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_queries_pick_full_budgets_in_bounds(value: float) -> None:
    layout = generators.make_layout(2, 64)
    case = make_case("nan", layout, blocks=(3, 3))
    layout.view(case.pages, "landmarks")[..., 5] |= 1  # no product with zero
    healthy = case.run()
    case.query[0, 2, 5] = value
    actual = case.run()
    assert torch.equal(actual[1], healthy[1])
    assert torch.equal(actual[0, 1], healthy[0, 1]), "another KV head's group changed"
    ids = actual[0, 0][actual[0, 0] >= 0]
    assert len(ids) == (healthy[0, 0] >= 0).sum()
    assert torch.equal(ids, ids.unique())
    assert int(ids.max()) < 3 * layout.chunks
    # All scores are NaN, so the lower ids win.
    forced = case.run(budget=0, columns=case.columns - case.budget)[0, 0]
    forced = forced[forced >= 0].tolist()
    rest = [chunk for chunk in range(3 * layout.chunks) if chunk not in forced]
    assert ids.tolist() == sorted(forced + rest[: case.budget])


def test_bad_landmarks_stay_in_bounds() -> None:
    layout = generators.make_layout(1, 64)
    for value in (float("nan"), float("inf"), -float("inf"), 1e38):
        case = make_case("bad marks", layout, blocks=(3,))
        layout.view(case.pages, "landmark_scales")[case.block_table[0, 1], 0, 7] = value
        layout.view(case.pages, "outlier_cosines")[case.block_table[0, 1]] = value
        ids = case.run()[0, 0]
        ids = ids[ids >= 0]
        assert torch.equal(ids, ids.unique())
        assert int(ids.max()) < 3 * layout.chunks


@pytest.mark.cpu_kernel
def test_opcheck() -> None:
    case = make_case("opcheck", generators.make_layout(2, 64), blocks=(2, 1))
    chunk_ids = torch.zeros(2, 2, case.columns, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.shadowkv.select_chunks.default,
        (
            case.query, case.pages, case.block_table, case.exact_start, case.seq_lens, case.scale,
            case.budget, case.layout.ints, torch.zeros(0), chunk_ids,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda t: t.double(), r"query: expected dtype DTYPE, got Double"),
        ("query", lambda t: t[:, :3].contiguous(), r"query: expected a multiple of 2 heads, got 3"),
        ("query", lambda t: t[0], r"query: expected 3 dimensions \[any, any, 64\], got 2"),
        ("query", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), r"query: expected stride 1 in the last"),
        ("pages", lambda t: t[:, :-64].contiguous(), r"pages: expected shape \[any, \d+\], got"),
        ("pages", lambda t: t.view(torch.int8), r"pages: expected dtype Byte, got Char"),
        ("block_table", lambda t: t.long(), r"block_table: expected dtype Int, got Long"),
        ("block_table", lambda t: t[:1], r"block_table: expected shape \[2, any\], got \[1, 4\]"),
        ("exact_start", lambda t: t[:1], r"exact_start: expected shape \[2\], got \[1\]"),
        ("seq_lens", lambda t: t.float(), r"seq_lens: expected dtype Int, got Float"),
        ("budget", lambda b: -1, r"budget_chunks: expected 0 or more, got -1"),
        ("columns", lambda c: 24, r"chunk_ids: expected at least 25 columns for a budget of 20 chunks, got 24"),
        ("layout", lambda x: replace(x, head_size=72), r"layout: head_size must be 64, 80, 96, 128 or 256, got 72"),
        ("layout", lambda x: replace(x, dtype_index=3), r"layout: dtype_index must be 0, 1 or 2, got 3"),
        ("layout", lambda x: replace(x, landmarks=x.page_bytes), r"layout: landmarks must be \d+ bytes inside a page"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(name: str, change, message: str) -> None:
    case = make_case("errors", generators.make_layout(2, 64), blocks=(2, 1))
    case.run()  # the control
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(RuntimeError, match=message.replace("DTYPE", generators.default_dtype_name())):
        case.run()


def test_what_the_cuda_kernel_refuses(kernel: str) -> None:
    if kernel == "cpu":
        pytest.skip("the CPU kernel takes it")
    layout = generators.make_layout(2, 64)
    case = make_case("cuda errors", layout, blocks=(2, 1))

    def refused(message: str, workspace: Tensor | None = None, **changes: object) -> None:
        with pytest.raises(RuntimeError, match=message):
            replace(case, **changes).run(workspace=workspace)

    row = 8 * case.block_table.shape[1] * (layout.chunks + 2)
    refused(rf"workspace: expected at least {row} values, those of one row, got {row - 1}", torch.zeros(row - 1))
    refused(r"workspace: expected dtype Float, got Double", torch.zeros(2 * row).double())
    refused(r"workspace: expected contiguous memory", torch.zeros(4 * row)[::2])
    refused(r"query: expected at most 16 query heads per KV head, got 17", query=case.query[:, :1].repeat(1, 34, 1))
    odd = torch.zeros(2, 8, 68, dtype=layout.dtype)[..., 2:66]
    refused(r"query: expected rows that are contiguous and aligned to 16 bytes", query=odd)
    memory = torch.zeros(case.pages.numel() + 64, dtype=torch.uint8)[8 : case.pages.numel() + 8]
    refused(r"pages: expected rows aligned to 16 bytes", pages=memory.view_as(case.pages))
    moved = replace(layout, landmarks=layout.landmarks + 8)
    refused(r"layout: landmarks must be aligned to 16 bytes", layout=moved)
    fp32 = make_case("fp32", generators.make_layout(2, 64, torch.float32), blocks=(2, 1))
    with pytest.raises(RuntimeError, match="the CUDA kernels take float16 and bfloat16, got float32"):
        fp32.run()
