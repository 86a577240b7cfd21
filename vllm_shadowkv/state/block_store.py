"""Sealed blocks in files, where another engine, or the next one, finds them.

A file is one rank's part of one block, in the safetensors format: `pages` uint8 `[layers, page_bytes]`, `values` uint8
`[layers, row_bytes]`, and in its metadata what it is (`BlockStore.contents`), which block, and a checksum. It appears
under its name when it is complete, and never changes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import threading
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

ENDING = ".safetensors"
OURS = f"{'[0-9a-f]' * 16}/*/{'[0-9a-f]' * 2}/*"
"""Below the folder of all models, which may hold other things too."""
SECONDS_OF_A_WRITE = 3600.0
"""An unfinished file that is older was left behind."""
BYTES_BETWEEN_LOOKS = 2**30
"""Written by one process before it looks again how much all of them have written."""


class BadBlockError(Exception):
    """A file that is not the block it should be. The text says why."""


class BlockFolder:
    """The files of a model: `<folder>/<model>/<rank>/<2 digits>/<hash>.safetensors`."""

    def __init__(self, folder: Path, model: Mapping[str, Any]) -> None:
        """Reads and writes nothing.

        Args:
            folder: of all models.
            model: what blocks depend on beside their tokens, as JSON takes it. Another model is another folder.
        """
        self.folder = folder
        self._model = folder / hashlib.sha256(_canonical(model).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return str(self._model)

    def file(self, rank: str, block_hash: bytes) -> Path:
        """Where a rank's part of a block is, if it is there."""
        name = block_hash.hex()
        return self._model / rank / name[:2] / f"{name}{ENDING}"

    def has(self, rank: str, block_hash: bytes) -> bool:
        """Whether it is there, as far as can be seen."""
        return os.path.isfile(self.file(rank, block_hash))  # noqa: PTH113  (Path's raises where a disk fails)

    def count(self, ranks: Iterable[str], block_hashes: Iterable[bytes]) -> int:
        """How many of these blocks, from the first on, all ranks have."""
        ranks, found = list(ranks), 0
        for block_hash in block_hashes:
            if not all(self.has(rank, block_hash) for rank in ranks):
                break
            found += 1
        return found


