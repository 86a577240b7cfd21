"""The accuracy harness: its statistics, and that what it studies is what the reference computes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import needle_methods, studies
from benchmarks.accuracy.ask import Reply, Request
from benchmarks.accuracy.collect import collect, read_records
from benchmarks.accuracy.compare import compare, markdown
from benchmarks.accuracy.layers import Layer, planted
from benchmarks.accuracy.lm_eval_harness import TrapError, check
from benchmarks.accuracy.needle_methods import METHODS, Haystack
from benchmarks.accuracy.paired import Flips, divergence, most_lost
from benchmarks.accuracy.paper_method import Paper, rank_at
from benchmarks.accuracy.samples import Sample, needles
from benchmarks.accuracy.sealed_method import Sealed
from benchmarks.accuracy.view import View, attend, choose, full_attention, relative_error
from benchmarks.needle import CHECKPOINT
from benchmarks.needle.evaluate import load_model
from vllm_shadowkv import reference
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import plan_page
from vllm_shadowkv.rotary import Rotary

CONFIG = ShadowKVConfig(block_size=256, compression=4, sparse_budget=64, slot_chunks=40, num_outlier_chunks=2)


@pytest.fixture(scope="module")
def layer():
    made = planted(torch.Generator().manual_seed(1), 1024, 8, num_kv_heads=2, num_heads=8, head_size=64, directions=24)
    return replace(made, query_scales=0.5 + torch.rand(128, generator=torch.Generator().manual_seed(2)))


def test_flips_and_mcnemar() -> None:
    flips = Flips.of([True] * 9 + [False], [True] * 4 + [False] * 5 + [True])
    assert (flips.prompts, flips.baseline, flips.candidate, flips.lost, flips.won) == (10, 9, 5, 5, 1)
    assert flips.points == -40
    assert flips.p_value == pytest.approx(2 * (1 + 6) / 2**6)  # P(at most 1 of 6), both sides
    assert Flips.of([True, False], [True, False]).p_value == 1


def test_the_bound_of_a_guard_is_the_binomial_quantile() -> None:
    assert most_lost(100, 0.0) == 0
    bound = most_lost(200, 0.02, 0.999)
    tail = sum(math.comb(200, i) * 0.02**i * 0.98 ** (200 - i) for i in range(bound + 1))
    before = tail - math.comb(200, bound) * 0.02**bound * 0.98 ** (200 - bound)
    assert before < 0.999 <= tail


def test_divergence_of_all_tokens_is_that_of_the_distributions() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.2, 0.3])
    one, other = ({i: math.log(x) for i, x in enumerate(d.tolist())} for d in (p, q))
    assert divergence(one, other) == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert divergence(one, one) == pytest.approx(0, abs=1e-6)
    fewer = divergence({0: one[0], 1: one[1]}, {0: other[0], 2: other[2]})
    assert 0 < fewer <= divergence(one, other)


def name_of(salt: str) -> str:
    return salt.rsplit(" ", 1)[0]


class Scripted:
    """Answers as told; keeps what it was asked."""

    def __init__(self, wrong: set[str]) -> None:
        self.wrong, self.asked = wrong, []

    def __call__(self, requests: list[Request]) -> list[Reply]:
        self.asked += requests
        replies = []
        for request in requests:
            tokens = [request.prompt[-1] + (name_of(request.salt) in self.wrong)] * request.max_tokens
            replies.append(Reply(request.forced or tokens, [{t: 0.0} for t in request.forced or []]))
        return replies


SAMPLES = [Sample(f"s{i}", "family", [1, 2, 3 + i // 2], [9], 2, [9, 9]) for i in range(4)]


def test_setup_b_caches_the_context_first_and_setup_a_shares_nothing(tmp_path: Path) -> None:
    ask = Scripted(set())
    collect(ask, SAMPLES[:2], ("A", "B"), tmp_path / "out.jsonl", None, None)
    salts = [(name_of(r.salt), len(r.prompt)) for r in ask.asked]
    assert salts == [("A s0", 4), ("A s1", 4), ("B s0", 3), ("B s0", 4), ("B s0", 4)]


def test_a_second_run_finds_nothing_of_the_first_in_a_servers_cache(tmp_path: Path) -> None:
    ask = Scripted(set())
    for name in ("one", "two"):
        collect(ask, SAMPLES[:1], ("A",), tmp_path / f"{name}.jsonl", None, None)
    assert ask.asked[0].salt != ask.asked[1].salt


def test_a_run_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    collect(Scripted(set()), SAMPLES, ("A",), out, None, None)
    whole = out.read_text()
    out.write_text(whole[: len(whole) // 2])
    ask = Scripted(set())
    collect(ask, SAMPLES, ("A",), out, None, None)
    assert sorted(out.read_text().splitlines()) == sorted(whole.splitlines())
    assert 0 < len(ask.asked) < len(SAMPLES)


def test_a_comparison_counts_what_flipped_per_setup(tmp_path: Path) -> None:
    for name, wrong in (("stock", {"A s3"}), ("ours", {"A s1", "B s2"})):
        collect(Scripted(wrong), SAMPLES, ("A", "B"), tmp_path / f"{name}.jsonl", None, None)
    stock, ours = (read_records(tmp_path / f"{name}.jsonl") for name in ("stock", "ours"))
    flips = {row.setup: row.flips for row in compare(stock, ours, False)}
    assert (flips["A"].lost, flips["A"].won) == (1, 1)
    assert (flips["B"].lost, flips["B"].won) == (2, 0)  # s2 and s3 share a context, and so a salt
    assert "| family | 75.0 | 75.0 | 1, 1 of 4 | 1 | 100.0 | 50.0 | 2, 0 of 4 | 0.5 |" in markdown(
        compare(stock, ours, False)
    )


def test_a_trajectory_is_forced(tmp_path: Path) -> None:
    collect(Scripted({"A s1"}), SAMPLES, ("A",), tmp_path / "stock.jsonl", None, None)
    ask = Scripted(set())
    collect(ask, SAMPLES, ("A", "B"), tmp_path / "forced.jsonl", tmp_path / "stock.jsonl", None)
    assert [r.forced for r in ask.asked] == [[9, 9], [10, 10], [9, 9], [9, 9]]


def test_needle_samples_split_context_and_question() -> None:
    samples = list(needles(256, haystacks=2, questions=3))
    assert len({s.name for s in samples}) == len(samples) == 7 * 2 * 3
    assert all(len(s.context) + len(s.question) == 256 for s in samples)
    contexts = {tuple(s.context) for s in samples if s.family == "multi_key"}
    assert len(contexts) == 2


def test_ours_is_what_the_reference_computes(layer) -> None:
    method = Sealed(block_size=256, compression=4, num_outliers=2)
    page = plan_page(CONFIG, 2, 64, torch.bfloat16)
    assert method.page(layer) == page
    view = method.view(layer)

    pages = torch.zeros(5, page.page_bytes, dtype=torch.uint8)
    blocks = torch.arange(1, 5, dtype=torch.int32)
    exact = layer.keys[:1024].unflatten(0, (4, 256)).bfloat16()
    factors = [
        reference.factorise(keys, page.rank, page.leading_rank, layer.query_scales)
        for keys in layer.pre_rope().flatten(1).split(256)
    ]
    stacked = (torch.stack(parts) for parts in zip(*factors, strict=True))
    reference.pack_block(blocks, exact, layer.query_scales, *stacked, pages, page)
    paged = torch.cat((torch.zeros(1, 2, 64, 64), layer.values[:1024].unflatten(0, (16, 64)).transpose(1, 2)))
    exact_ids = torch.arange(1, 17, dtype=torch.int32).view(4, 4)
    host_pool = torch.zeros(5, page.value_row_bytes, dtype=torch.uint8)
    reference.store_values(blocks, exact_ids, paged.bfloat16(), pages, host_pool, page)
    table = layer.rotary.cos_sin
    rebuilt = torch.cat([reference.rebuild_keys(pages, b, 256 * (b - 1), table, True, page) for b in range(1, 5)])
    torch.testing.assert_close(view.keys, rebuilt, rtol=1e-4, atol=1e-4)

    # The reference stops at 5 forced chunks plus what the slots leave to outliers: here all 8.
    ids = torch.full((1, 2, CONFIG.slot_chunks), -1, dtype=torch.int32)
    arguments = (blocks[None], torch.tensor([1024]), torch.tensor([1025]), layer.scale, CONFIG.budget_chunks, page)
    rest_values, rest_lse = torch.zeros(1, 8, 64), torch.zeros(1, 8)
    reference.select_chunks(layer.queries[:1], pages, *arguments, ids, rest_values, rest_lse)
    chosen = torch.zeros(2, 129, dtype=torch.bool).scatter(1, ids[0].long().where(ids[0] >= 0, 128), True)[:, :128]
    forced = torch.cat((view.forced[:, :-4], torch.ones(2, 4, dtype=torch.bool)), 1)
    assert (chosen & forced == forced).all()
    everything = view.keys.new_zeros(view.keys.shape)
    marked = torch.where(chosen.repeat_interleave(8, 1).T[..., None], view.keys, everything)
    output = attend(view, layer, CONFIG.budget_chunks)[:1]
    keys = torch.cat((marked, layer.keys[1024:1025]))
    seen = torch.cat((chosen.repeat_interleave(8, 1), torch.ones(2, 1, dtype=torch.bool)), 1)
    for head in range(8):
        kv = head // 4
        logits = (layer.scale * keys[:, kv] @ layer.queries[0, head]).masked_fill(~seen[kv], -torch.inf)
        logits = torch.cat((logits, rest_lse[0, head, None]))
        values = torch.cat((view.values[:, kv], layer.values[1024:1025, kv], rest_values[0, head, None]))
        torch.testing.assert_close(output[0, head], logits.softmax(0) @ values, rtol=1e-3, atol=1e-3)


def test_the_papers_method_is_exact_where_it_keeps_everything(layer) -> None:
    full = full_attention(layer)
    everything = attend(Paper(rank=128, num_outliers=0).view(layer), layer, 128)
    assert relative_error(everything, full).mean() < 0.03  # bf16 factors
    all_outliers = attend(Paper(rank=16, num_outliers=128).view(layer), layer, 0)
    assert relative_error(all_outliers, full).max() < 1e-5
    low = Paper(rank=16)
    assert relative_error(attend(low.view(layer), layer, 128), full).mean() > 0.02


def test_mean_values_stand_for_what_is_left_out() -> None:
    """Exact where the keys of a chunk are equal, and the values of a group."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(32, 1, 16, generator=generator).repeat_interleave(8, 0)
    values = torch.randn(4, 1, 16, generator=generator).repeat_interleave(64, 0)
    last = torch.randn(1, 1, 16, generator=generator)
    queries = torch.randn(1, 2, 16, generator=generator)
    rotary = Rotary.identity()
    layer = Layer("equal", torch.cat((keys, last)), torch.cat((values, last)), queries, 256, rotary)
    landmarks, nothing = keys[::8].transpose(0, 1), torch.zeros(1, 32, dtype=torch.bool)
    left_out = View(keys, values, landmarks, nothing, ~nothing)
    with_means = replace(left_out, mean_values=values[::64])
    full = full_attention(layer)
    assert relative_error(attend(with_means, layer, 3), full).max() < 1e-5
    assert relative_error(attend(left_out, layer, 3), full).min() > 0.1


