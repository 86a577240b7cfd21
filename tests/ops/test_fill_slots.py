from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generators import (
    exact_keys_layout,
    fill_slot_pages,
    make_generator,
    make_sealed,
    make_slot_table,
    randint,
    rope_table,
)
from numeric import assert_bytes_equal, assert_close
from rebuilt import BF16, F32, LAYOUTS, WIDE, every_layout, every_rotary, keys64, layout_id, small_layout, values64
from torch import Tensor

from vllm_shadowkv import ops, reference
from vllm_shadowkv.page import PageLayout

Arguments = dict[str, Any]
OUTSIDE = 2**31 - 1
GUARD = 30  # pages behind the pool


def exact_layout(dtype: torch.dtype | None = None) -> PageLayout:
    """Rank 0, values as they are: every result is a copy."""
    return exact_keys_layout(2, 64, dtype, rank=None, block_size=128)


EXACT = [exact_layout(dtype) for dtype in (F32, BF16)]


def make_arguments(
    layout: PageLayout,
    rotary_dim: int = 64,
    is_neox: bool = True,
    num_blocks: tuple[int, ...] = (2, 0, 3),
    places: int = 14,
) -> Arguments:
    """Arguments of the op in its order. Shadow pages and slot pages lie in one pool, as they do in vLLM."""
    generator = make_generator(layout_id(layout), rotary_dim, is_neox, places)
    rows, heads = len(num_blocks), layout.num_kv_heads
    pages_per_row = -(-places // layout.slots_per_page)
    sealed = make_sealed(generator, layout, num_blocks, spare_ids=rows * pages_per_row + 2, structured=False)
    slot_table = make_slot_table(generator, sealed.free, rows, pages_per_row)
    fill_slot_pages(generator, layout, sealed.pages, slot_table)
    chunk_ids = torch.full((rows, heads, places), -1, dtype=torch.int32)
    slot_ids, misses = chunk_ids.clone(), chunk_ids.clone()
    num_misses = torch.zeros(rows, heads, dtype=torch.int32)
    for row, count in enumerate(num_blocks):
        for head in range(heads):
            chosen = torch.randperm(count * layout.chunks, generator=generator)[: places - head % 2].sort().values
            if count and layout.num_outliers:  # an outlier is always selected
                chosen[0] = layout.view(sealed.pages, "outlier_ids")[int(sealed.block_table[row, 0]), head, -1]
                chosen = chosen.unique()
            chunk_ids[row, head, : len(chosen)] = chosen
            slots = torch.randperm(pages_per_row * layout.slots_per_page, generator=generator)[: len(chosen)]
            slot_ids[row, head, : len(chosen)] = slots
            missed = torch.rand(len(chosen), generator=generator).lt(0.6).nonzero().flatten()
            missed = torch.cat((torch.zeros(min(len(chosen), 1)), missed[missed > 0])).int()  # the outlier among them
            misses[row, head, : len(missed)] = missed
            num_misses[row, head] = len(missed)
    return {
        "chunk_ids": chunk_ids,
        "slot_ids": slot_ids,
        "misses": misses,
        "num_misses": num_misses,
        "pages": sealed.pages,
        "block_table": sealed.block_table,
        "host_pool": sealed.host_pool,
        "cos_sin": rope_table(max(num_blocks) * layout.block_size, rotary_dim),
        "is_neox": is_neox,
        **no_sources(layout, sealed.pages),
        "slot_table": slot_table,
        "slot_pages": sealed.pages,
        "layout": layout,
        "counts": torch.tensor([7, 8, 9, 2**40]),
    }


def no_sources(layout: PageLayout, pages: Tensor) -> Arguments:
    """Exact pages that no block was sealed from, in the order of CUDA."""
    num_pages, per_block = len(pages), layout.block_size // layout.exact_tokens
    ids = torch.tensor([0, -1, num_pages, OUTSIDE, -(2**31)], dtype=torch.int32)
    both = torch.full((num_pages, layout.num_kv_heads, layout.exact_tokens, 2 * layout.head_size), torch.nan)
    both = both.to(layout.dtype)
    return {
        "sources": ids.repeat(num_pages * per_block)[: num_pages * per_block].view(num_pages, per_block),
        "epochs": torch.arange(1, num_pages + 1),
        "exact_keys": both[..., : layout.head_size],
        "exact_values": both[..., layout.head_size :],
    }


def add_sources(arguments: Arguments, transposed: bool) -> None:
    """Every block was sealed from pages of which some were written to since; `transposed`: keys as on a CPU."""
    layout, generator = arguments["layout"], make_generator("sources", layout_id(arguments["layout"]))
    heads, tokens, size = layout.num_kv_heads, layout.exact_tokens, layout.head_size
    num_pages, per_block = arguments["sources"].shape
    content = torch.randn(num_pages, heads, 2, tokens * size, generator=generator).to(layout.dtype)
    if transposed:
        keys = content[:, :, 0].unflatten(-1, (size, tokens)).transpose(-1, -2)
        values = content[:, :, 1].unflatten(-1, (tokens, size))
    else:
        keys, values = content.view(num_pages, heads, tokens, 2 * size).split(size, -1)
    arguments["exact_keys"], arguments["exact_values"] = keys, values
    arguments["sources"] = torch.randint(1, num_pages, (num_pages, per_block), generator=generator, dtype=torch.int32)
    arguments["epochs"] = torch.randint(5, 9, (num_pages,), generator=generator)
    for number, block in enumerate(sorted({block for _, _, _, block, _, _ in each_miss(arguments)})):
        arguments["epochs"][block] = (9, 4, 7)[number % 3]  # later than all sources, than none, than some


def run(arguments: Arguments, function: Callable[..., None] = ops.fill_slots, resident: int = 0) -> Tensor:
    """The pool after a call, which has not written behind it, and has counted so many resident chunks among all."""
    num_pages = len(arguments["slot_pages"])
    guarded = torch.full((num_pages + GUARD, arguments["slot_pages"].shape[1]), 0xA5, dtype=torch.uint8)
    pages = guarded[:num_pages]
    pages.copy_(arguments["slot_pages"])
    own, counts = arguments["pages"] is arguments["slot_pages"], arguments["counts"].clone()
    function(**(arguments | {"slot_pages": pages, "pages": pages if own else arguments["pages"], "counts": counts}))
    assert (guarded[num_pages:] == 0xA5).all()
    counted = (counts - arguments["counts"]).tolist()
    assert counted[:3] == [0, 0, resident]
    assert counted[3] <= int(arguments["num_misses"].clamp(0, arguments["misses"].shape[-1]).sum()) - resident
    return pages


def each_miss(arguments: Arguments) -> list[tuple[int, int, int, int, int, int]]:
    """(slot page, head, place in it, block, column of the block, chunk in the block) of every miss."""
    layout = arguments["layout"]
    result = []
    for row, head in arguments["num_misses"].nonzero().tolist():
        for i in arguments["misses"][row, head, : int(arguments["num_misses"][row, head])].tolist():
            column, chunk = divmod(int(arguments["chunk_ids"][row, head, i]), layout.chunks)
            slot_column, place = divmod(int(arguments["slot_ids"][row, head, i]), layout.slots_per_page)
            page, block = int(arguments["slot_table"][row, slot_column]), int(arguments["block_table"][row, column])
            result.append((page, head, place, block, column, chunk))
    return result


@every_layout
@every_rotary
def test_fill_slots(layout: PageLayout, rotary_share: float, is_neox: bool) -> None:
    places = 6 if layout.num_kv_heads == 8 else 14  # the reference is slow
    arguments = make_arguments(layout, int(rotary_share * layout.head_size), is_neox, places=places)
    pages, host_pool = arguments["pages"].clone(), arguments["host_pool"].clone()
    actual = run(arguments)
    same_maths = run(arguments, reference.fill_slots)
    assert_bytes_equal(arguments["host_pool"], host_pool, "host_pool")

    misses = each_miss(arguments)
    assert len(misses) > 10
    slot_page, head, place, block, column, chunk = (torch.tensor(part) for part in zip(*misses, strict=True))
    where = (slot_page, head, place)
    sealed = {}
    for physical, index in set(zip(block.tolist(), column.tolist(), strict=True)):
        keys = keys64(pages, physical, index * layout.block_size, arguments["cos_sin"], is_neox, layout)
        sealed[physical] = (keys, values64(host_pool, physical, layout))

    exact = torch.ones(len(misses), dtype=torch.bool)
    if layout.rank:
        outliers = layout.view(pages, "outlier_ids")[block, head]
        exact = (outliers == chunk[:, None]).any(-1)
        assert not exact.all()
        assert exact.any() or not layout.num_outliers
    got, same = (layout.view(pool, "slot_keys")[where] for pool in (actual, same_maths))
    assert_bytes_equal(got[exact], same[exact], "copied keys")
    places = list(zip(block.tolist(), chunk, head, strict=True))
    expected = [_chunk(sealed[physical][0], layout, *at) for physical, *at in places]
    assert_close(got, torch.stack(expected), same, "keys")
    layout.view(same_maths, "slot_keys")[where] = got

    if layout.value_int8:
        got, same = (layout.view(pool, "slot_values")[where] for pool in (actual, same_maths))
        expected = [_chunk(sealed[physical][1], layout, *at) for physical, *at in places]
        assert_close(got, torch.stack(expected), same, "values")
        layout.view(same_maths, "slot_values")[where] = got
    assert_bytes_equal(actual, same_maths, "all other bytes of the pool")


def test_basis_in_panels() -> None:
    test_fill_slots(WIDE, 1.0, True)


@pytest.mark.parametrize("layout", [LAYOUTS[i] for i in (2, 5, 7, 13)] + [WIDE], ids=layout_id)
def test_neighbours_of_one_cta(layout: PageLayout) -> None:
    """Many rows leave several misses of a row to a CTA; rows without any change nothing."""
    arguments = make_arguments(layout, num_blocks=(1, 2), places=14)
    arguments["slot_ids"][1, 0, arguments["misses"][1, 0, 1]] = -1  # one of them is skipped
    expected = run(arguments)
    rows = 1600 // layout.num_kv_heads
    for name in ("chunk_ids", "slot_ids", "misses", "num_misses", "block_table", "slot_table"):
        many = arguments[name].new_zeros(rows, *arguments[name].shape[1:])
        many[-2:] = arguments[name]
        arguments[name] = many
    assert_bytes_equal(run(arguments), expected)


@pytest.mark.parametrize("transposed", [True, False], ids=["keys transposed", "keys in rows"])
@every_layout
def test_resident(layout: PageLayout, transposed: bool, kernel: str) -> None:
    """Chunks whose source was not written to since their block was sealed are copied from there."""
    if transposed and kernel != "cpu":
        pytest.skip("exact pages of CUDA have no such order")
    arguments = make_arguments(layout, layout.head_size, places=6 if layout.num_kv_heads == 8 else 14)
    add_sources(arguments, transposed)
    copied, rebuilt = [], []
    for miss in each_miss(arguments):
        block, chunk = miss[3], miss[5]
        column, token = divmod(chunk * layout.chunk_size, layout.exact_tokens)
        source = int(arguments["sources"][block, column])
        resident = arguments["epochs"][source] < arguments["epochs"][block]
        (copied if resident else rebuilt).append((*miss, source, token))
    assert copied
    assert rebuilt
    expected = run(arguments | no_sources(layout, arguments["pages"]))
    actual = run(arguments, resident=len(copied))
    counts = arguments["counts"].clone()
    ops.fill_slots(**(arguments | {"slot_pages": arguments["slot_pages"].clone(), "counts": counts}))
    assert (counts - arguments["counts"]).tolist() == [0, 0, len(copied), len(rebuilt)]
    for slot_page, head, place, _, _, _, source, token in copied:
        for section, pages in (("slot_keys", "exact_keys"), ("slot_values", "exact_values")):
            got = layout.view(actual, section)[slot_page, head, place]
            assert_bytes_equal(got, arguments[pages][source, head, token : token + layout.chunk_size], section)
            layout.view(expected, section)[slot_page, head, place] = got
    assert_bytes_equal(actual, expected, "what is not resident")
    run(arguments, reference.fill_slots, resident=len(copied))


def _chunk(tokens: Tensor, layout: PageLayout, chunk: Tensor, head: Tensor) -> Tensor:
    first = int(chunk) * layout.chunk_size
    return tokens[first : first + layout.chunk_size, int(head)]


def test_agrees_with_expand_blocks() -> None:
    """A chunk in a slot is bit for bit the chunk that a prefill sees."""
    layout = LAYOUTS[7]
    arguments = make_arguments(layout)
    pages = run(arguments)
    for slot_page, head, place, block, column, chunk in each_miss(arguments):
        keys = torch.empty(1, layout.block_size, layout.num_kv_heads, layout.head_size, dtype=layout.dtype)
        values = torch.empty_like(keys)
        ops.expand_blocks(
            torch.tensor([block], dtype=torch.int32),
            torch.tensor([column * layout.block_size], dtype=torch.int32),
            arguments["pages"],
            arguments["host_pool"],
            arguments["cos_sin"],
            True,
            layout,
            keys,
            values,
        )
        for section, expected in (("slot_keys", keys), ("slot_values", values)):
            got = layout.view(pages, section)[slot_page, head, place]
            assert_bytes_equal(got, _chunk(expected[0], layout, torch.tensor(chunk), torch.tensor(head)), section)


def _set(name: str, index: Any, value: int) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments[name][index] = value

    return change


@pytest.mark.parametrize("layout", [*EXACT, LAYOUTS[5]], ids=layout_id)
@pytest.mark.parametrize(
    "change",
    [
        *(_set("chunk_ids", (0, 0, 0), bad) for bad in (-1, OUTSIDE, -(2**31))),
        *(_set("slot_ids", (0, 0, 0), bad) for bad in (-1, OUTSIDE, -(2**31))),
        *(_set("misses", (0, 0, 0), bad) for bad in (-1, 14, OUTSIDE)),
        *(_set("block_table", (2, 1), bad) for bad in (-1, 0, 40, OUTSIDE)),
        *(_set("slot_table", (0, 0), bad) for bad in (-1, 40, OUTSIDE)),
    ],
)
def test_what_is_invalid_is_skipped(layout: PageLayout, change: Callable[[Arguments], None]) -> None:
    arguments = make_arguments(layout)
    before = run(arguments)
    assert len(arguments["pages"]) <= 40 < len(arguments["pages"]) + GUARD
    change(arguments)
    after = run(arguments)
    assert not torch.equal(before, after), "the change hits a miss"
    expected = run(arguments, reference.fill_slots)
    if layout.rank:
        assert torch.equal((after == arguments["pages"]).all(1), (expected == arguments["pages"]).all(1))
    else:
        assert_bytes_equal(after, expected)


def test_another_pool_for_slots() -> None:
    """Slot pages may be a tensor of their own, with another number of pages, rows apart."""
    arguments = make_arguments(exact_layout())
    expected = run(arguments)
    wide = torch.full((len(expected) + 3, expected.shape[1] + 64), 7, dtype=torch.uint8)
    wide[: len(expected), :-64] = arguments["pages"]
    arguments["slot_pages"] = wide[:, :-64]
    ops.fill_slots(**arguments)
    assert_bytes_equal(wide[: len(expected), :-64], expected)
    assert (wide[:, -64:] == 7).all()
    assert (wide[len(expected) :] == 7).all()


@pytest.mark.parametrize("name", ["chunk_ids, slot_ids, misses, num_misses, block_table, slot_table", "num_misses"])
def test_empty(name: str) -> None:
    """No rows, or rows without a miss."""
    arguments = make_arguments(small_layout())
    for part in name.split(", "):
        arguments[part] = arguments[part] * 0 if part == name else arguments[part][:0]
    assert_bytes_equal(run(arguments), arguments["pages"])


def test_empty_places() -> None:
    arguments = make_arguments(small_layout())
    for part in ("chunk_ids", "slot_ids", "misses"):
        arguments[part] = arguments[part][..., :0].contiguous()
    arguments["num_misses"].zero_()
    assert_bytes_equal(run(arguments), arguments["pages"])


def test_columns_of_a_wider_table() -> None:
    """Block and slot tables may be the first columns of wider ones."""
    arguments = make_arguments(exact_layout())
    expected = run(arguments)
    for name in ("block_table", "slot_table"):
        table = arguments[name]
        wide = randint(make_generator(name), -5, 50, len(table), table.shape[1] + 3)
        wide[:, : table.shape[1]] = table
        arguments[name] = wide[:, : table.shape[1]]
    assert_bytes_equal(run(arguments), expected)


@pytest.mark.cpu_kernel
def test_threads_do_not_matter() -> None:
    arguments = make_arguments(LAYOUTS[1], places=40, num_blocks=(5, 1, 4))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(arguments))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_bytes_equal(result, results[0])


