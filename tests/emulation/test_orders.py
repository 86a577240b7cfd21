"""EMU_ORDER: the threads and CTAs of the emulation take turns in the order it names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import ctypes, sys
turns = (ctypes.c_int * 384)()
ctypes.CDLL(sys.argv[1]).take_turns(turns)
print(*turns)
"""


def run(library: Path, order: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: the variable is read once.
    return subprocess.run(
        [sys.executable, "-S", "-c", CODE, str(library)], env={"EMU_ORDER": order}, capture_output=True, text=True
    )


def turns(library: Path, order: str) -> list[int]:
    result = run(library, order)
    assert result.returncode == 0, result.stderr
    found = [int(number) for number in result.stdout.split()]
    assert sorted(found) == sorted([*range(192)] * 2)
    return found


def test_ascending_and_descending(library: Path) -> None:
    forward = turns(library, "forward")
    assert forward[:32] == [*range(32)]
    # CTAs one after the other.
    assert set(forward[:192]) == set(range(96))
    reverse = turns(library, "reverse")
    assert reverse[:32] == [*range(191, 159, -1)]
    assert set(reverse[:192]) == set(range(96, 192))


def test_random_is_another_order_for_another_seed(library: Path) -> None:
    orders = [turns(library, f"random:{seed}") for seed in (1, 2, 2)]
    assert orders[0] != orders[1] == orders[2]
    assert len({thread // 32 for thread in orders[0][:32]}) > 1, "threads of several warps take turns"


def test_a_greedy_warp_goes_on_past_its_own_barriers(library: Path) -> None:
    orders = [turns(library, f"greedy:{seed}") for seed in (1, 2, 2)]
    assert orders[0] != orders[1] == orders[2]
    for first in range(0, 384, 64):
        assert len({thread // 32 for thread in orders[0][first : first + 64]}) == 1
    assert orders[0][:32] != sorted(orders[0][:32])


@pytest.mark.parametrize("order", ["backward", "random", "random:", "greedy:x", "forward:1", ""])
def test_another_order_is_refused(library: Path, order: str) -> None:
    result = run(library, order)
    assert result.returncode != 0
    assert f"EMU_ORDER must be forward, reverse, random:SEED or greedy:SEED, got '{order}'" in result.stderr
