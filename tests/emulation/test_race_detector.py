"""The detector of `make cuda-sanitize` finds the races of small kernels at their lines, and no others."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from cuda_emulation.races import Races

SOURCE = Path(__file__).with_name("race_cases.cu")


def cases() -> dict[str, set[int]]:
    """The kernels, each with the lines of its race."""
    found: dict[str, set[int]] = {}
    for number, line in enumerate(SOURCE.read_text().splitlines(), 1):
        if match := re.match(r"CASE\((\w+)", line):
            name = match[1]
            found[name] = set()
        if line.endswith("// race"):
            found[name].add(number)
    return found


@pytest.mark.parametrize(("name", "lines"), cases().items(), ids=cases())
def test_a_race_is_found_at_its_lines(library: Path, name: str, lines: set[int]) -> None:
    races = Races(library)
    before = races.accesses
    ctypes.CDLL(str(library))[name]()
    reports = races.take()
    assert {int(line) for line in re.findall(r"race_cases\.cu:(\d+)", "\n".join(reports))} == lines
    assert all(report.startswith(f"{name}: race in ") for report in reports)
    assert races.accesses > before
    assert races.forgotten == 0
