"""What `plan` says. That the engine says the same: tests/integration/test_life_of_a_token.py, test_capacity.py, and
test_models.py for layers beside ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.test_model import GEMMA3, LLAMA, NEMOTRON_H, OLMO3, write

from vllm_shadowkv.cli import arguments, main
from vllm_shadowkv.cli.pool_plan import Plan, make
from vllm_shadowkv.cli.step_bytes import Rates, of_request, of_row
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.state.host_memory import GIB


def plan(folder: Path, *line: str, config: Any = LLAMA, **settings: Any) -> Plan:
    parser = argparse.ArgumentParser()
    arguments.add(parser, plan=True)
    usual = [write(folder, config), "--kv-cache-gib", "64", "--host-gib", "1024"]
    return make(parser.parse_args([*usual, "--additional-config", json.dumps({"shadowkv": settings}), *line]))


def test_llama_at_64_gib(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.pool.layout.page_bytes == 524_288
    assert made.pool.layout.rank == 256
    assert made.num_blocks == 64 * GIB // (32 * 524_288) == 4096
    assert not made.host_bound
    assert made.host_pool_bytes == 4096 * 32 * 8 * (128 + 4) * 1024  # int8 values and a scale of every token
    assert plan(tmp_path, value_dtype="auto").host_pool_bytes == 4096 * 32 * 2 * 8 * 128 * 1024
    assert made.requests("bf16", 122_880) == 4  # 15 GiB each
    assert made.requests("fp8", 122_880) == 8
    assert made.requests("shadowkv", 122_880) >= 24


def test_host_memory_bounds_the_pool(tmp_path: Path) -> None:
    made = plan(tmp_path, "--host-gib", "100", host_memory_gib=50)
    assert made.host_bound
    assert made.host_pool_bytes <= 50 * GIB < made.host_pool_bytes + made.pool.host_bytes
    halves = plan(tmp_path, "--host-gib", "100", "-tp", "2", host_memory_gib=50)
    assert halves.num_blocks == pytest.approx(made.num_blocks, abs=1)  # half the heads each, so half the bytes
    assert halves.host_pool_bytes <= 50 * GIB


def test_break_even_is_where_as_many_fit(tmp_path: Path) -> None:
    made = plan(tmp_path)
    for backend in ("bf16", "fp8"):
        even = made.break_even(backend)
        assert even is not None
        assert made.requests("shadowkv", even) >= made.requests(backend, even)
        assert made.requests("shadowkv", even - 1024) < made.requests(backend, even - 1024)
    assert plan(tmp_path, "--max-model-len", "4096").break_even("bf16") is None


def test_more_slots_leave_room_for_fewer(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.with_slots(384) == made
    counts = [made.with_slots(slots).requests("shadowkv", 65_536) for slots in (261, 384, 768, 1536)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4


def test_windows_are_counted_once(tmp_path: Path) -> None:
    """Eight of 32 layers grow; three groups of windows of 4,096 tokens hold 33 or 34 pages of 128 each, and no more."""
    made = plan(tmp_path, config=OLMO3)
    assert made.pool.num_layers == 8
    assert made.pool.other_pages(100_000, 1) == made.pool.other_pages(131_072, 1) == 3 * 33
    assert made.pool.other_pages(100, 1) == 3
    alone = plan(tmp_path, config=LLAMA)
    assert made.pool.decoding_pages(100_000) == alone.pool.decoding_pages(100_000) + 3 * 34  # with steps in flight
    # A step of 8,192 tokens twice in flight, and a window that may begin within a page.
    assert made.min_blocks == alone.min_blocks + 3 * (-(-(4095 + 2 * 8192) // 128) + 1)
    # Of vLLM's own blocks of 16 tokens.
    assert made.stock_bytes(100_000) == 16 * 8 * 4096 * (6250 + 3 * (-(-(4095 + 3) // 16) + 1))


def test_what_stands_beside_and_what_is_gained_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(config: Any, *line: str) -> str:
        assert main(["plan", write(tmp_path, config), "--kv-cache-gib", "64", "--host-gib", "1024", *line]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "little to gain" not in said(LLAMA, "--max-model-len", "16384")
    long = said(GEMMA3)
    assert "29 layers with a window of 1,024 tokens, which hold 60 blocks of a request" in long
    assert "little to gain" not in long
    assert "little to gain, because only 5 of 34 layers grow" in said(GEMMA3, "--max-model-len", "32768")
    coarse = said(NEMOTRON_H, "--additional-config", '{"shadowkv": {"block_size": 9216}}')
    assert "5 layers with a state of 4,255,744 bytes, which hold 3 blocks of a request" in coarse
    assert "little to gain, because pages of 9,216 tokens, which must hold a state, are coarse" in coarse


def test_a_page_that_holds_no_state_is_refused_as_in_the_engine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hold no state .* \(4255744 bytes\); set shadowkv.block_size to 9216"):
        plan(tmp_path, config=NEMOTRON_H)


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    line = ["plan", write(tmp_path, LLAMA), "--kv-cache-gib", "64", "--host-gib", "1024", "--plot", str(picture)]
    assert main(line) == 0
    said = capsys.readouterr().out
    for part in ("524,288", "rank 256 of 1024", "4,096, bounded by device memory", "131,072", "now 384", "128K", "█"):
        assert part in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_more_slots_keep_more_chunks_and_read_less_over_the_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 131,072 tokens a step wants 256 + 5 + 127 chunks, of 264 KiB over 32 layers and 8 heads."""
    assert main(["plan", write(tmp_path, LLAMA), "--kv-cache-gib", "64", "--host-gib", "1024"]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if len(row) == 3 and row[1].endswith("%")] == [
        ["261", "78%", "14.8"],
        ["now 384", "78%", "21.8"],
        ["512", "85%", "15.0"],
        ["768", "93%", "7.2"],
        ["1024", "95%", "5.1"],
    ]


