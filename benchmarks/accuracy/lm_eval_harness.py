r"""Runs lm-eval-harness (RULER, LongBench) with the data sets that it would download given by path.

    python -m benchmarks.accuracy.lm_eval_harness --essays FOLDER --squad dev-v2.0.json --hotpot hotpot.json -- \
        --model vllm --model_args '{"pretrained": "MODEL", "max_length": 32896}' --tasks ruler \
        --metadata '{"max_seq_lengths": [32768]}' --output_path results

What follows `--` goes to `lm_eval` as it is. Beyond the paths it does one thing: it refuses the settings with which a
long-context task gives a number that means nothing. With a network, `lm_eval` alone does the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ESSAYS, LONGBENCH = "baber/paul_graham_essays", "Xnhyacinth/LongBench"
UNCOUNTED = 128
"""Room for what lm-eval does not count when it sizes a RULER prompt: `gen_prefix` and the chat template."""


class TrapError(Exception):
    """The settings would measure something else; the message says which and what to do."""


def check(arguments: list[str]) -> None:
    """Refuses settings that cut prompts in silence or size them with another tokenizer.

    Args:
        arguments: of `lm_eval`.

    Raises:
        TrapError: they do.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="hf")
    parser.add_argument("--model_args", default="")
    parser.add_argument("--metadata", type=json.loads, default={})
    parser.add_argument("--tasks", default="")
    parser.add_argument("--gen_kwargs", nargs="*", default=[])
    known, _ = parser.parse_known_args(arguments)
    given = known.model_args
    options = (
        json.loads(given) if given.startswith("{") else dict(pair.split("=", 1) for pair in given.split(",") if pair)
    )
    longest = max(known.metadata.get("max_seq_lengths", [4096]))
    length = options.get("max_length", options.get("max_model_len"))
    if length is None:
        what = (
            "would be 2048 for an API model, and longer prompts are cut on the left"
            if "completions" in known.model
            else "is not given"
        )
        raise TrapError(f"max_length {what}; add max_length={longest + UNCOUNTED} to --model_args.")
    if int(length) < longest + UNCOUNTED:
        raise TrapError(
            f"max_length {length} leaves no room beside prompts of {longest} tokens for gen_prefix and chat template, "
            f"which lm-eval does not count: prompts would be cut on the left; use max_length={longest + UNCOUNTED}."
        )
    if "completions" in known.model and "tokenizer" not in options:
        raise TrapError(
            "RULER sizes its prompts with the name of the API's model, which may not be that of a tokenizer; "
            "add tokenizer=NAME_OR_PATH to --model_args."
        )
    if "completions" in known.model and "longbench" in known.tasks and "temperature" not in " ".join(known.gen_kwargs):
        raise TrapError(
            "LongBench's tasks say do_sample: False beside temperature: 1, of which lm-eval sends a server the "
            "temperature alone: answers would be drawn at random; add --gen_kwargs temperature=0."
        )


@contextmanager
def data_from(
    essays: Path | None, squad: Path | None, hotpot: Path | None, longbench: Path | None, samples: int | None
) -> Iterator[None]:
    """Within it lm-eval finds its data at these paths; what is None it downloads.

    Args:
        essays: folder of .txt files, the haystack of RULER's `essay` tasks.
        squad, hotpot: the JSON files of SQuAD 2.0's and HotpotQA's development sets.
        longbench: folder of `TASK.jsonl` files.
        samples: per RULER task and length, instead of 500.
    """
    import datasets

    load = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if path == ESSAYS and essays:
            texts = [file.read_text(errors="ignore") for file in sorted(essays.rglob("*.txt"))]
            return datasets.Dataset.from_dict({"text": texts})
        if path == LONGBENCH and longbench:
            return load("json", data_files={"test": str(longbench / f"{name}.jsonl")}, split=options.get("split"))
        return load(path, name, **options)

    with ExitStack() as stack:
        stack.enter_context(patch("datasets.load_dataset", load_dataset))
        if essays:
            _split_sentences_without_nltk_data(stack)
        import lm_eval.tasks
        from lm_eval.tasks._yaml_loader import _load_module_with_cache

        # As lm-eval loads them: it would load a module anew that was imported in the ordinary way.
        folder = Path(lm_eval.tasks.__file__).resolve().parent / "ruler"
        cwe_utils, fwe_utils, niah_utils, qa_utils, vt_utils = (
            _load_module_with_cache(folder / f"{name}_utils.py") for name in ("cwe", "fwe", "niah", "qa", "vt")
        )
        files = {"SQuAD-explorer": squad, "hotpot": hotpot}
        download = qa_utils.download_json

        def download_json(url: str) -> Any:
            for part, path in files.items():
                if part in url and path:
                    return json.loads(path.read_text())
            return download(url)

        stack.enter_context(patch.object(qa_utils, "download_json", download_json))
        if samples is not None:
            makers = [
                *((niah_utils, "generate_samples"), (qa_utils, "generate_samples")),
                *(
                    (cwe_utils, "sys_word_pair_random"),
                    (fwe_utils, "sys_kwext"),
                    (vt_utils, "sys_vartrack_w_noise_random"),
                ),
            ]
            for module, name in makers:
                stack.enter_context(patch.object(module, name, _fewer(getattr(module, name), samples)))
        yield


def _fewer(make: Callable[..., Any], samples: int) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*arguments: Any, **options: Any) -> Any:
        return make(*arguments, **options | {"num_samples": min(samples, options.get("num_samples", samples))})

    return made


def _split_sentences_without_nltk_data(stack: ExitStack) -> None:
    """RULER's essay tasks split sentences with NLTK's punkt; where its data is missing, at full stops."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        stack.enter_context(patch("nltk.download", lambda name: None))
        stack.enter_context(patch("nltk.sent_tokenize", lambda text: re.split(r"(?<=[.!?])\s+", text)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--essays", type=Path)
    parser.add_argument("--squad", type=Path)
    parser.add_argument("--hotpot", type=Path)
    parser.add_argument("--longbench", type=Path)
    parser.add_argument("--samples", type=int, help="per RULER task and length; 500 is lm-eval's")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="-- and the arguments of lm_eval")
    own = parser.parse_args()
    rest = own.arguments[1:] if own.arguments[:1] == ["--"] else own.arguments
    try:
        check(rest)
    except TrapError as error:
        parser.error(str(error))
    if own.essays and own.squad and own.hotpot:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    with data_from(own.essays, own.squad, own.hotpot, own.longbench, own.samples):
        from lm_eval.__main__ import cli_evaluate

        sys.argv = ["lm_eval", *rest]
        cli_evaluate()


if __name__ == "__main__":
    main()
