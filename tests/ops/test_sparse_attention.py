"""sparse_attention against the reference, torch's SDPA and a dense softmax."""

from __future__ import annotations

from dataclasses import dataclass, replace

import generators
import pytest
import torch
from numeric import assert_bytes_equal, assert_close
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_shadowkv import ops, reference
from vllm_shadowkv.page import DTYPES, HEAD_SIZES, PageLayout

GROUPS = (1, 2, 3, 4, 7, 8, 16, 20)
NAN = float("nan")
ROWS = (
    "query", "slot_ids", "slot_table", "exact_table", "exact_start", "seq_lens", "rest_values", "rest_lse", "output",
    "lse",
)  # fmt: skip


@dataclass
class Case:
    query: Tensor
    slot_ids: Tensor
    slot_table: Tensor
    slot_pages: Tensor
    exact_keys: Tensor
    exact_values: Tensor
    exact_table: Tensor
    exact_start: Tensor
    seq_lens: Tensor
    rest_values: Tensor
    rest_lse: Tensor
    scale: float
    layout: PageLayout
    output: Tensor
    lse: Tensor

    def run(self, function=ops.sparse_attention, **options) -> tuple[Tensor, Tensor]:
        function(
            self.query, self.slot_ids, self.slot_table, self.slot_pages, self.exact_keys, self.exact_values,
            self.exact_table, self.exact_start, self.seq_lens, self.rest_values, self.rest_lse, self.scale, self.layout,
            self.output, self.lse, **options,
        )  # fmt: skip
        return self.output, self.lse

    def rows(self, *rows: int) -> Case:
        """Some of the rows, with outputs of their own."""
        return replace(self, **{name: getattr(self, name)[list(rows)].clone() for name in ROWS})

    def reference(self) -> tuple[Tensor, Tensor]:
        """The reference in fp32: of the same inputs, not rounded to the dtype."""
        output = torch.full_like(self.query, NAN, dtype=torch.float32)
        return replace(self, output=output, lse=torch.zeros_like(self.lse)).run(reference.sparse_attention)

    def rounded_weights(self) -> Tensor:
        """The output in fp32, but for softmax weights that are rounded to the dtype: tensor cores take no others."""
        layout, output = self.layout, torch.zeros_like(self.query)
        pages = (*(layout.view(self.slot_pages, name) for name in ("slot_keys", "slot_values")),)
        group = self.query.shape[1] // layout.num_kv_heads
        for row in range(len(output)):
            end = min(int(self.seq_lens[row]), self.exact_table.shape[1] * layout.exact_tokens)
            exact = [divmod(token, layout.exact_tokens) for token in range(max(int(self.exact_start[row]), 0), end)]
            exact = [(int(self.exact_table[row, column]), place) for column, place in exact]
            exact = [at for at in exact if 0 < at[0] < len(self.exact_keys)]
            for head in range(layout.num_kv_heads):
                slots = [divmod(slot, layout.slots_per_page) for slot in self.slot_ids[row, head].tolist() if slot >= 0]
                slots = [(int(self.slot_table[row, i]), at) for i, at in slots if i < self.slot_table.shape[1]]
                slots = [at for at in slots if 0 < at[0] < len(self.slot_pages)]
                keys, values = (
                    torch.cat((*(in_slots[page, head, at] for page, at in slots),
                               *(in_pages[page, head, at][None] for page, at in exact),
                               torch.empty(0, layout.head_size))).float()
                    for in_slots, in_pages in zip(pages, (self.exact_keys, self.exact_values), strict=True)
                )  # fmt: skip
                heads = slice(head * group, (head + 1) * group)
                logits = self.scale * (self.query[row, heads].float() @ keys.T)
                weights = torch.cat((logits, self.rest_lse[row, heads, None]), -1).softmax(-1)
                share = weights[:, -1:]
                rest = torch.where(share > 0, share * self.rest_values[row, heads], 0)
                output[row, heads] = (weights[:, :-1].to(layout.dtype).float() @ values + rest).to(layout.dtype)
        return output

    def check(self) -> tuple[Tensor, Tensor]:
        self.output.fill_(NAN)
        self.lse.fill_(NAN)
        output, lse = self.run()
        expected, expected_lse = self.reference()
        same = None
        if tensor_cores():
            same = self.rounded_weights().float()
            same = same.where(same.isfinite(), expected)
        assert_close(output, expected, same, what="output")
        assert_close(lse, expected_lse, what="lse")
        return output, lse