def test_bytes_at_equal_rank_come_back_as_that_rank(layer) -> None:
    assert rank_at(Paper(rank=37).bytes_per_token(layer), layer) == 37


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vllm", "--model_args", "pretrained=x"], "max_length is not given; add max_length=4224"),
        (["--model", "local-completions", "--model_args", "model=x"], "would be 2048 for an API model"),
        (
            ["--model", "vllm", "--model_args", '{"max_length": 32768}', "--metadata", '{"max_seq_lengths": [32768]}'],
            "use max_length=32896",
        ),
        (["--model", "local-completions", "--model_args", "model=x,max_length=4224"], "add tokenizer="),
        (
            ["--model", "local-completions", "--model_args", "tokenizer=x,max_length=8192", "--tasks", "longbench"],
            "add --gen_kwargs temperature=0",
        ),
    ],
)
def test_traps_of_long_prompts_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(TrapError, match=r"max_length|tokenizer|temperature") as error:
        check(arguments)
    assert message in str(error.value)


def test_settings_without_a_trap_pass() -> None:
    check(["--model", "vllm", "--model_args", json.dumps({"max_model_len": 4224}), "--tasks", "ruler"])


def test_a_query_sees_all_tokens_behind_the_prompt(layer: Layer) -> None:
    view = Sealed(block_size=256).view(layer)
    newest = replace(layer, queries=layer.queries[-3:])
    torch.testing.assert_close(attend(view, newest, 16), attend(view, layer, 16)[-3:])


