"""A needle in a haystack, by length and depth, as a heat map: `python -m benchmarks.accuracy.niah`.

    python -m benchmarks.accuracy.niah make niah.jsonl --model NAME --texts FOLDER --lengths 32768 65536 131072
    python -m benchmarks.accuracy.collect ours.jsonl --model NAME --samples niah.jsonl --backend shadowkv
    python -m benchmarks.accuracy.niah plot niah.png --model NAME --samples niah.jsonl stock.jsonl ours.jsonl
    python -m benchmarks.accuracy.niah compare --model NAME --samples niah.jsonl stock.jsonl ours.jsonl

Without `--texts` the haystack is the needle model's filler. With `--needles 12` a haystack holds twelve needles
of different kinds, at different depths, and is asked for each: in setup B it is computed once for all of them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.accuracy.collect import SETUPS, read_records
from benchmarks.accuracy.paired import Flips
from benchmarks.accuracy.table import table
from benchmarks.machine import machine
from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import FILLER, KEYS, VALUES, VOCAB

CITIES = ("Lisbon", "Oslo", "Quito", "Hanoi", "Perth", "Turin", "Dakar", "Lima", "Kyoto", "Cairo", "Boston", "Athens")
ANIMALS = (
    "otter",
    "falcon",
    "badger",
    "heron",
    "lynx",
    "walrus",
    "gecko",
    "bison",
    "raven",
    "marmot",
    "tapir",
    "stork",
)
COLOURS = ("crimson", "silver", "golden", "purple", "orange", "turquoise", "scarlet", "violet", "yellow", "brown")
COUNTRIES = ("Norway", "Peru", "Kenya", "Japan", "Greece", "Chile", "Egypt", "Ireland", "Nepal", "Cuba", "Finland")
DISHES = ("lentils", "carrots", "mushrooms", "cabbage", "pumpkin", "spinach", "onions", "barley", "leeks", "beans")
GOODS = ("copper", "timber", "coffee", "cotton", "marble", "sugar", "wool", "grain", "salt", "rubber")
HORSES = ("Thunder", "Midnight", "Whisper", "Diamond", "Comet", "Shadow", "Arrow", "Tempest", "Pepper", "Legend")
HOTELS = (
    "Savoy",
    "Bristol",
    "Imperial",
    "Central",
    "Panorama",
    "Excelsior",
    "Paradise",
    "Metropol",
    "Royal",
    "Belvedere",
)
NAMES = ("Martha", "Oliver", "Ingrid", "Carlos", "Fatima", "Edward", "Sophie", "Dmitri", "Helena", "Victor", "Amelia")
STREETS = ("Maple", "Castle", "Harbour", "Garden", "Station", "Bridge", "Church", "Market", "Windmill", "Orchard")

Record = dict[str, Any]
Cells = dict[tuple[int, float], float]
"""Share of right answers by length and depth."""


def make(
    model: str,
    texts: Path | None,
    lengths: list[int],
    num_depths: int,
    repeats: int,
    rng: random.Random,
    needles: int = 1,
) -> list[Record]:
    """Lines for `collect --samples`, with what the answer must contain, its length and its depth in percent.

    Every length has `num_depths * repeats` of them, `needles` of neighbouring lines in the same context.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    words = _words(texts, rng, max(lengths))
    depths = [100 * i / max(num_depths - 1, 1) for i in range(num_depths)]
    groups = -(-num_depths // needles)
    lines = []
    for length in lengths:
        for group in range(groups):
            for _ in range(repeats):
                here = depths[group::groups]
                hidden = _needles(texts is None, len(here), rng)
                start = rng.randrange(max(1, len(words) - length))
                # Words are fewer than tokens: as many as fill the length, found by proportion.
                sample = words[start : start + length]
                longest = max((question for _, question, _ in hidden), key=count)
                room = length - count(" ".join([*(needle for needle, _, _ in hidden), longest])) - 8
                hay = sample[: room // 2]
                for _ in range(3):
                    hay = sample[: len(hay) * room // count(" ".join(hay))]
                while (tokens := count(" ".join(hay))) > room:  # their density differs
                    hay = hay[: len(hay) * room // tokens]
                parts = list(hay)
                for depth, (needle, _, _) in reversed(list(zip(here, hidden, strict=True))):
                    parts.insert(int(len(hay) * depth / 100), needle)
                for depth, (_, question, expected) in zip(here, hidden, strict=True):
                    lines.append(
                        {
                            "context": " ".join(parts),
                            "question": question,
                            "expected": expected,
                            "family": f"{length} tokens",
                            "length": length,
                            "depth": depth,
                        }
                    )
    return lines


def _words(texts: Path | None, rng: random.Random, most: int) -> list[str]:
    if texts is None:
        return [VOCAB[i] for i in rng.choices(FILLER, k=2 * most)]
    words = " ".join(path.read_text(errors="ignore") for path in sorted(texts.rglob("*.txt"))).split()
    return words * -(-2 * most // len(words))


def _needles(own_words: bool, number: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """Needles, their questions and what answers must contain; of different kinds, or keys that differ."""
    if own_words:
        found: dict[str, tuple[str, str, str]] = {}
        while len(found) < number:
            key, *values = (VOCAB[i] for i in (rng.choice(KEYS), *rng.sample(VALUES, 2)))
            found[key] = f"@ {key} {' '.join(values)}", f"? {key}", f"{key} {' '.join(values)}"
        return list(found.values())
    if number > len(KINDS):
        raise ValueError(f"needles: expected at most {len(KINDS)}, got {number}")
    kinds = rng.sample(KINDS, number) if number > 1 else KINDS[:1]
    needles = []
    for asked, said, value in (kind(rng) for kind in kinds):
        needles.append((f"{said} {value}.", f"\n\nQuestion: {asked}?\nAnswer: {said}", value))
    return needles


def _magic_number(rng: random.Random) -> tuple[str, str, str]:
    city = rng.choice(CITIES)
    return (
        f"What is the magic number of {city}",
        f"The magic number of {city} is",
        str(rng.randrange(10**6, 10**7)),
    )


def _address(rng: random.Random) -> tuple[str, str, str]:
    name = rng.choice(NAMES)
    return f"Where does {name} live", f"{name} lives at", f"{rng.randrange(100, 1000)} {rng.choice(STREETS)} Street"


KINDS: tuple[Callable[[random.Random], tuple[str, str, str]], ...] = (
    _magic_number,
    _address,
    lambda rng: (
        "What is the secret password",
        "The secret password is",
        f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}",
    ),
    lambda rng: (
        "When does the dentist open on Friday",
        "On Friday the dentist opens at",
        f"{rng.randrange(10, 20)}:{rng.randrange(10, 60)}",
    ),
    lambda rng: (
        "What does the old ship carry",
        "The old ship carries",
        f"{rng.randrange(1000, 10000)} tons of {rng.choice(GOODS)}",
    ),
    lambda rng: (
        "What is grandmother's soup made of",
        "Grandmother's soup is made of",
        " and ".join(rng.sample(DISHES, 2)),
    ),
    lambda rng: (
        "What is the telephone extension of the library",
        "The telephone extension of the library is",
        str(rng.randrange(1000, 10000)),
    ),
    lambda rng: (
        "Which horse won the derby",
        "The horse that won the derby is",
        " ".join(rng.sample(HORSES, 2)),
    ),
    lambda rng: (
        "In which year was the treaty of the islands signed",
        "The treaty of the islands was signed in",
        str(rng.randrange(1400, 1900)),
    ),
    lambda rng: (
        "How tall is the wooden tower",
        "The height of the wooden tower is",
        f"{rng.randrange(100, 1000)} feet",
    ),
    lambda rng: (
        "Where does the ambassador sleep",
        "The ambassador sleeps in room",
        f"{rng.randrange(100, 1000)} of Hotel {rng.choice(HOTELS)}",
    ),
    lambda rng: (
        "Where do the songs of the choir come from",
        "The choir sings songs from",
        " and ".join(rng.sample(COUNTRIES, 2)),
    ),
)
"""Questions, how needle and answer begin, and what they end with, which cannot be guessed."""


def right(samples: list[Record], records: list[Record], model: str) -> dict[str, dict[int, bool]]:
    """Which samples were answered right, by setup."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found: dict[str, dict[int, bool]] = {}
    for record in records:
        number = int(record["name"].rsplit("-", 1)[1])
        found.setdefault(record["setup"], {})[number] = samples[number]["expected"] in tokenizer.decode(
            record["output"]
        )
    return found


def rates(samples: list[Record], records: list[Record], model: str) -> dict[str, Cells]:
    """Shares of right answers by setup."""
    shares: dict[str, Cells] = {}
    for setup, answers in right(samples, records, model).items():
        cells: dict[tuple[int, float], list[bool]] = {}
        for number, is_right in answers.items():
            cells.setdefault((samples[number]["length"], samples[number]["depth"]), []).append(is_right)
        shares[setup] = {at: sum(cell) / len(cell) for at, cell in cells.items()}
    return shares


def compare(samples: list[Record], full: dict[int, bool], ours: dict[int, bool]) -> dict[int, Flips]:
    """Paired answers by length, of what both answered."""
    lengths = sorted({sample["length"] for sample in samples})
    both = {n: [i for i in full if i in ours and samples[i]["length"] == n] for n in lengths}
    return {n: Flips.of([full[i] for i in of], [ours[i] for i in of]) for n, of in both.items() if of}


def paired(samples: list[Record], results: dict[str, list[Record]], model: str) -> list[tuple[str, str, int, Flips]]:
    """All results against the first, which counts for both setups where it has only one: name, setup, length, flips."""
    (_, baseline), *others = results.items()
    full = right(samples, baseline, model)
    return [
        (name, setup, length, flips)
        for name, records in others
        for setup, answers in right(samples, records, model).items()
        for length, flips in compare(samples, full.get(setup) or next(iter(full.values())), answers).items()
    ]


def markdown(rows: list[tuple[str, str, int, Flips]]) -> str:
    """A table of what `paired` gives."""
    lines = [["result", "setup", "tokens", "full", "shadowkv", "lost, won", "p"]]
    for name, setup, length, f in rows:
        shares = [f"{100 * n / f.prompts:.1f} %" for n in (f.baseline, f.candidate)]
        lost = f"{f.lost}, {f.won} of {f.prompts}"
        lines.append([name, setup, f"{length:,}", *shares, lost, f"{f.p_value:.2g}"])
    return table(lines)


def plot(results: dict[str, dict[str, Cells]], path: Path) -> None:
    """A heat map per result and setup."""
    import matplotlib.pyplot as plt

    maps = [(f"{name}, setup {s}", found[s]) for name, found in results.items() for s in SETUPS if s in found]
    figure, panels = plt.subplots(1, len(maps), figsize=(3.6 * len(maps), 3.4), squeeze=False, sharey=True)
    for panel, (title, cells) in zip(panels[0], maps, strict=True):
        lengths, depths = (sorted({at[i] for at in cells}) for i in range(2))
        shares = [[100 * cells.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = panel.imshow(shares, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        panel.set_yticks(range(len(depths)), [f"{depth:.0f} %" for depth in depths])
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("tokens")
    panels[0][0].set_ylabel("depth")
    figure.colorbar(image, ax=list(panels[0]), label="% right")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making, plotting, comparing = (commands.add_parser(name) for name in ("make", "plot", "compare"))
    for command in (making, plotting):
        command.add_argument("out", type=Path)
    for command in (making, plotting, comparing):
        command.add_argument("--model", default=str(CHECKPOINT), help="whose tokenizer; default: the needle model")
    making.add_argument("--texts", type=Path, help="folder of .txt files")
    making.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    making.add_argument("--depths", type=int, default=9)
    making.add_argument("--repeats", type=int, default=5)
    making.add_argument(
        "--needles", type=int, default=1, help="in a haystack, at depths that are far apart; at most 12"
    )
    for command in (plotting, comparing):
        command.add_argument("--samples", type=Path, required=True)
        command.add_argument("results", type=Path, nargs="+", help="of `collect`; stock's first")
    comparing.add_argument("--json", type=Path)
    comparing.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of this machine: what answered")
    arguments = parser.parse_args()
    if arguments.command == "make":
        sizes = (arguments.lengths, arguments.depths, arguments.repeats)
        lines = make(arguments.model, arguments.texts, *sizes, random.Random("niah"), arguments.needles)
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return
    samples = [json.loads(line) for line in arguments.samples.read_text().splitlines()]
    if arguments.command == "compare":
        rows = paired(samples, {p.stem: read_records(p) for p in arguments.results}, arguments.model)
        print(markdown(rows), end="")
        if arguments.json:
            content = [
                {"result": name, "setup": setup, "tokens": length} | asdict(f) | {"p_value": f.p_value}
                for name, setup, length, f in rows
            ]
            about = machine("accuracy.niah", arguments.device)
            arguments.json.write_text(json.dumps({"machine": about, "rows": content}, indent=1) + "\n")
        return
    plot({p.stem: rates(samples, read_records(p), arguments.model) for p in arguments.results}, arguments.out)


if __name__ == "__main__":
    main()
