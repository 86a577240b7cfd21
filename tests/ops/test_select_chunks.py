"""select_chunks against the reference: forced chunks exactly, scored ones up to near ties, the rest of what it took."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import generators
import pytest
import torch
from numeric import assert_bytes_equal, assert_close
from torch import Tensor

from vllm_shadowkv import ops, reference
from vllm_shadowkv.codes import quantise, unpack_nibbles
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
    rest: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    """Values and log-sum-exp of the last run."""

    def run(
        self, function=ops.select_chunks, budget: int | None = None, columns: int | None = None, **options: Tensor
    ) -> Tensor:
        shape = (len(self.query), self.layout.num_kv_heads, self.columns if columns is None else columns)
        guarded = torch.full((len(self.query) + 1, *shape[1:]), 12345, dtype=torch.int32)
        chunk_ids = guarded[:-1]
        rest_shape = len(self.query) + 1, *self.query.shape[1:]
        guards = torch.full(rest_shape, 7.0), torch.full(rest_shape[:2], 7.0)
        self.rest = guards[0][:-1], guards[1][:-1]
        function(
            self.query, self.pages, self.block_table, self.exact_start, self.seq_lens, self.scale,
            self.budget if budget is None else budget, self.layout, chunk_ids, *self.rest, **options,
        )  # fmt: skip
        assert (guarded[-1] == 12345).all(), "a write behind the ids"
        assert all((guard[-1] == 7.0).all() for guard in guards), "a write behind the rest"
        return chunk_ids

    def logits(self, query: Tensor, row: int, head: int) -> Tensor:
        """`[group, chunks of the row]` in the query's dtype, written independently of the reference."""
        layout = self.layout
        start = int(self.exact_start[row]) if int(self.seq_lens[row]) > 0 else 0
        blocks = self.block_table[row, : max(start, 0) // layout.block_size].long()
        usable = (blocks > 0) & (blocks < len(self.pages))
        blocks = blocks.where(usable, 0)
        marks = unpack_nibbles(layout.view(self.pages, "landmarks")[blocks, head]).to(query.dtype)
        scales = layout.view(self.pages, "landmark_scales")[blocks, head].to(query.dtype)
        means = layout.view(self.pages, "landmark_mean")[blocks, head].to(query.dtype)
        marks = (marks * scales[..., None]).flatten(0, 1)
        group = query.shape[1] // layout.num_kv_heads
        queries = query[row, head * group : (head + 1) * group]
        codes, steps = (part.to(query.dtype) for part in quantise(queries.float()))
        logits = (
            codes * steps[:, None] @ marks.T + (queries @ means.T).repeat_interleave(layout.chunks, 1)
        ) * self.scale
        return logits.masked_fill(~usable.repeat_interleave(layout.chunks), -torch.inf)

    def scores(self, row: int, head: int) -> Tensor:
        """Logarithms of scores, fp64 `[chunks of the row]`; kernels need not tell apart what is below 2^-100."""
        return torch.softmax(self.logits(self.query.double(), row, head), -1).sum(0).clamp_min(2.0**-100).log()

    def rest_of(self, chunk_ids: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of a choice, in the query's dtype: a sum over chunks, one after the other."""
        layout, (rows, heads, size) = self.layout, query.shape
        values, lse = query.new_zeros(rows, heads, size), query.new_full((rows, heads), -torch.inf)
        group = heads // layout.num_kv_heads
        for row in range(rows):
            for head in range(layout.num_kv_heads):
                logits = self.logits(query, row, head)
                logits[:, chunk_ids[row, head][chunk_ids[row, head] >= 0].long()] = -torch.inf
                blocks = self.block_table[row, : logits.shape[1] // layout.chunks].long()
                blocks = blocks.where((blocks > 0) & (blocks < len(self.pages)), 0)
                means = layout.view(self.pages, "mean_values")[blocks, head].to(query.dtype)
                for member, of_head in enumerate(logits, head * group):
                    left = of_head.isfinite()
                    if left.any():
                        weights = (of_head[left] - of_head[left].max()).exp()
                        lse[row, member] = of_head[left].max() + (layout.chunk_size * weights).sum().log()
                        by_chunk = means.repeat_interleave(layout.chunks, 0)[left]
                        values[row, member] = weights @ by_chunk / weights.sum()
        return values, lse

    def check_rest(self, chunk_ids: Tensor) -> None:
        """Compares the last run's rest with that of the chunks which it picked."""
        expected = self.rest_of(chunk_ids, self.query.double())
        same = self.rest_of(chunk_ids, self.query.float())
        for actual, want, like, what in zip(self.rest, expected, same, ("rest_values", "rest_lse"), strict=True):
            assert_close(actual, want, like, what)

    def check(self) -> Tensor:
        """Runs the kernel, then compares it with the reference."""
        actual = self.run()
        self.check_rest(actual)
        rest = self.rest
        expected = self.run(reference.select_chunks)
        self.check_rest(expected)
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
        self.rest = rest
        return actual


def set_landmarks(case: Case) -> None:
    """All landmarks are 0.5 in every dimension, of codes that are 1."""
    for section, value in (("landmarks", 0x99), ("landmark_scales", 0.5), ("landmark_mean", 0)):
        case.layout.view(case.pages, section)[:] = value


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
    actual = case.run(workspace=workspace)
    rest = case.rest
    assert torch.equal(actual, case.check())
    assert_bytes_equal(rest[0], case.rest[0])
    assert_bytes_equal(rest[1], case.rest[1])
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
            results.append((case.check(), *case.rest))
    finally:
        torch.set_num_threads(before)
    for one, two, seven in zip(*results, strict=True):
        assert_bytes_equal(two, one)
        assert_bytes_equal(seven, one)


def test_the_mean_key_of_a_block_counts() -> None:
    """It meets the query unrounded, and moves all chunks of its block alike."""
    layout = generators.make_layout(2, 64)
    case = make_case("means", layout, blocks=(4,), budget=layout.chunks - 1, outliers=0)
    set_landmarks(case)
    case.seq_lens = case.exact_start + 100
    mean = layout.view(case.pages, "landmark_mean")
    case.query[:] = 0
    case.query[..., 3], case.query[..., 40] = 100, 0.25  # a code of 127, and one of 0
    mean[case.block_table[0, 2].long(), :, 40] = 8
    ids = case.check()
    assert ids[0, 0].tolist()[: layout.chunks] == [0, *range(2 * layout.chunks, 3 * layout.chunks - 1)]
    logits = case.logits(case.query.double(), 0, 1)
    apart = logits[:, 2 * layout.chunks] - logits[:, 0]
    torch.testing.assert_close(apart, torch.full_like(apart, 2 * case.scale))
    mean[case.block_table[0, 1].long(), 0, 3] = -1
    mean[case.block_table[0, 1].long(), 0, 40] = torch.nan  # its logits are not numbers, and no others
    case.check_rest(case.run())


@pytest.mark.parametrize("budget", [0, 1, 63, 64, 500])
def test_budgets_up_to_more_than_the_context(budget: int) -> None:
    layout = generators.make_layout(2, 64)
    case = make_case(budget, layout, blocks=(2, 3), budget=budget)
    actual = case.check()
    values, lse = case.rest
    counts = (actual >= 0).sum(-1)
    if budget == 500:
        assert counts[0].tolist() == [2 * layout.chunks] * 2, "not the whole context"
    whole = (counts == torch.tensor([[2], [3]]) * layout.chunks).repeat_interleave(4, 1)
    assert whole.all() == (budget == 500)
    assert torch.equal(lse == -torch.inf, whole)
    assert torch.equal(values != 0, ~whole[..., None].expand_as(values))


def test_a_row_has_the_same_rest_alone_and_in_a_batch() -> None:
    layout = generators.make_layout(2, 96, torch.float16, chunk_size=16)
    case = make_case("alone", layout, group=3, blocks=(3, 0, 5, 1))
    case.run()
    whole = case.rest
    for row in range(4):
        names = ("query", "block_table", "exact_start", "seq_lens")
        alone = replace(case, **{name: getattr(case, name)[row : row + 1] for name in names})
        alone.run()
        for actual, expected in zip(alone.rest, whole, strict=True):
            assert_bytes_equal(actual, expected[row : row + 1])


def test_the_rest_is_exact_where_chunks_and_blocks_have_one_key_and_value() -> None:
    """As exact attention to tokens whose keys are their chunk's landmark, and their values their block's mean."""
    layout = generators.make_layout(2, 64)
    case = make_case("exact rest", layout, blocks=(3,), budget=8)
    ids = case.check()
    for head in range(2):
        tokens = case.logits(case.query.double(), 0, head).repeat_interleave(layout.chunk_size, -1)
        left = torch.ones(3 * layout.chunks, dtype=torch.bool)
        left[ids[0, head][ids[0, head] >= 0].long()] = False
        tokens = tokens[:, left.repeat_interleave(layout.chunk_size)]
        means = layout.view(case.pages, "mean_values")[case.block_table[0, :3].long(), head].double()
        values = means.repeat_interleave(layout.block_size, 0)[left.repeat_interleave(layout.chunk_size)]
        heads = slice(4 * head, 4 * head + 4)
        torch.testing.assert_close(case.rest[0][0, heads].double(), tokens.softmax(-1) @ values, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(case.rest[1][0, heads].double(), tokens.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_a_mean_value_counts_only_where_a_chunk_of_its_block_is_left() -> None:
    layout = generators.make_layout(2, 64)
    case = make_case("picked blocks", layout, blocks=(4,), budget=3 * 32, outliers=0)
    assert layout.chunks == 32
    set_landmarks(case)
    layout.view(case.pages, "landmark_scales")[case.block_table[0, 2]] = 0.25
    case.query[:] = case.query.abs()
    case.seq_lens = case.exact_start + 100
    case.budget -= 1  # the sink is forced
    means = layout.view(case.pages, "mean_values")
    means[case.block_table[0, [0, 1, 3]].long()] = torch.nan
    case.run()
    expected = means[case.block_table[0, 2].long()].float().repeat_interleave(4, 0)
    assert_close(case.rest[0][0], expected)
    means[case.block_table[0, 2].long(), 1, 9] = torch.inf
    case.run()
    assert (~case.rest[0][0].isfinite()).nonzero().tolist() == [[head, 9] for head in range(4, 8)]


def test_logits_far_below_the_picked_ones_weigh_nothing_or_little() -> None:
    """A sink far above all others, as decoders have it."""
    layout = generators.make_layout(1, 64)
    case = make_case("far", layout, group=2, blocks=(2,), budget=8, outliers=0)
    case.query[:] = case.query.abs()
    scales, block = layout.view(case.pages, "landmark_scales"), int(case.block_table[0, 0])
    layout.view(case.pages, "landmarks")[block, 0, 0] = 0xFF  # 7
    layout.view(case.pages, "landmark_mean")[block] = 0
    for logit in (30.0, 70.0, 300.0):
        scales[block, 0, 0] = logit / (7 * case.scale * float(case.query[0].float().sum(-1).mean()))
        ids = case.run()
        values, lse = case.rest
        expected = case.rest_of(ids, case.query.double())
        share = (expected[1] - case.logits(case.query.double(), 0, 0).logsumexp(-1)).exp()
        if logit < 80:
            assert_close(lse, expected[1], case.rest_of(ids, case.query.float())[1] + 1e-4)
        assert (lse.exp() <= 1.01 * expected[1].exp()).all()
        assert share.max() < 1e-6
        assert values.isfinite().all()


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
    set_landmarks(case)
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
    assert (case.rest[1][2] == -torch.inf).all()
    assert case.rest[1][:2].isfinite().all()


def test_rows_without_sealed_blocks_pick_nothing() -> None:
    layout = generators.make_layout(2, 64)
    case = make_case("empty rows", layout, blocks=(2, 2, 2, 2))
    case.exact_start = torch.tensor([0, 512, -256, 512], dtype=torch.int32)
    case.seq_lens = torch.tensor([100, 0, 600, -1], dtype=torch.int32)
    assert (case.run() == -1).all()
    assert_bytes_equal(case.rest[0], torch.zeros_like(case.rest[0]))
    assert (case.rest[1] == -torch.inf).all()
    case.seq_lens[1] = 600  # the control
    assert (case.run()[1] >= 0).any()
    assert case.rest[1].isfinite().any(-1).tolist() == [False, True, False, False]


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
    ids = case.run()
    assert ids[0, 0].tolist() == [*range(6)]
    case.check_rest(ids)  # the others are not forgotten
    assert case.rest[1].isfinite().all()


def test_no_columns_in_the_table() -> None:
    case = make_case("no columns", generators.make_layout(2, 64), blocks=(2, 1))
    case.block_table = case.block_table[:, :0]
    assert (case.run() == -1).all()
    assert_bytes_equal(case.rest[0], torch.zeros_like(case.rest[0]))
    assert (case.rest[1] == -torch.inf).all()


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
    healthy, healthy_rest = case.run(), case.rest
    case.query[0, 2, 5] = value
    actual = case.run()
    case.check_rest(actual)
    assert (case.rest[1][0, 2] == -torch.inf).all()
    for one, other in zip(case.rest, healthy_rest, strict=True):
        assert_bytes_equal(one[1], other[1])
        assert_bytes_equal(one[0, 4:], other[0, 4:])
        assert one[0].nan_to_num(neginf=0).isfinite().all()
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
    for value in (float("nan"), float("inf"), -float("inf"), 3e38):  # the last one overflows in the product
        case = make_case("bad marks", layout, blocks=(3,))
        case.query[:] = case.query.abs()
        layout.view(case.pages, "landmarks")[case.block_table[0, 1], 0, 7] = 0xFF
        layout.view(case.pages, "landmark_scales")[case.block_table[0, 1], 0, 7] = value
        layout.view(case.pages, "outlier_cosines")[case.block_table[0, 1]] = value
        chunk_ids = case.run()
        case.check_rest(chunk_ids)
        assert case.rest[1].isfinite().all()
        ids = chunk_ids[0, 0]
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
            case.budget, case.layout.ints, torch.zeros(0), chunk_ids, torch.zeros(case.query.shape),
            torch.zeros(case.query.shape[:2]),
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
        ("layout", lambda x: replace(x, mean_values=-64), r"layout: mean_values must be \d+ bytes inside a page"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(name: str, change, message: str) -> None:
    case = make_case("errors", generators.make_layout(2, 64), blocks=(2, 1))
    case.run()  # the control
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(RuntimeError, match=message.replace("DTYPE", generators.default_dtype_name())):
        case.run()


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ((torch.zeros(2, 8, 64).double(), torch.zeros(2, 8)), "rest_values: expected dtype Float, got Double"),
        ((torch.zeros(2, 2, 64), torch.zeros(2, 8)), r"rest_values: expected shape \[2, 8, 64\], got \[2, 2, 64\]"),
        ((torch.zeros(2, 8, 64), torch.zeros(8, 2).T), "rest_lse: expected contiguous memory"),
    ],
)
def test_errors_name_the_rest(rest: tuple[Tensor, Tensor], message: str) -> None:
    case = make_case("errors", generators.make_layout(2, 64), blocks=(2, 1))
    arguments = case.query, case.pages, case.block_table, case.exact_start, case.seq_lens, case.scale, case.budget
    ids = torch.zeros(2, 2, case.columns, dtype=torch.int32)
    ops.select_chunks(*arguments, case.layout, ids, torch.zeros(2, 8, 64), torch.zeros(2, 8))  # the control
    with pytest.raises(RuntimeError, match=message):
        ops.select_chunks(*arguments, case.layout, ids, *rest)


def test_what_the_cuda_kernel_refuses(kernel: str) -> None:
    if kernel == "cpu":
        pytest.skip("the CPU kernel takes it")
    layout = generators.make_layout(2, 64)
    case = make_case("cuda errors", layout, blocks=(2, 1))

    def refused(message: str, workspace: Tensor | None = None, **changes: object) -> None:
        with pytest.raises(RuntimeError, match=message):
            replace(case, **changes).run(workspace=workspace)

    row = case.block_table.shape[1] * (8 * (layout.chunks + 2) + 2 * layout.chunks)
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
    moved = replace(layout, landmark_mean=layout.landmark_mean + 4)
    refused(r"layout: landmark_mean must be aligned to 8 bytes", layout=moved)
    fp32 = make_case("fp32", generators.make_layout(2, 64, torch.float32), blocks=(2, 1))
    with pytest.raises(RuntimeError, match="the CUDA kernels take float16 and bfloat16, got float32"):
        fp32.run()