@torch.inference_mode()
def test_every_method_answers_needles_in_both_setups() -> None:
    """With a budget that covers the prompt as full attention does; ours without one not at all."""
    model, covering = load_model(CHECKPOINT), 1200
    samples = list(needles(1100, 1, 4, ("multi_key",)))
    haystack = Haystack(model, samples[0].context)
    for setup in ("A", "B"):
        found = [haystack.ask(sample, setup, [0, covering]) for sample in samples]
        assert all(right["full"] for right in found)
        for method in METHODS:
            assert all(right[f"{method}, {covering}"] for right in found), method
        assert not any(right["ours, 0"] for right in found)


def test_a_shorter_context_is_the_end_of_the_longer_one(layer: Layer) -> None:
    """With the budget that covers it nothing but the factors costs anything, and exact keys cost nothing."""
    short = studies.newest(layer, 512)
    assert (short.prompt_tokens, len(short.keys)) == (512, 512 + len(layer.keys) - layer.prompt_tokens)
    assert torch.equal(short.keys, layer.keys[layer.prompt_tokens - 512 :])
    exact = Sealed(codec="none", block_size=256, int8_values=False)
    default = Sealed(block_size=256)
    points = [studies.Variant("", "", method, 4096, context=512) for method in (exact, default)]
    nothing, factors = studies.errors(layer, points)
    assert nothing < 1e-5 < factors < 0.5


