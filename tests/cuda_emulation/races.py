"""What the detector in a library of kind `race` has found; see race/detector.h."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path


class Races:
    """The detector of a library that is loaded, or will be, in this process."""

    def __init__(self, library: Path) -> None:
        self._path = library
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_race_reports.restype = ctypes.c_char_p
        self._library.emulation_race_accesses.restype = ctypes.c_int64
        self._library.emulation_race_forgotten.restype = ctypes.c_int64

    @property
    def accesses(self) -> int:
        """How many accesses of kernels it has looked at."""
        return self._library.emulation_race_accesses()

    @property
    def forgotten(self) -> int:
        """Of those, how many it had no room to remember: a race with one of them is missed."""
        return self._library.emulation_race_forgotten()

    def take(self) -> list[str]:
        """Races found since the last call, in a line each with the source lines of both accesses."""
        reports = self._library.emulation_race_reports().decode()
        lines = re.sub(r"\+0x[0-9a-f]+", lambda address: self._source(address[0]), reports).splitlines()
        return list(dict.fromkeys(lines))  # one line of source may be several accesses

    def _source(self, address: str) -> str:
        # An access is reported by the address that a call returns to, the one after it.
        command = ["addr2line", "--inlines", "--exe", str(self._path), hex(int(address, 16) - 1)]
        lines = subprocess.check_output(command, text=True).splitlines()
        return " < ".join(Path(line.split(" ")[0]).name for line in lines if not line.startswith("/usr/"))
