"""What `plan` says. That the engine says the same: tests/integration/test_life_of_a_token.py, test_capacity.py, and
test_models.py for layers beside ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from cli.test_model import GEMMA3, LLAMA, NEMOTRON_H, OLMO3, write

from vllm_shadowkv.cli import arguments, main
from vllm_shadowkv.cli.pool_plan import Plan, make
from vllm_shadowkv.state.host_memory import GIB


def plan(folder: Path, *line: str, config: Any = LLAMA, **settings: Any) -> Plan:
    parser = argparse.ArgumentParser()
    arguments.add(parser, plan=True)
    usual = [write(folder, config), "--kv-cache-gib", "64", "--host-gib", "1024"]
    return make(parser.parse_args([*usual, "--additional-config", json.dumps({"shadowkv": settings}), *line]))


def test_llama_at_64_gib(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.pool.layout.page_bytes == 524_288
    assert made.pool.layout.rank == 176
    assert made.num_blocks == 64 * GIB // (32 * 524_288) == 4096
    assert not made.host_bound
    assert made.host_pool_bytes == 4096 * 32 * 2 * 8 * 128 * 1024  # bf16 values of every token
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
    for part in ("524,288", "rank 176 of 1024", "4,096, bounded by device memory", "131,072", "now 384", "128K", "█"):
        assert part in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_more_slots_keep_more_chunks_and_read_less_over_the_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 131,072 tokens a step wants 256 + 5 + 128 chunks, of 512 KiB over 32 layers and 8 heads."""
    assert main(["plan", write(tmp_path, LLAMA), "--kv-cache-gib", "64", "--host-gib", "1024"]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if len(row) == 3 and row[1].endswith("%")] == [
        ["261", "78%", "28.7"],
        ["now 384", "78%", "42.2"],
        ["512", "85%", "29.3"],
        ["768", "93%", "14.0"],
        ["1024", "95%", "9.9"],
    ]


def test_what_does_not_work_is_said_and_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "nothing"), "--kv-cache-gib", "1"]) == 1
    assert "no model configuration at" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(tmp_path)])
    assert caught.value.code == 2
