"""What sealing costs along real texts, and needles; once on the real decoder."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.accuracy import niah
from benchmarks.alone import alone
from benchmarks.needle import CHECKPOINT
from benchmarks.smollm2 import along_text
from benchmarks.smollm2.along_text import Job, Row
from benchmarks.smollm2.settings import NAMES, shadowkv
from vllm_shadowkv.config import ShadowKVConfig


def test_without_the_model_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["along_text"])
    with pytest.raises(SystemExit, match=r"smollm2.* is missing; `make real-model` makes it, from a package index"):
        along_text.main()


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_valid_and_budgets_shares_of_the_prompt(name: str) -> None:
    settings = shadowkv(name, 7424)
    assert settings is not None
    config = ShadowKVConfig(**settings)
    budgets = {"3.5 %": 256, "7 %": 520, "14 %": 1040, "twice": 4096, "all": 7424}
    assert config.sparse_budget == budgets.get(name, 2048)
    assert config.resident_pages == (name == "exact")


def test_distributions_are_compared_in_nats() -> None:
    full = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    ours = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    found = along_text.compare(full, ours, [0, 1])
    assert found["divergence"] == pytest.approx(0.25 * math.log(2) / 2)
    assert found["divergence_max"] == pytest.approx(0.25 * math.log(2))
    assert found["same_first"] == 0.5
    assert found["nats"] == pytest.approx(math.log(2))
    assert found["nats_error"] == pytest.approx(math.log(2) / 8**0.5)
    assert found["nats_full"] == pytest.approx((math.log(2) + math.log(4)) / 2)
    (apart, said_full, more), (last, *_) = along_text.compare(full[[0] * 101], ours[[1] * 101], [1] * 101)["by_hundred"]
    assert (apart, said_full, more) == pytest.approx((0.25 * math.log(2), math.log(4), -math.log(2)), abs=1e-5)
    assert last == pytest.approx(apart)


def row(text: str, setup: str, settings: str = "default", divergence: float = 0.004) -> Row:
    return Row(
        text,
        "float32",
        7424,
        128,
        settings,
        setup,
        2048,
        divergence,
        5e-4,
        0.05,
        0.2,
        0.97,
        2.01,
        2.0,
        0.003,
        [],
        0,
        9.0,
    )


def test_rows_become_a_table_and_a_plot(tmp_path: Path) -> None:
    rows = [row(text, setup) for text in ("manual", "code") for setup in "AB"]
    text = along_text.markdown(rows)
    cells = "0.0040 ± 0.0005 | 0.05 | 97.0 % | +1.0 ± 0.3 %"
    assert f"| float32 | 7,424 | code | 7.39 | default | {cells} | {cells} |" in text
    along_text.plot([*rows, *(row("code", setup, "7 %", 0.02) for setup in "AB")], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_needles_lie_where_they_should_and_are_compared_by_length() -> None:
    model = str(CHECKPOINT)
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = niah.make(model, None, [2000, 3000], 5, 1, random.Random(1))
    for length in (2000, 3000):
        of = [sample for sample in samples if sample["length"] == length]
        at = [sample["context"].index(sample["expected"]) / len(sample["context"]) for sample in of]
        assert at == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.02)
        tokens = [len(tokenizer(sample["context"] + sample["question"])["input_ids"]) for sample in of]
        assert all(length - 24 <= number <= length for number in tokens)

    answers = [tokenizer(sample["expected"], add_special_tokens=False)["input_ids"] for sample in samples]
    stock = [{"name": f"niah-{i}", "setup": "B", "output": answer} for i, answer in enumerate(answers)]
    ours = [record | ({"output": [0]} if i < 2 else {}) for i, record in enumerate(stock)]
    table = niah.markdown(niah.paired(samples, {"stock": stock, "ours": ours}, model))
    assert "| ours | B | 2,000 | 100.0 % | 60.0 % | 2, 0 of 5 | 0.5 |" in table
    assert "| ours | B | 3,000 | 100.0 % | 100.0 % | 0, 0 of 5 | 1 |" in table


def test_needles_of_one_haystack_are_of_different_kinds_and_depths(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    model = str(CHECKPOINT)
    samples = niah.make(model, tmp_path, [600, 900], 6, 2, random.Random(1), 3)
    assert len(samples) == 2 * 6 * 2
    assert len({sample["context"] for sample in samples}) == len(samples) // 3
    for first in range(0, len(samples), 3):
        here = samples[first : first + 3]
        assert len({sample["context"] for sample in here}) == 1  # neighbours: `collect` computes it once
        assert len({sample["question"].split("?")[0].split()[1] for sample in here}) >= 2
        at = [sample["context"].index(sample["expected"]) / len(sample["context"]) for sample in here]
        assert at == pytest.approx([sample["depth"] / 100 for sample in here], abs=0.1)
        for sample in here:
            assert sample["context"].count(sample["expected"]) == 1
    assert sorted({sample["depth"] for sample in samples}) == [0, 20, 40, 60, 80, 100]
    with pytest.raises(ValueError, match="needles: expected at most 12, got 13"):
        niah.make(model, tmp_path, [600], 13, 1, random.Random(1), 13)


@pytest.mark.slow
def test_default_settings_along_a_real_text(real_decoder: Path, tmp_path: Path) -> None:
    """At most twice what was measured over 128 steps (docs/accuracy.md)."""
    job = Job("stock", "float32", 4352, 24, ("manual",), tmp_path)
    assert alone(along_text.run, job) == []
    first, second = alone(along_text.run, replace(job, settings="default"))
    assert (first.setup, second.setup) == ("A", "B")
    assert second.cached == 4096  # sealed blocks are hit, and the open one is computed over them
    assert 0 < first.divergence < 0.01
    assert 0 < second.divergence < 0.02
    assert first.perplexity_change == pytest.approx(0, abs=0.05)