def test_ours_and_the_papers_answers_are_paired() -> None:
    names = ("full", *(f"{method}, 256" for method in METHODS))
    ours_right, theirs_right = ({name: name.startswith(who) for name in names} for who in ("ours", "paper"))
    records = [
        {"setup": "A", "family": "single", "right": ours_right},
        {"setup": "A", "family": "mixed", "right": ours_right},
        {"setup": "A", "family": "mixed", "right": theirs_right},
    ]
    found = needle_methods.duels(records, [256])
    assert [(duel.setup, duel.flips.won, duel.flips.lost) for duel in found] == [("A", 2, 1)] * 4
    assert len({(duel.ours, duel.paper) for duel in found}) == 4


def test_the_best_choice_goes_by_the_attention_that_keys_get(layer: Layer) -> None:
    view = Sealed(codec="none", block_size=256, int8_values=False).view(layer)
    best, marks = choose(view, layer, 0, 16, truly_best=True)
    queries = layer.queries.unflatten(1, (2, -1))[:, 0]
    attention = (layer.scale * (queries @ view.keys[:, 0].T)).softmax(-1).sum(1).unflatten(-1, (-1, 8)).sum(-1)
    free = ~view.forced[0]
    for chosen, share in zip(best, attention, strict=True):
        assert chosen[~free].all()
        assert (chosen & free).sum() == 16
        assert share[chosen & free].min() >= share[free & ~chosen].max()
    torch.testing.assert_close(marks, layer.scale * (queries @ view.landmarks[0].T))
    by_landmarks, _ = choose(view, layer, 0, 16)
    assert not torch.equal(by_landmarks, best)
