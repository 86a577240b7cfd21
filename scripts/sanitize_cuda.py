"""`make cuda-sanitize`: the tests of the CUDA ops on emulated threads, looking for what right results do not show.

- Under a race detector (tests/cuda_emulation/race), op by op. One that sees no access is a failure.
- Under it again, without one barrier of the kernels, each in its turn: the detector takes no notice of it
  (EMU_WITHOUT). If no race is found then, the barrier is not needed, or the tests or the detector are blind to what it
  is for. Those of NOT_SEEN are known.
- With threads and CTAs in three other orders.
- With AddressSanitizer and UndefinedBehaviorSanitizer.

Needs no GPU and no CUDA toolkit. This file is also the pytest plugin of these runs.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sanitize import ROOT, Outcome, loaded, run_tests, sanitizers, side_by_side

if TYPE_CHECKING:
    from cuda_emulation.races import Races

SOURCES = ROOT / "csrc"
KERNELS = SOURCES / "cuda"
ORDERS = ("greedy:1", "reverse", "random:2")
BARRIER = re.compile(r"^[^/]*\bsync_(?:threads|threads_count|warp)\(")

# Barriers without which no race is found, by their file and a text that stands only in their line or the one above.
NOT_SEEN = {
    # It brings lanes together and orders no memory.
    ("select_logits.cuh", "tensor cores want all lanes together"),
    # It makes the sort safe to call at once after the keys are written. Its one caller has a prefix sum in between.
    ("block.cuh", "void bitonic_sort("),
}


@functools.cache
def _races() -> Races | None:
    """The detector of the library that the tests run on, None where it has none."""
    import cuda_emulation
    from cuda_emulation.races import Races

    library = cuda_emulation.library()
    return Races(library) if library.parent.name == "race" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A race fails the test that it is found in, in place of what else fails it: that may come of the race."""
    try:
        yield
    finally:
        if (races := _races()) and (found := races.take()):
            pytest.fail("\n".join(found), pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what the detector has seen."""
    if races := _races():
        terminalreporter.write_line(f"{races.accesses} accesses seen, {races.forgotten} forgotten")


def pytest_sessionfinish() -> None:
    """Makes sure of the library: tests of another one would find nothing."""
    import cuda_emulation

    assert loaded("emulated.so") == {cuda_emulation.library()}, f"the tests ran on {loaded('emulated.so')}"


def main() -> int:
    """Builds what has changed, then runs the tests; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one other order, and all barriers in their places")
    quick = parser.parse_args().quick
    sys.path.append(str(ROOT / "tests"))
    import cuda_emulation

    race, ordinary, sanitized = (cuda_emulation.build(kind) for kind in ("race", "ordinary", "sanitized"))
    jobs: dict[str, Callable[[], Outcome]] = {}
    for op in _ops():
        jobs[f"races, {op}"] = lambda op=op: _look_for_races(race, op)
    jobs["AddressSanitizer and UndefinedBehaviorSanitizer"] = lambda: _test(sanitized, **sanitizers())
    for order in ORDERS[-1:] if quick else ORDERS:
        jobs[f"order {order}"] = lambda order=order: _test(ordinary, EMU_ORDER=order)
    for barrier, ops in {} if quick else _barriers().items():
        jobs[f"without {barrier}"] = lambda barrier=barrier, ops=ops: _miss(race, barrier, ops)
    return side_by_side(jobs)


def _test(library: Path, **environment: str) -> Outcome:
    """Runs the tests of all ops on a library."""
    well, output = _run(library, **environment)
    return well, output.splitlines()[-1] if well else output


def _run(library: Path, ops: tuple[str, ...] = (), **environment: str) -> Outcome:
    """Runs the tests of some ops, or all, on a library; returns the whole output."""
    paths = [f"tests/ops/test_{op}.py" for op in ops] or ["tests/ops"]
    code, output = run_tests("sanitize_cuda", "emulated", paths, environment | {"SHADOWKV_EMULATION": str(library)})
    return code == 0, output


def _look_for_races(library: Path, op: str) -> Outcome:
    """Runs the tests of an op; a detector that saw nothing is a failure, too."""
    well, output = _run(library, (op,))
    seen = re.search(r"^([1-9]\d*) accesses seen.*", output, re.MULTILINE)
    return well and seen is not None, f"{output.splitlines()[-1]}, {seen[0]}" if well and seen else output


def _miss(library: Path, barrier: str, ops: tuple[str, ...]) -> Outcome:
    """Runs the tests of ops without a barrier: all is well where a race is then found in a kernel of theirs."""
    well, output = _run(library, ops, EMU_WITHOUT=barrier)
    races = [line for line in output.splitlines() if line.startswith(ops) and ": race in " in line]
    if races:
        return True, races[0]
    if well:
        return False, f"no race is found ({output}); a barrier that is known not to be seen stands in NOT_SEEN"
    return False, output


def _ops() -> list[str]:
    return [path.stem for path in sorted(KERNELS.glob("*.cu"))]


def _barriers() -> dict[str, tuple[str, ...]]:
    """Every barrier of the kernels, as `file:line`, with the ops that have it; without those of NOT_SEEN."""
    found: dict[str, tuple[str, ...]] = {}
    unseen = set(NOT_SEEN)
    for path in sorted(KERNELS.rglob("*.cu*")):
        if path.name == "intrinsics.cuh":
            continue
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            if not BARRIER.match(line):
                continue
            known = {key for key in NOT_SEEN if key[0] == path.name and key[1] in "\n".join(lines[number - 2 : number])}
            unseen -= known
            if not known:
                found[f"{path.name}:{number}"] = tuple(op for op in _ops() if path in _files(KERNELS / f"{op}.cu"))
    if unseen:
        sys.exit(f"NOT_SEEN of {Path(__file__).name} names barriers that csrc/cuda does not have: {sorted(unseen)}")
    return found


@functools.cache
def _files(path: Path) -> frozenset[Path]:
    """A source file and those of ours that it includes."""
    names = re.findall(r'#include "(.*)"', path.read_text())
    included = [SOURCES / name for name in names if (SOURCES / name).exists()]
    return frozenset([path]).union(*(_files(other) for other in included))


if __name__ == "__main__":
    raise SystemExit(main())
