"""What the studies of the real decoder count, on numbers made by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy.layers import planted
from benchmarks.accuracy.sealed_method import Sealed
from benchmarks.accuracy.view import attend, choose, full_attention, relative_error
from benchmarks.smollm2 import keys, selection, slots
from benchmarks.smollm2.selection import BEFORE, BEST, BUDGETS, CHOICES, NOW, Found
from benchmarks.smollm2.settings import shadowkv


def test_the_least_recently_used_slot_is_given_up() -> None:
    filling = [[0, 1]] * slots.FILLING
    assert slots.hit_share([*filling, [0, 1]], 2) == 1
    assert slots.hit_share([*filling, [2, 3], [0, 1]], 2) == 0
    assert slots.hit_share([*filling, [2, 3], [0, 1]], 4) == 0.5
    assert slots.hit_share([*filling, [1, 2], [0, 3]], 3) == 0.5  # 0 is still there
    assert slots.hit_share([*filling, [1, 2], [3, 4], [1, 2]], 3) == pytest.approx(2 / 6)  # 1 is not, 2 is


def test_what_truly_gets_attention_is_the_best_choice() -> None:
    layer = planted(torch.Generator().manual_seed(0), 1024, num_queries=8, num_kv_heads=2, num_heads=8, head_size=64)
    view, full = Sealed(codec="none", rest=False).view(layer), full_attention(layer)
    by_score, best = (relative_error(attend(view, layer, 8, truly), full).mean() for truly in (False, True))
    assert best < 0.9 * by_score
    chosen, _ = choose(view, layer, 1, 8)
    assert (chosen.sum(1) == view.forced[1].sum() + 8).all()
    assert (chosen & view.forced[1] == view.forced[1]).all()


def test_the_table_says_how_much_of_the_way_is_gone() -> None:
    errors = {BEFORE: 0.2, BEST: 0.1, NOW: 0.15}
    records = [
        Found(text, 0, choice, dict.fromkeys(BUDGETS, errors.get(choice, 0.2) * scale))
        for choice in CHOICES
        for text, scale in (("manual", 1), ("code", 2))
    ]
    line = next(line for line in selection.markdown(records).splitlines() if line.startswith(f"| {NOW} |"))
    assert line == f"| {NOW} | 0.225 | 0.225 | 0.225 | -25/-25/-25 | -25/-25/-25 | +50/+50/+50 |"


def test_settings_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected stock, 3.5 %, .*, got defualt"):
        shadowkv("defualt", 4352)


def test_keys_of_8_and_4_bits_lose_less_than_those_of_8() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = planted(generator, 1024, num_queries=8, num_kv_heads=2, num_heads=8, head_size=64)
    records = keys.measure("planted", 3, layer)
    assert [record.code for record in records] == list(keys.CODES)
    lost = {record.code: record for record in records}
    assert (lost[keys.EIGHT].rank, lost[keys.EIGHT].leading) == (32, 32)
    assert (lost[keys.PAGE].rank, lost[keys.PAGE].leading) == (64, 16)
    assert lost[keys.EXACT].keys == 0
    assert max(lost[keys.EXACT].outputs["all"], 1e-5) == 1e-5
    assert lost[keys.PAGE].keys < lost[keys.EIGHT].keys
    line = keys.markdown(records).splitlines()[2]
    assert line.startswith(f"| {keys.PAGE} | 64, 16 | {lost[keys.PAGE].keys:.3f} |")