@pytest.mark.parametrize("layout", [LAYOUTS[3], LAYOUTS[16]], ids=layout_id)
def test_position_beyond_the_table(layout: PageLayout, kernel: str) -> None:
    """The CPU kernel raises; on CUDA the chunk is skipped."""
    arguments = make_arguments(layout)
    highest = int(arguments["chunk_ids"].amax())
    everywhere = arguments["chunk_ids"] >= 0
    arguments["misses"] = torch.where(everywhere, torch.arange(14, dtype=torch.int32), -1)
    arguments["num_misses"] = everywhere.sum(-1, dtype=torch.int32)
    needed = (highest + 1) * layout.chunk_size
    arguments["cos_sin"] = rope_table(needed, 64)
    everything = run(arguments)
    arguments["cos_sin"] = arguments["cos_sin"][:-1]
    if kernel == "cpu":
        message = f"cos_sin: expected a row for every position up to {needed - 1}, got {needed - 1} rows"
        with pytest.raises(RuntimeError, match=message):
            ops.fill_slots(**arguments)
        return
    actual = run(arguments)
    for slot_page, head, place, _, column, chunk in each_miss(arguments):
        beyond = column * layout.chunks + chunk == highest
        for section in ("slot_keys", "slot_values"):
            got = layout.view(actual, section)[slot_page, head, place]
            expected = arguments["pages"] if beyond else everything
            assert_bytes_equal(got, layout.view(expected, section)[slot_page, head, place], section)