def test_a_rows_bytes_are_those_of_the_pages(tmp_path: Path) -> None:
    pool = plan(tmp_path).pool
    page = torch.empty(1, pool.layout.page_bytes, dtype=torch.uint8)
    row = of_row(ShadowKVConfig(), pool.layout, sealed=120, open_tokens=512, hits=0.6)
    scored = ("landmarks", "landmark_scales", "landmark_mean", "mean_values")
    assert row.landmarks == 120 * sum(pool.layout.view(page, name).nbytes for name in scored)
    assert row.selected == 256 + 5 + 120
    assert row.attended == (381 * 8 + 512) * pool.layout.page_bytes // 128
    assert row.link == pytest.approx(0.4 * 381 * pool.layout.value_row_bytes / 128)
    assert row.filled == pytest.approx(0.4 * 381 * 8 * 8 * ((256 + 48) / 2 + 3 + 2 * 256))
    everything = of_row(ShadowKVConfig(), pool.layout, sealed=2, open_tokens=0)
    assert (everything.selected, everything.link) == (256, 0), "slots for all that is sealed never miss"


def test_a_rate_is_bounded_by_bytes(tmp_path: Path) -> None:
    """Four bf16 requests of 122,880 tokens read 15 GiB each, and the weights once."""
    made = plan(tmp_path)
    rates = Rates(memory=3350e9, link=25e9, weight_bytes=15e9)
    stock, by = rates.most_tokens(made, "bf16", 122_880)
    assert by == "memory"
    assert stock == pytest.approx(4 / ((15e9 + 4 * 15 * GIB) / 3350e9))
    row, requests = of_request(made, 122_880), made.requests("shadowkv", 122_880)
    assert row.link == pytest.approx((0.22 - 0.11 * (384 / 380 - 1) / 0.5) * 380 * 8 * 8 * (128 + 4))
    assert rates.most_tokens(made, "shadowkv", 122_880) == (pytest.approx(25e9 / (32 * row.link)), "link")
    fast, by = Rates(3350e9, 1e15, 15e9).most_tokens(made, "shadowkv", 122_880)
    assert by == "memory"
    assert fast == pytest.approx(requests / ((15e9 + requests * 32 * row.device) / 3350e9))
    same_memory, _ = Rates(3350e9, None, 15e9).most_tokens(made, "shadowkv", 122_880)
    assert same_memory == pytest.approx(requests / ((15e9 + requests * 32 * (row.device + row.link)) / 3350e9))
    assert rates.most_tokens(plan(tmp_path, "--kv-cache-gib", "6.5"), "bf16", 122_880)[0] == 0


def test_the_bound_is_printed_with_what_it_assumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*line: str) -> str:
        usual = ["--kv-cache-gib", "64", "--host-gib", "1024", "--contexts", "4096", "122880"]
        assert main(["plan", write(tmp_path, LLAMA), *usual, *line]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "tokens/s" not in said()
    told = said("--bandwidth-gbs", "3350", "--weights-gib", "15")
    assert "│ 122,880 │ 166 │ 333 │ 2,087 │ memory │ 78% │ 21.3 │" in told
    assert "│ memory │ - │ 0.0 │" in told  # 4,096 tokens: exact
    assert "3350 GB/s of memory and 55 GB/s of link beside them; it reads 15 GiB of weights" in told
    assert "no weights (--weights-gib)" in said("--bandwidth-gbs", "3350")
    assert "values of the host pool from it, too" in said("--bandwidth-gbs", "50", "--device", "cpu")


def test_what_does_not_work_is_said_and_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "nothing"), "--kv-cache-gib", "1"]) == 1
    assert "no model configuration at" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(tmp_path)])
    assert caught.value.code == 2