class BlockStore:
    """A rank's blocks of one model. Threads may share it, and processes the folder."""

    def __init__(
        self, folder: BlockFolder, rank: str, contents: Mapping[str, Any], max_bytes: int, writers: int = 1
    ) -> None:
        """Looks how much there is when it first writes.

        Args:
            folder: of the model.
            rank: which part of a block's heads and layers.
            contents: what its files say of themselves; others are refused.
            max_bytes: of the files of all models and ranks in the folder; the least recently used go first.
            writers: processes that write at a time; between looks they may exceed `max_bytes` by a sixteenth.
        """
        self._folder, self._rank, self._contents = folder, rank, _canonical(contents)
        self._max_bytes = max_bytes
        self._between_looks = min(BYTES_BETWEEN_LOOKS, max_bytes // 16 // writers)
        self._lock = threading.Lock()
        self._until_look = 0

    def has(self, block_hash: bytes) -> bool:
        """Whether there is such a file, as far as can be seen."""
        return self._folder.has(self._rank, block_hash)

    def write(self, block_hash: bytes, pages: Tensor, values: Tensor) -> int:
        """Writes a block, unless it is there.

        Args:
            block_hash: of its tokens and all before them.
            pages: uint8 `[layers, page_bytes]`, on the host.
            values: uint8 `[layers, row_bytes]`, on the host.

        Returns:
            Bytes written.

        Raises:
            OSError: it cannot be written.
        """
        if self.has(block_hash):
            return 0
        file = self._folder.file(self._rank, block_hash)
        size = pages.nbytes + values.nbytes
        self._make_room(size)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{secrets.token_hex(8)}.unfinished")
        about = {"contents": self._contents, "block": block_hash.hex(), "crc32": _checksum(pages, values)}
        try:
            with unfinished.open("wb") as opened:
                opened.write(_header(about, pages, values))
                for part in (pages, values):
                    opened.write(_bytes(part))
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
        return size

    def read(self, block_hash: bytes) -> tuple[Tensor, Tensor]:
        """Reads and checks a block.

        Returns:
            Its pages and values, as of `write`.

        Raises:
            BadBlockError: it is gone, of another model, layout, version or block, or not what was written.
        """
        file = self._folder.file(self._rank, block_hash)
        try:
            # Not mapped: of a disk that fails, or another machine that removes the file, a signal would tell.
            with safe_open(file, framework="pt", backend="pread") as opened:
                about = opened.metadata() or {}
                if about.get("contents") != self._contents:
                    raise BadBlockError(f"is of something else: {about.get('contents', 'it does not say')}")
                if about.get("block") != block_hash.hex():
                    raise BadBlockError(f"is block {about.get('block')}")
                pages, values = opened.get_tensor("pages"), opened.get_tensor("values")
            is_intact = _checksum(pages, values) == about.get("crc32")
        except FileNotFoundError as error:
            raise BadBlockError("is gone") from error
        except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:  # NumPy's and PyTorch's too
            raise BadBlockError(f"cannot be read: {error}") from error
        if not is_intact:
            raise BadBlockError("has another checksum than it says")
        return pages, values

    def remove(self, block_hash: bytes) -> None:
        """Removes a block, so that a good one can be written; does nothing where that is not allowed."""
        with contextlib.suppress(OSError):
            self._folder.file(self._rank, block_hash).unlink()

    def touch(self, block_hashes: Iterable[bytes]) -> None:
        """Notes that blocks are in use.

        Args:
            block_hashes: of one context, from the first on: the last is noted as the earliest, and so removed first.
        """
        now = time.time_ns()
        for place, block_hash in enumerate(block_hashes):  # a system's own clock is the same for many of them
            with contextlib.suppress(OSError):
                os.utime(self._folder.file(self._rank, block_hash), ns=(now, now - place * 1000))

    def _make_room(self, size: int) -> None:
        """Removes the least recently used files of the folder, where there is no room for one more."""
        with self._lock:
            self._until_look -= size
            if self._until_look > 0:
                return
            self._until_look = self._between_looks
            files = sorted(_files(self._folder.folder))
            too_many = sum(of_file for _, of_file, _ in files) + size + self._until_look - self._max_bytes
            for _, of_file, file in files:
                if too_many <= 0:
                    break
                with contextlib.suppress(OSError):
                    file.unlink()
                    too_many -= of_file


def _files(folder: Path) -> Iterable[tuple[int, int, Path]]:
    """When each was last used, its bytes, and its path; what nobody goes on writing is removed."""
    for name in glob.iglob(OURS, root_dir=folder):  # noqa: PTH207  (Path's raises where a folder is removed)
        file = folder / name
        with contextlib.suppress(OSError):  # another process may remove it meanwhile
            status = file.stat()
            if file.suffix == ENDING:
                yield status.st_mtime_ns, status.st_size, file
            elif file.suffix == ".unfinished" and time.time() - status.st_mtime > SECONDS_OF_A_WRITE:
                file.unlink()


def _header(about: Mapping[str, str], pages: Tensor, values: Tensor) -> bytes:
    """As the safetensors format has it. Its own writer keeps unfinished files under names that it does not tell."""
    fields: dict[str, Any] = {"__metadata__": about}
    for name, part, begin in (("pages", pages, 0), ("values", values, pages.nbytes)):
        fields[name] = {"dtype": "U8", "shape": [*part.shape], "data_offsets": [begin, begin + part.nbytes]}
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


def _checksum(pages: Tensor, values: Tensor) -> str:
    """CRC-32 of both, one after the other: a disk's errors are to be found, not an adversary's."""
    checksum = 0
    for part in (pages, values):
        checksum = zlib.crc32(f"{part.dtype} {[*part.shape]}".encode(), checksum)
        checksum = zlib.crc32(_bytes(part), checksum)
    return f"{checksum:08x}"


def _bytes(part: Tensor) -> memoryview:
    return part.flatten().view(torch.uint8).numpy().data


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def used_bytes(folder: Path) -> int:
    """Bytes of the blocks in a folder."""
    return sum(size for _, size, _ in _files(folder))
