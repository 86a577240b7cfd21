"""The model of a step on a GPU: its arithmetic, and the numbers that were worked out by hand before it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.step_model.__main__ import answer, parser, updated
from benchmarks.step_model.assumed import CASES, MACHINES, Assumed, Case
from benchmarks.step_model.model import Model, Op

BF16, FP8, SHIPPED = CASES[:3]
OURS = replace(SHIPPED, bf16_values=True)
"""As it was when it was worked out by hand."""


def model(case: Case = OURS, tokens: int = 122_880, machine: str = "H100", **assumed: float) -> Model:
    assumed = {"logits_instructions": 231} | assumed  # landmarks were in int8
    return Model(MACHINES[machine], replace(Assumed(), **assumed), case, tokens)


@pytest.mark.parametrize(
    ("op", "limits", "times"),
    [
        ("logits", (2.71, 21.7, 86.9), (13, 68, 254)),
        ("pick", None, (42, 42, 84)),
        ("rest", None, (16, 18, 53)),
        ("plan_slots", None, (13, 13, 15)),
        ("fill_slots", (45, 362, 1449), (57, 424, 1683)),
        ("sparse_attention", (4.4, 35, 139), (18, 50, 168)),
    ],
)
def test_an_op_takes_what_was_worked_out_by_hand(
    op: str, limits: tuple[float, ...] | None, times: tuple[float, ...]
) -> None:
    """On 2026-11-22, in whole µs, an H100 at 122,880 tokens and batches of 1, 8 and 32."""
    made = [model().ops(batch)[op] for batch in (1, 8, 32)]
    assert [took.time for took in made] == pytest.approx(times, rel=0.01, abs=0.5)
    if limits:
        assert [took.limit for took in made] == pytest.approx(limits, rel=0.01, abs=0.05)


def test_a_layer_takes_what_was_worked_out_by_hand() -> None:
    for case, times in ((OURS, (162, 618, 2259)), (BF16, (185, 1423, 5661)), (FP8, (107, 799, 3168))):
        assert [model(case).layer(batch) for batch in (1, 8, 32)] == pytest.approx(times, rel=0.01)
    assert model(replace(OURS, resident=1.0)).layer(1) == pytest.approx(117, abs=0.5)


@pytest.mark.parametrize(
    ("case", "tokens", "requests", "rate"),
    [
        (BF16, 122_880, 3, 127),
        (FP8, 122_880, 7, 243),
        (OURS, 122_880, 21, 379),
        (replace(OURS, of_scored=True), 122_880, 21, 480),
        (OURS, 122_880, 14, 359),
        (replace(OURS, bf16_values=False), 122_880, 21, 549),  # the page had 520
        (replace(OURS, at_limit=True), 122_880, 21, 524),  # 507 with landmarks in int8
        (BF16, 32_768, 13, 492),
        (FP8, 32_768, 26, 893),
        (OURS, 32_768, 49, 583),
    ],
)
def test_a_step_takes_what_was_worked_out_by_hand(case: Case, tokens: int, requests: int, rate: float) -> None:
    assert model(replace(case, requests=requests), tokens).rate == pytest.approx(rate, rel=0.01)
    if case.backend != "shadowkv":
        assert model(case, tokens).requests == requests, "as many fit"


def test_no_prediction_is_below_its_bytes() -> None:
    for case in CASES:
        for machine in MACHINES:
            made = model(case, 32_768, machine)
            assert all(op.time >= op.limit for op in made.ops(made.requests).values())
            assert made.step >= replace(made, case=replace(case, at_limit=True)).step
            assert made.requests == made.plan.requests(case.backend, 32_768) > 0


class Parted(Model):
    """10 µs of selection a part, 100 a row over the link, 20 a row of attention."""

    def ops(self, rows: int) -> dict[str, Op]:
        return {"pick": Op(0, 10), "fill_slots": Op(0, 100 * rows), "sparse_attention": Op(0, 20 * rows)}


@pytest.mark.parametrize(
    ("rows", "parts", "time"),
    [
        (4, 1, 10 + 400 + 80),
        (4, 2, 10 + 400 + 40),  # the first half attends beside the second half's link
        (4, 4, 10 + 400 + 20),
        (5, 2, 10 + 500 + 40),  # three rows, then two
        (1, 4, 10 + 100 + 20),
    ],
)
def test_parts_share_the_link(rows: int, parts: int, time: float) -> None:
    made = model(replace(OURS, parts=parts))
    assert Parted(made.machine, made.assumed, made.case, made.tokens).layer(rows) == time


def test_what_is_asked_changes_the_bytes_that_it_should() -> None:
    plain = model().row
    assert plain.link == pytest.approx(0.4 * 381 * 8 * 2048)
    int8 = model(replace(OURS, bf16_values=False)).row
    assert int8.link == pytest.approx(plain.link * (1024 + 32) / 2048)  # with a scale per token
    assert model(replace(OURS, resident=0.25)).row.link == pytest.approx(0.75 * plain.link)
    scored = model(replace(OURS, of_scored=True)).row
    assert (1 - scored.hits) * scored.selected == pytest.approx(0.4 * 256)
    narrow = model(replace(OURS, slot_bits=8))
    assert narrow.row.attended == plain.attended - 381 * 8 * 8 * 256
    twice = model(replace(OURS, slots=768, slot_bits=8))
    assert twice.requests == model().requests > model(replace(OURS, slots=768)).requests


def test_a_bandwidth_and_an_assumption_can_be_put_in() -> None:
    def rate(*line: str) -> float:
        given = parser().parse_args(["--machine", "H100", "--contexts", "122880", "--hits", "0.6", *line])
        whole = next(sheet for sheet in answer(given) if "the whole model" in sheet.title)
        assert [row[0] for row in whole.rows] == ["FlashAttention, bf16", "FlashAttention, fp8", "as asked"]
        return float(whole.rows[-1][6])

    usual = rate()
    now = Assumed().logits_instructions
    assert usual == pytest.approx(model(SHIPPED, logits_instructions=now).rate, abs=0.5)
    assert rate("--link-gbs", "25") < 0.7 * usual
    assert rate("--assume", "link_share=0.432") == rate("--link-gbs", "27.5")
    assert rate("--memory-gbs", "4800") > usual
    assert rate("--slots", "768", "--parts", "2") > usual > rate("--bf16-values")
    alone = answer(parser().parse_args(["--kv-cache-gib", "10", "--contexts", "122880"]))
    assert any(row[-1].startswith("-, ") for sheet in alone for row in sheet.rows), "no request of bf16 fits"
    for line in (["--assume", "speed=1"], ["--contexts", "5000"], ["--host-gib", "1"], ["--slots", "8"]):
        with pytest.raises(ValueError, match=r"assumption|whole blocks|host memory|slot_chunks"):
            answer(parser().parse_args(line))


def test_a_page_gets_the_tables_of_its_titles() -> None:
    sheets = answer(parser().parse_args(["--hits", "0.5"]))[-2:]
    page = "\n\n".join(f"**{sheet.title}**\n\n| old |\n| --- |\n\nWhy." for sheet in sheets)
    new = updated(page, sheets)
    assert "old" not in new
    assert new.count("\n\nWhy.") == 2
    assert updated(new, sheets) == new == updated(f"**{sheets[0].title}**" + new[new.index("\n") :], sheets)
    with pytest.raises(ValueError, match="has no line"):
        updated("", sheets)
