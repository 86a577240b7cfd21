"""What the demo does without its servers: its document and questions, what fits a pool, and what it prints."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks.demo import __main__ as demo
from benchmarks.demo import document, needle, view
from benchmarks.demo.backends import Pool
from benchmarks.demo.document import QUESTIONS, SUMMARY, Answer, Question, Report
from benchmarks.smollm2 import SMOLLM2
from benchmarks.wheels import MissingError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}
"""SmolLM2's shape."""


def words(text: str) -> int:
    return len(text.split())


def test_the_document_has_whole_paragraphs_and_no_more_than_it_may() -> None:
    every = document.document(words, 1_000_000)
    part = document.document(words, 500)
    assert document.TITLE in every.splitlines()[0]
    assert 400 < words(part) <= 500 < words(every)
    assert every.startswith(f"{part}\n\n")


def test_the_document_answers_every_question() -> None:
    every = document.document(words, 1_000_000)
    assert document.answered(QUESTIONS, every) == list(QUESTIONS)
    assert all(question.passage for question in QUESTIONS)
    assert document.answered((Question("Who?", "It was nobody."),), every) == []


def test_what_fits_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "DTYPE", "float32")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    pool = 182 * 1024**2 * 6
    # 5,376 tokens are 336 of stock's blocks; one is vLLM's own.
    assert document.fitting("stock", tmp_path, Pool(336 * 4, 16, pool), 5300, 5376) == 3
    assert document.fitting("stock", tmp_path, Pool(336 * 4 + 1, 16, pool), 5300, 5376) == 4
    # To be admitted one needs 6 blocks, 42 exact pages and 7 of slots; while it decodes 6, 2 and 7.
    for blocks, fit in ((175, 8), (176, 9), (182, 9)):
        assert document.fitting("shadowkv", tmp_path, Pool(blocks, 1024, pool), 5300, 5376) == fit
    # 5 sealed blocks: 1,024 values of 3 heads of 64 in 30 layers, a byte each, and their scales.
    assert document.host_bytes("shadowkv", tmp_path, 5376) == 5 * 1024 * 3 * (64 + 4) * 30


def reports() -> dict[str, Report]:
    said = "[bold]Use where[/bold]\n" + "to print a stack trace, " * 8
    return {
        backend: Report(
            5280,
            {q.text: Answer(said, 12.0, [0.05, 0.15]) for q in (SUMMARY, *QUESTIONS)},
            held * 2**20,
            90 * 2**20,
            fits,
        )
        for backend, held, fits in (("shadowkv", 88, 7), ("stock", 232, 4))
    }


@pytest.mark.parametrize("width", [80, 120])
def test_answers_stand_side_by_side_as_they_were_given(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    view.show_answers(console, [SUMMARY, *QUESTIONS], reports())
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert text.count("[bold]Use where[/bold] to") == 2 * (1 + len(QUESTIONS))
    assert f"5,280 tokens, {512 / 52.8:.0f} %" in " ".join(text.split())
    assert all(question.passage in " ".join(text.split()) for question in QUESTIONS)


def test_a_line_for_each_backend() -> None:
    console = Console(file=io.StringIO(), width=80)
    view.show_lines(console, reports(), {"shadowkv": "62 of 62", "stock": "61 of 62"})
    assert isinstance(console.file, io.StringIO)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines() if "│" in line
    ]
    assert rows == [
        ["shadowkv", "12", "10.0", "88", "7", "62 of 62"],
        ["stock", "12", "10.0", "232", "4", "61 of 62"],
    ]


def test_where_no_index_has_the_real_decoder_the_demo_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Path:
        raise MissingError("some-data==1.0 cannot be fetched (no file); it needs a package index that has it")

    absent = SimpleNamespace(path=tmp_path / "absent", wheel=SMOLLM2.wheel, make=missing)
    monkeypatch.setattr(demo, "SMOLLM2", absent)
    monkeypatch.setattr(needle, "run", lambda *_: {})
    monkeypatch.setattr("sys.argv", ["demo"])
    assert demo.main() == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.endswith("Without the real decoder: some-data==1.0 cannot be fetched (no file); it needs a package "
                            "index that has it.")  # fmt: skip