def tensor_cores() -> bool:
    """Whether this test runs with the CUDA kernel."""
    return generators.DEFAULT_DTYPE is not torch.float32


def in_cuda_order(layout: PageLayout, pages: Tensor, slot_table: Tensor) -> tuple[Tensor, Tensor]:
    """`PageLayout.exact_views` of pages on CUDA: rewrites all that are no slot pages so, and returns the views."""
    heads, tokens, size = layout.num_kv_heads, layout.exact_tokens, layout.head_size
    content = torch.cat(layout.exact_views(pages), -1)
    strides = layout.page_bytes // layout.dtype.itemsize, tokens * 2 * size, 2 * size, 1
    both = pages.view(layout.dtype).as_strided((len(pages), heads, tokens, 2 * size), strides)
    exact = torch.ones(len(pages), dtype=torch.bool)
    exact[slot_table.long()] = False
    both[exact] = content[exact]
    return both[..., :size], both[..., size:]


def make_case(
    seed: object,
    layout: PageLayout,
    *,
    group: int = 4,
    slots: tuple[int, ...] = (20, 0, 7),
    exact: tuple[tuple[int, int], ...] = ((256, 300), (0, 130), (512, 517)),
    columns: int = 24,
    pages_per_row: int = 4,
    cuda_order: bool | None = None,
    rest: bool = True,
) -> Case:
    """Rows with some slots and the exact tokens of `exact` (start, seq_len); everything else in the pages is NaN.

    `rest`: every second row has one; the others' log-sum-exp is -inf, and their values are NaN.
    `cuda_order`: exact pages as on CUDA; default: as on the kernel's device.
    """
    generator = generators.make_generator(seed)
    rows, heads = len(slots), layout.num_kv_heads
    width = max(-(-end // layout.exact_tokens) for _, end in exact) + 2
    num_pages = 1 + rows * (pages_per_row + width)
    pages = torch.full((num_pages, layout.page_bytes), 0xFF, dtype=torch.uint8)  # NaN in every dtype
    free = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    slot_table = generators.make_slot_table(generator, free, rows, pages_per_row)
    exact_table = generators.randint(generator, -5, num_pages + 5, rows, width)
    per_row = pages_per_row * layout.slots_per_page
    slot_ids = torch.full((rows, heads, columns), -1, dtype=torch.int32)
    keys, values = layout.view(pages, "slot_keys"), layout.view(pages, "slot_values")
    for row, count in enumerate(slots):
        for head in range(heads):
            order = torch.randperm(per_row, generator=generator)[:count]
            places = torch.randperm(columns, generator=generator)[:count]
            slot_ids[row, head, places] = order.int()
            where = slot_table[row, order // layout.slots_per_page].long(), head, order % layout.slots_per_page
            chunk = count, layout.chunk_size, layout.head_size
            keys[where] = generators.randn(generator, *chunk, dtype=layout.dtype)
            values[where] = generators.randn(generator, *chunk, dtype=layout.dtype)
    for row, (start, end) in enumerate(exact):
        first = start // layout.exact_tokens
        for column in range(first, -(-end // layout.exact_tokens)):
            exact_table[row, column] = free.pop()
        shape = max(end - start, 0), heads, layout.head_size
        generators.fill_exact_pages(
            layout, pages, exact_table[row].tolist(),
            generators.randn(generator, *shape), generators.randn(generator, *shape), start,
        )  # fmt: skip
    cuda_order = tensor_cores() if cuda_order is None else cuda_order
    exact_keys, exact_values = in_cuda_order(layout, pages, slot_table) if cuda_order else layout.exact_views(pages)
    query = generators.randn(generator, rows, heads * group, layout.head_size, dtype=layout.dtype)
    rest_values = generators.randn(generator, *query.shape)
    rest_lse = generators.randn(generator, rows, heads * group) + 4
    without = slice(1, None, 2) if rest else slice(None)
    rest_values[without], rest_lse[without] = NAN, -torch.inf
    return Case(
        query, slot_ids, slot_table, pages, exact_keys, exact_values, exact_table,
        torch.tensor([start for start, _ in exact], dtype=torch.int32),
        torch.tensor([end for _, end in exact], dtype=torch.int32), rest_values, rest_lse,
        layout.head_size**-0.5, layout, torch.empty_like(query), torch.empty(rows, heads * group),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes_and_dtypes(head_size: int, dtype: torch.dtype) -> None:
    make_case((head_size, dtype), generators.make_layout(2, head_size, dtype)).check()


@pytest.mark.parametrize("chunk_size", [8, 16])
@pytest.mark.parametrize("group", GROUPS)
def test_groups_and_chunk_sizes(group: int, chunk_size: int) -> None:
    layout = generators.make_layout(3, 80, torch.bfloat16, chunk_size=chunk_size)
    slots = (20, 0, 7) if chunk_size == 8 else (9, 0, 5)
    make_case((group, chunk_size), layout, group=group, slots=slots).check()


@pytest.mark.parametrize("block_size", [64, 128, 512, 1024])
def test_page_sizes(block_size: int) -> None:
    layout = generators.make_layout(2, 64, torch.float16, block_size=block_size, rank=16)
    slots = layout.slots_per_page
    exact = (3, 700), (0, 1), (129, 1100)
    make_case(block_size, layout, slots=(slots, 0, 1), exact=exact, columns=slots + 3, pages_per_row=1).check()


@pytest.mark.parametrize("columns", [1, 2, 3, 17])
@pytest.mark.parametrize("chunk_size", [8, 16])
def test_any_number_of_columns(columns: int, chunk_size: int) -> None:
    layout = generators.make_layout(2, 256, torch.float16, chunk_size=chunk_size)
    slots = (min(columns, 4 * layout.slots_per_page), 1, 0)
    make_case((columns, chunk_size), layout, slots=slots, exact=((0, 0), (0, 9), (17, 18)), columns=columns).check()


@pytest.mark.parametrize("start", [0, 1, 7, 15, 16, 17, 63, 64, 65, 127])
def test_every_edge_of_the_exact_range(start: int) -> None:
    layout = generators.make_layout(1, 64)
    ends = (*tuple(range(start, start + 20)), start + 63, start + 64, start + 65, 191, 192, 193)
    exact = tuple((start, end) for end in ends)
    make_case(start, layout, group=2, slots=(0,) * len(exact), exact=exact).check()


def test_exact_key_pages() -> None:
    layout = generators.exact_keys_layout(2, 128, torch.bfloat16)
    make_case("rank 0", layout, slots=(24, 3, 24), exact=((0, 0), (256, 700), (0, 300))).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_decode_agrees_with_sdpa(dtype: torch.dtype) -> None:
    layout = generators.make_layout(2, 128, dtype)
    case = make_case(("sdpa", dtype), layout, slots=(0, 0), exact=((0, 1500), (0, 321)), rest=False)
    output, _ = case.check()
    for row, length in enumerate((1500, 321)):
        tokens = torch.arange(length)
        page, place = case.exact_table[row, tokens // layout.exact_tokens].long(), tokens % layout.exact_tokens
        keys, values = (
            x[page, :, place].transpose(0, 1).repeat_interleave(4, 0) for x in (case.exact_keys, case.exact_values)
        )
        query = case.query[row, :, None]
        same = scaled_dot_product_attention(query, keys, values)[:, 0]
        exact = scaled_dot_product_attention(query.double(), keys.double(), values.double())[:, 0]
        assert_close(output[row], exact, same, what=f"row {row}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rest_is_merged_as_tokens_are(dtype: torch.dtype) -> None:
    """Attention to the slots, handed in as the rest of a row without slots, gives what slots give."""
    layout = generators.make_layout(2, 64, dtype)
    case = make_case(("merge", dtype), layout, slots=(20, 11), exact=((256, 300), (0, 40)), rest=False)
    slots = replace(case, seq_lens=torch.zeros_like(case.seq_lens))
    values, lse = slots.reference()
    merged = replace(case, slot_ids=torch.full_like(case.slot_ids, -1), rest_values=values, rest_lse=lse.clone())
    actual, actual_lse = merged.check()
    assert_close(actual, case.reference()[0], case.rounded_weights().float(), what="output")
    assert_close(actual_lse, case.reference()[1], what="lse")


@pytest.mark.parametrize("exact", [(0, 0), (0, 100)])
def test_a_row_that_has_nothing_but_the_rest(exact: tuple[int, int]) -> None:
    """No token, or none with weight: the output is the estimate."""
    layout = generators.make_layout(2, 64)
    case = make_case("only the rest", layout, slots=(0,), exact=(exact,))
    case.query[:] = case.query.abs()
    case.exact_keys[case.exact_table[0, :2].clamp(0, len(case.exact_keys) - 1).long()] = -torch.inf
    output, lse = case.check()
    assert_close(output, case.rest_values)
    assert_close(lse, case.rest_lse)


def test_a_rest_without_weight_changes_no_bit() -> None:
    layout = generators.make_layout(2, 96, torch.float16)
    case = make_case("no weight", layout, slots=(20, 7), exact=((256, 300), (0, 130)), rest=False)
    expected = [x.clone() for x in case.check()]
    case.rest_values[:], case.rest_lse[:] = 3.0, -1000.0
    for actual, before in zip(case.run(), expected, strict=True):
        assert_bytes_equal(actual, before)


def test_large_logits_stay_finite() -> None:
    layout = generators.make_layout(2, 64)
    case = make_case("large", layout)
    case.scale = 300.0
    output, lse = case.check()
    assert output.isfinite().all()
    assert lse.max() > 1000
    case.scale = 0.0
    case.check()


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("order", ["dim", "token", "head", "page", "apart"])
def test_exact_pages_in_any_memory_order(order: str) -> None:
    layout = generators.make_layout(3, 80, torch.bfloat16)
    case = make_case("order", layout)
    expected, expected_lse = (x.clone() for x in case.check())
    if order == "apart":  # nothing has stride 1
        case.exact_keys, case.exact_values = (
            torch.full((*x.shape, 2), NAN, dtype=x.dtype)[..., 0].copy_(x) for x in (case.exact_keys, case.exact_values)
        )
    else:
        last = {"page": 0, "head": 1, "token": 2, "dim": 3}[order]
        case.exact_keys, case.exact_values = (
            x.transpose(last, 3).contiguous().transpose(last, 3) for x in (case.exact_keys, case.exact_values)
        )
        assert case.exact_keys.stride(last) == 1
    output, lse = case.check()
    assert_close(output, expected.float())
    assert_close(lse, expected_lse)


@pytest.mark.parametrize("order", ["pages", "token", "apart"])
def test_vectors_in_any_order(order: str) -> None:
    """Orders that the CUDA kernel takes too: each key and value is contiguous."""
    layout = generators.make_layout(2, 128, torch.float16)
    case = make_case("cuda", layout, slots=(3, 0, 7), cuda_order=True)
    if order == "token":  # [pages, tokens, heads, dimensions]
        case.exact_keys, case.exact_values = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.exact_keys, case.exact_values)
        )
    elif order == "apart":
        case.exact_keys = case.exact_keys.contiguous()
        case.exact_values = torch.cat((case.exact_values, torch.full_like(case.exact_values, NAN)), -1)[..., :128]
    case.check()


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_neither_threads_nor_the_batch_change_a_bit(rows: int) -> None:
    layout = generators.make_layout(1, 64, torch.bfloat16)
    case = make_case("batch", layout, slots=(20,) * 7, exact=((256, 2000),) * 7)
    whole = [x.clone() for x in case.check()]
    part = {n: getattr(case, n)[:rows] for n in ROWS}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for actual, expected in zip(replace(case, **part).run(), whole, strict=True):
                assert_bytes_equal(actual, expected[:rows], f"{threads} threads")
    finally:
        torch.set_num_threads(before)


def test_the_cuda_kernel_wants_vectors(kernel: str) -> None:
    """It loads 16 bytes at a time; the CPU kernel takes any order."""
    for name in ("exact_keys", "exact_values"):
        case = make_case("vectors", generators.make_layout(2, 64), slots=(3,), exact=((0, 20),))
        setattr(case, name, getattr(case, name).transpose(2, 3).contiguous().transpose(2, 3))
        if kernel == "cpu":
            case.check()
        else:
            with pytest.raises(RuntimeError, match=f"{name}: expected rows that are contiguous and aligned to 16"):
                case.run()


def test_a_row_gives_the_same_bytes_alone_and_in_any_batch() -> None:
    layout = generators.make_layout(2, 80, torch.float16)
    exact = ((256, 300), (0, 130), (0, 0), (3, 517))
    case = make_case("rows", layout, group=3, slots=(20, 0, 0, 7), exact=exact)
    whole = [x.clone() for x in case.check()]
    for rows in ([0], [1], [2], [3], [3, 1], [2, 0, 3, 1]):
        for actual, expected in zip(case.rows(*rows).run(), whole, strict=True):
            assert_bytes_equal(actual, expected[rows], f"rows {rows}")


def test_a_small_workspace_gives_the_same_bytes() -> None:
    layout = generators.make_layout(2, 96, torch.bfloat16)
    case = make_case("workspace", layout, slots=(20, 0, 7, 0, 3), exact=((256, 300), (0, 130), (3, 70), (0, 0), (0, 9)))
    whole = [x.clone() for x in case.check()]
    for rows in (1, 2, 7):
        size = ops.sparse_attention_workspace(layout, rows, 8)
        room = torch.full((size + 100,), 7.0)
        room[:size] = NAN
        case.output.fill_(NAN)
        for actual, expected in zip(case.run(workspace=room[: size + 1]), whole, strict=True):
            assert_bytes_equal(actual, expected, f"{rows} rows at a time")
        assert (room[size:] == 7.0).all(), "wrote outside the workspace"


def test_a_workspace_needs_room_for_one_row(kernel: str) -> None:
    case = make_case("no room", generators.make_layout(2, 64))
    size = ops.sparse_attention_workspace(case.layout, 1, 8)
    if kernel == "cpu":
        case.run(workspace=torch.empty(0))
        return
    with pytest.raises(RuntimeError, match=rf"workspace: expected at least {size} values, .* got {size - 1}"):
        case.run(workspace=torch.empty(size - 1))
    with pytest.raises(RuntimeError, match="workspace: expected dtype Float, got Half"):
        case.run(workspace=torch.empty(size).half())


def test_the_place_of_a_chunk_does_not_change_a_bit() -> None:
    layout = generators.make_layout(1, 64)
    case = make_case("place", layout, slots=(20,), exact=((256, 300),))
    before = [x.clone() for x in case.check()]
    generator = generators.make_generator("shuffle")
    order = torch.randperm(4 * layout.slots_per_page, generator=generator)
    for section in ("slot_keys", "slot_values"):
        view = layout.view(case.slot_pages, section)
        slots = view[case.slot_table[0].long(), 0].flatten(0, 1)
        moved = torch.empty_like(slots)
        moved[order] = slots
        view[case.slot_table[0].long(), 0] = moved.unflatten(0, (4, -1))
    valid = case.slot_ids >= 0
    case.slot_ids[valid] = order[case.slot_ids[valid].long()].int()
    for actual, expected in zip(case.check(), before, strict=True):
        assert_bytes_equal(actual, expected)


def test_rows_without_anything_give_zeros() -> None:
    layout = generators.make_layout(2, 64, torch.bfloat16)
    case = make_case(
        "nothing", layout, slots=(0, 0, 0, 0, 3), exact=((0, 0), (256, 256), (300, 200), (0, 100), (0, 0)), rest=False
    )
    case.exact_table[3] = 0
    output, lse = case.check()
    assert_bytes_equal(output[:4], torch.zeros_like(output[:4]))
    assert (lse[:4] == -torch.inf).all()
    assert lse[4].isfinite().all()
    case.seq_lens[:] = -5
    case.exact_start[:] = -(2**31)
    case.slot_ids[:] = -1
    output, lse = case.check()
    assert (output == 0).all()


def test_invalid_ids_are_skipped() -> None:
    layout = generators.make_layout(2, 64, torch.float16)
    case = make_case("invalid", layout, slots=(12, 20), exact=((0, 500), (256, 600)))
    bad = torch.tensor([0, -1, len(case.slot_pages), 2**31 - 1, -(2**31)], dtype=torch.int32)
    before = case.check()[0].clone()
    case.exact_table[0, 1:6] = bad
    case.slot_table[1, 1:] = bad[:3]
    end = case.layout.slots_per_page * 4
    case.slot_ids[0, :, :4] = torch.tensor([end, 2**31 - 1, -(2**31), end + 1], dtype=torch.int32)
    after = case.check()[0]
    assert not torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_tokens_beyond_the_table_are_skipped() -> None:
    layout = generators.make_layout(2, 64)
    case = make_case("beyond", layout, slots=(3,), exact=((0, 128),))
    case.exact_table = case.exact_table[:, :2].contiguous()
    expected = case.check()[0].clone()
    case.seq_lens[:] = 2**31 - 1
    assert_bytes_equal(case.check()[0], expected)
    case.exact_start[:] = 2**31 - 1
    case.check()


def test_no_rows_no_columns() -> None:
    case = make_case("empty", generators.make_layout(2, 64))
    replace(case, **{name: getattr(case, name)[:0] for name in ROWS}).run()
    replace(case, slot_ids=case.slot_ids[:, :, :0].contiguous()).check()
    replace(case, slot_table=case.slot_table[:, :0]).check()
    replace(case, exact_table=case.exact_table[:, :0]).check()
    replace(case, exact_keys=case.exact_keys[:0], exact_values=case.exact_values[:0]).check()


def test_strided_rows() -> None:
    layout = generators.make_layout(2, 96, torch.bfloat16)
    case = make_case("strided", layout)
    expected, expected_lse = (x.clone() for x in case.check())
    fused = generators.randn(generators.make_generator(1), 3, 20, 96, dtype=torch.bfloat16)
    fused[:, 5:13] = case.query
    room = torch.full((3, 11, 128), 7.0, dtype=torch.bfloat16)
    wide = torch.full((3, 50), -9, dtype=torch.int32)
    wide[:, :4], wide[:, 20 : 20 + case.exact_table.shape[1]] = case.slot_table, case.exact_table
    strided = replace(
        case, query=fused[:, 5:13], output=room[:, 1:9, :96], slot_table=wide[:, :4],
        exact_table=wide[:, 20 : 20 + case.exact_table.shape[1]],
    )  # fmt: skip
    output, lse = strided.run()
    assert_bytes_equal(output, expected)
    assert_bytes_equal(lse, expected_lse)
    room[:, 1:9, :96] = 7.0
    assert (room == 7.0).all(), "wrote outside the output"


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["query", "slot_keys", "slot_values", "exact_keys", "exact_values"])
def test_nan_and_inf_go_where_the_reference_has_them(name: str, value: float) -> None:
    layout = generators.make_layout(2, 64)
    case = make_case("nan", layout)
    case.query = case.query.abs() + 0.1  # no sign of infinity by chance
    if name == "query":
        case.query[0, 2, 5] = value
    elif name.startswith("slot"):
        slot = int(case.slot_ids[0, 1].max())
        page, place = int(case.slot_table[0, slot // layout.slots_per_page]), slot % layout.slots_per_page
        layout.view(case.slot_pages, name)[page, 1, place, 3, 9] = value
    else:
        page = int(case.exact_table[0, 290 // layout.exact_tokens])
        getattr(case, name)[page, 0, 290 % layout.exact_tokens, 9] = value
    output, _ = case.check()
    assert output[1:].isfinite().all()


def test_logits_that_are_all_minus_infinity() -> None:
    layout = generators.make_layout(1, 64)
    case = make_case("minus infinity", layout, group=2, slots=(0,), exact=((0, 70),), rest=False)
    case.query[:] = case.query.abs()
    page = case.exact_table[0, : -(-70 // layout.exact_tokens)].long()
    case.exact_keys[page] = -torch.inf
    output, lse = case.check()
    assert (lse == -torch.inf).all()
    assert output.isnan().all()


def test_stretches_of_minus_infinity_weigh_nothing() -> None:
    layout = generators.make_layout(1, 64)
    case = make_case("stretches", layout, group=2, slots=(8,), exact=((0, 1300),), rest=False)
    case.query[:] = case.query.abs()
    case.exact_keys[case.exact_table[0, :9].long()] = -torch.inf  # all of the first split, a tile of the second
    output, lse = case.check()
    assert output.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.cpu_kernel
def test_opcheck() -> None:
    case = make_case("opcheck", generators.make_layout(2, 64), slots=(3, 2), exact=((0, 70), (64, 80)))
    case.slot_pages[:] = 0  # opcheck compares arguments, and NaN is not itself
    torch.library.opcheck(
        torch.ops.shadowkv.sparse_attention.default,
        (
            case.query, case.slot_ids, case.slot_table, case.slot_pages, case.exact_keys, case.exact_values,
            case.exact_table, case.exact_start, case.seq_lens, torch.zeros_like(case.rest_values),
            torch.zeros_like(case.rest_lse), case.scale, case.layout.ints, torch.zeros(0),
            torch.zeros_like(case.output), torch.zeros_like(case.lse),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda t: t.half(), r"query: expected dtype DTYPE, got Half"),
        ("query", lambda t: t[:, :5].contiguous(), r"query: expected a multiple of 2 heads, got 5"),
        ("query", lambda t: t.mT.contiguous().mT, r"query: expected stride 1 in the last dimension, got strides"),
        ("slot_ids", lambda t: t.long(), r"slot_ids: expected dtype Int, got Long"),
        ("slot_ids", lambda t: t[:2], r"slot_ids: expected shape \[3, 2, any\], got \[2, 2, 24\]"),
        ("slot_table", lambda t: t[:2], r"slot_table: expected shape \[3, any\], got \[2, 4\]"),
        ("slot_pages", lambda t: t.float(), r"slot_pages: expected dtype Byte, got Float"),
        ("exact_keys", lambda t: t[..., :32], r"exact_keys: expected shape \[any, 2, 64, 64\], got"),
        ("exact_keys", lambda t: t.half(), r"exact_keys: expected dtype DTYPE, got Half"),
        ("exact_values", lambda t: t[1:], r"exact_values: expected shape \[\d+, 2, 64, 64\], got"),
        ("exact_table", lambda t: t.float(), r"exact_table: expected dtype Int, got Float"),
        ("exact_start", lambda t: t[:, None], r"exact_start: expected 1 dimensions \[3\], got 2 dimensions \[3, 1\]"),
        ("seq_lens", lambda t: t.long(), r"seq_lens: expected dtype Int, got Long"),
        ("rest_values", lambda t: t.half(), r"rest_values: expected dtype Float, got Half"),
        ("rest_values", lambda t: t[:, :4].contiguous(), r"rest_values: expected shape \[3, 8, 64\], got \[3, 4, 64\]"),
        ("rest_lse", lambda t: t.T.contiguous().T, r"rest_lse: expected contiguous memory, got strides \[1, 3\]"),
        ("output", lambda t: t.half(), r"output: expected dtype DTYPE, got Half"),
        ("output", lambda t: t[:, :4], r"output: expected shape \[3, 8, 64\], got \[3, 4, 64\]"),
        ("lse", lambda t: t.T.contiguous().T, r"lse: expected contiguous memory, got strides \[1, 3\]"),
        ("lse", lambda t: t.double(), r"lse: expected dtype Float, got Double"),
        ("layout", lambda x: replace(x, exact_tokens=24), r"layout: exact_tokens must be a multiple of 16"),
        ("layout", lambda x: replace(x, slot_values=-1), r"layout: slot_values must be \d+ bytes inside a page"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(name: str, change, message: str) -> None:
    case = make_case("errors", generators.make_layout(2, 64))
    case.run()  # the control
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(RuntimeError, match=message.replace("DTYPE", generators.default_dtype_name())):
        case.run()
