"""Real texts that packages bring along, one of each kind, none of them ours.

`python -m benchmarks.smollm2.texts FOLDER` writes them to files, for tools that take a text.
"""

from __future__ import annotations

import argparse
import importlib.util
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import yaml

from benchmarks.wheels import Cached, MissingError, Wheel, unpack

CORPUS = Wheel("chatterbot-corpus", "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", 0.3)
REPEATS = ("tech_support", "coding")
"""Files of the English dialogues that say the same few dozen things over and over."""


def _unpack(content: ZipFile, folder: Path) -> None:
    for language in ("english", "spanish"):
        (folder / language).mkdir()
        for name in content.namelist():
            if f"/data/{language}/" in name and name.endswith(".yml"):
                unpack(content, name, folder / language)


DIALOGUES = Cached("dialogues-1", CORPUS, _unpack, "make real-model")
"""Short dialogues in English and Spanish, BSD licence, by the users of ChatterBot."""


def _manual() -> str:
    """Python's language reference, of the running Python (PSF licence)."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def _code() -> str:
    """The source of vLLM's scheduler (Apache-2.0), as installed."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "v1" / "core" / "sched" / "scheduler.py").read_text()


def _dialogues(language: str) -> str:
    said = []
    for path in sorted((DIALOGUES.get() / language).iterdir()):
        if path.stem not in REPEATS:
            conversations = yaml.safe_load(path.read_text(encoding="utf-8-sig"))["conversations"]
            said += ["".join(f"- {line}\n" for line in lines) for lines in conversations]
    return "\n".join(said)


TEXTS: dict[str, Callable[[], str]] = {
    "manual": _manual,
    "code": _code,
    "dialogue": lambda: _dialogues("english"),
    "Spanish": lambda: _dialogues("spanish"),
}
"""By name: more than 8,192 of SmolLM2's tokens each. The dialogues need `DIALOGUES`."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made if it is missing")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in arguments.texts:
            (arguments.folder / f"{name}.txt").write_text(TEXTS[name]())
    except MissingError as error:
        parser.exit(1, f"benchmarks.smollm2.texts: {error}\n")


if __name__ == "__main__":
    main()
