from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.test_model import LLAMA, write

from vllm_shadowkv.cli import main
from vllm_shadowkv.config import ShadowKVConfig


def lines(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, tuple[str, str]]:
    """Value and source by key."""
    assert main(["explain", *line]) == 0
    rows = [row.split("│")[1:-1] for row in capsys.readouterr().out.splitlines() if row.startswith("│")]
    return {key.strip(): (value.strip(), source.strip()) for key, value, source in rows}


def test_defaults_and_what_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(capsys, "--additional-config", json.dumps({"shadowkv": {"sparse_budget": 512, "rank": 64}}))
    assert set(said) == set(ShadowKVConfig.model_fields)
    assert said["sparse_budget"] == ("512", "given")
    assert said["rank"] == ("64", "given")
    assert said["block_size"] == ("1024", "default")
    assert said["host_memory_gib"][0] == "not known yet"


def test_what_is_derived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path, LLAMA)
    said = lines(capsys, model)
    assert said["rank"] == ("256", "derived: what fits a page")
    assert said["prefill_exact_tokens"][0] == "not known yet"
    said = lines(capsys, model, "--kv-cache-gib", "64", "--host-gib", "1024")
    assert said["prefill_exact_tokens"] == ("16384", "derived: at most half of the pool")
    assert said["host_memory_gib"][0] == "132.00"  # int8 values and their scales


def test_a_rank_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.dumps({"shadowkv": {"rank": 400}})
    said = lines(capsys, write(tmp_path, LLAMA), "--additional-config", settings)
    assert said["rank"] == ("256", "given 400; this is what fits a page")


def test_a_wrong_setting_is_refused_as_by_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--additional-config", '{"shadowkv": {"bogus": 1}}']) == 1
    assert capsys.readouterr().err.startswith("--additional-config shadowkv: unknown key 'bogus'")