@pytest.mark.parametrize(("change", "message"), [(15, r"got \d+ at row 0"), (-15, r"got -\d+ at row 0")])
def test_impossible_counts(change: int, message: str, kernel: str) -> None:
    """The CPU kernel raises; on CUDA there are as many misses as places at most, and no fewer than none."""
    arguments = make_arguments(small_layout())
    everything = run(arguments)
    arguments["num_misses"] += change
    if kernel == "cpu":
        with pytest.raises(RuntimeError, match=f"num_misses: expected 0 to 14 .*, {message}, KV head 0"):
            ops.fill_slots(**arguments)
    else:
        assert_bytes_equal(run(arguments), everything if change > 0 else arguments["pages"])


@pytest.mark.parametrize("layout", [*EXACT, LAYOUTS[3], LAYOUTS[16]], ids=layout_id)
def test_positions_without_rotation_have_no_bound(layout: PageLayout) -> None:
    rotary_dim = 0 if layout.rank else 64
    arguments = make_arguments(layout, rotary_dim)
    expected = run(arguments)
    arguments["cos_sin"] = torch.empty(0, rotary_dim)
    assert_bytes_equal(run(arguments), expected)


@pytest.mark.cpu_kernel
def test_opcheck() -> None:
    arguments = make_arguments(small_layout())
    arguments |= {"layout": arguments["layout"].ints, "slot_pages": arguments["pages"].clone()}
    torch.library.opcheck(torch.ops.shadowkv.fill_slots.default, tuple(arguments.values()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("chunk_ids", lambda t: t.long(), "chunk_ids: expected dtype Int, got Long"),
        ("chunk_ids", lambda t: t.repeat(1, 2, 1), r"chunk_ids: expected shape \[any, 1, any\], got \[3, 2, 14\]"),
        ("slot_ids", lambda t: t[..., :-1].contiguous(), r"slot_ids: expected shape \[3, 1, 14\], got \[3, 1, 13\]"),
        ("misses", lambda t: t.transpose(0, 2), "misses: expected contiguous memory"),
        ("num_misses", lambda t: t[0], "num_misses: expected 2 dimensions"),
        ("pages", lambda t: t[:, 64:], "pages: expected shape"),
        ("block_table", lambda t: t[:2], r"block_table: expected shape \[3, any\]"),
        ("block_table", lambda t: t.repeat(1, 2)[:, ::2], "block_table: expected contiguous memory within a row"),
        ("host_pool", lambda t: t[:-1], "host_pool: expected as many rows as pages"),
        ("cos_sin", lambda t: t.bfloat16(), "cos_sin: expected dtype Float, got BFloat16"),
        ("cos_sin", lambda t: t[:, :7].contiguous(), "cos_sin: expected an even rotary_dim"),
        ("sources", lambda t: t[:, :-1].contiguous(), r"sources: expected shape \[\d+, \d\], got"),
        ("epochs", lambda t: t[:-1], r"epochs: expected shape"),
        ("exact_keys", lambda t: t[:, :0], "exact_keys: expected shape"),
        (
            "exact_values",
            lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
            "exact_values: expected stride 1 in the last",
        ),
        ("exact_values", lambda t: t[:-1], "exact_values: expected shape"),
        ("slot_table", lambda t: t.float(), "slot_table: expected dtype Int, got Float"),
        ("slot_pages", lambda t: t[:, 1:], "slot_pages: expected shape"),
        ("counts", lambda t: t[:3], r"counts: expected shape \[4\], got \[3\]"),
        ("slot_pages", lambda t: t.flatten()[4 : 4 - t.shape[1]].view(-1, t.shape[1]), "slot_pages: expected rows al"),
    ],
)
def test_errors(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = make_arguments(small_layout())
    ops.fill_slots(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        ops.fill_slots(**arguments)
