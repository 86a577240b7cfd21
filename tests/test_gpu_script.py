"""What scripts/gpu.py does around its steps. The steps themselves need a GPU, or `--rehearse`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu.py"

# In a process of its own: it ends everything that the process has begun.
RUN_ONE = f"""
import json, pathlib, runpy, sys
import psutil
gpu = runpy.run_path({str(SCRIPT)!r})
gpu["adopt_orphans"]()
step = gpu["Step"]("one", "test", "a step", [sys.executable, "-c", sys.argv[2]], seconds=int(sys.argv[4]))
outcome = gpu["run"](step, pathlib.Path(sys.argv[1]), {{}}, float(sys.argv[3])).outcome
print(json.dumps([outcome, len(psutil.Process().children(recursive=True))]))
"""
BEGINS_ANOTHER = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); "


def run_one(directory: Path, code: str, most_seconds: float = 600, seconds: int = 60) -> list[object]:
    command = [sys.executable, "-c", RUN_ONE, str(directory), code, str(most_seconds), str(seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("options", [[], ["--rehearse"]])
def test_every_step_has_a_name_of_its_own(options: list[str]) -> None:
    command = [sys.executable, str(SCRIPT), "all", "--dry", *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = [line.split(":")[0] for line in printed.splitlines()]
    assert names[0] == "doctor"
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("code", "seconds", "outcome"),
    [
        ("pass", 60, "passed"),
        ("raise SystemExit(3)", 60, "failed (exit code 3)"),
        (BEGINS_ANOTHER, 60, "passed"),
        (BEGINS_ANOTHER + "time.sleep(600)", 3, "took longer than 3 s"),
    ],
    ids=["right", "wrong", "leaves one behind", "hangs"],
)
def test_nothing_outlives_a_step(tmp_path: Path, code: str, seconds: int, outcome: str) -> None:
    assert run_one(tmp_path, code, seconds=seconds) == [outcome, 0]


def test_no_step_is_begun_near_the_deadline(tmp_path: Path) -> None:
    assert run_one(tmp_path, "pass", most_seconds=5) == ["left out (the deadline is near)", 0]
    assert not list(tmp_path.iterdir())
