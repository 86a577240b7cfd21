"""Sealed blocks in files, where another engine, or the next one, finds them.

A file is one rank's part of one block, in the safetensors format: `pages` uint8 `[layers, page_bytes]`, `values` uint8
`[layers, row_bytes]`, and in its metadata what it is (`BlockStore.contents`), which block, and a checksum. It appears
under its name when it is complete, and never changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ENDING = ".safetensors"
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

    def count(self, ranks: Iterable[str], block_hashes: Iterable[bytes]) -> int:
        """How many of these blocks, from the first on, all ranks have."""
        ranks, found = list(ranks), 0
        for block_hash in block_hashes:
            if not all(self.file(rank, block_hash).is_file() for rank in ranks):
                break
            found += 1
        return found

    def clear(self) -> None:
        """Removes all blocks of the model."""
        shutil.rmtree(self._model, ignore_errors=True)


class BlockStore:
    """A rank's blocks of one model. Threads may share it, and processes the folder."""

    def __init__(self, folder: BlockFolder, rank: str, contents: Mapping[str, Any], max_bytes: int) -> None:
        """Looks how much there is when it first writes.

        Args:
            folder: of the model.
            rank: which part of a block's heads and layers.
            contents: what its files say of themselves; others are refused.
            max_bytes: of the files of all models and ranks in the folder; the least recently used go first.
        """
        self._folder, self._rank, self._contents = folder, rank, _canonical(contents)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._until_look = 0

    def has(self, block_hash: bytes) -> bool:
        """Whether there is such a file."""
        return self._folder.file(self._rank, block_hash).is_file()

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
        file = self._folder.file(self._rank, block_hash)
        if file.is_file():
            return 0
        size = pages.nbytes + values.nbytes
        self._make_room(size)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.unfinished")
        about = {"contents": self._contents, "block": block_hash.hex(), "crc32": _checksum(pages, values)}
        try:
            save_file({"pages": pages, "values": values}, unfinished, metadata=about)
            unfinished.replace(file)
        except SafetensorError as error:  # what Rust could not write
            raise OSError(str(error)) from error
        finally:
            unfinished.unlink(missing_ok=True)
        return size

    def read(self, block_hash: bytes) -> tuple[Tensor, Tensor]:
        """Reads and checks a block.

        Returns:
            Its pages and values, as of `write`, in the file's own memory.

        Raises:
            BadBlockError: it is gone, of another model, layout, version or block, or not what was written.
        """
        file = self._folder.file(self._rank, block_hash)
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                if about.get("contents") != self._contents:
                    raise BadBlockError(f"is of something else: {about.get('contents', 'it does not say')}")
                if about.get("block") != block_hash.hex():
                    raise BadBlockError(f"is block {about.get('block')}")
                pages, values = opened.get_tensor("pages"), opened.get_tensor("values")
        except FileNotFoundError as error:
            raise BadBlockError("is gone") from error
        except (OSError, SafetensorError) as error:
            raise BadBlockError(f"cannot be read: {error}") from error
        if _checksum(pages, values) != about.get("crc32"):
            raise BadBlockError("has another checksum than it says")
        return pages, values

    def remove(self, block_hash: bytes) -> None:
        """Removes a block, so that a good one can be written; does nothing where that is not allowed."""
        with contextlib.suppress(OSError):
            self._folder.file(self._rank, block_hash).unlink()

    def touch(self, block_hashes: Iterable[bytes]) -> None:
        """Notes that blocks are in use.

        Args:
            block_hashes: of one context, from the first on: the last is noted first, and so removed first.
        """
        for block_hash in reversed(list(block_hashes)):
            with contextlib.suppress(OSError):
                os.utime(self._folder.file(self._rank, block_hash))

    def _make_room(self, size: int) -> None:
        """Removes the least recently used files of the folder, where there is no room for one more."""
        with self._lock:
            self._until_look -= size
            if self._until_look > 0:
                return
            self._until_look = min(BYTES_BETWEEN_LOOKS, self._max_bytes // 16)
            files = sorted(_files(self._folder.folder))
            too_many = sum(of_file for _, of_file, _ in files) + size + self._until_look - self._max_bytes
            for _, of_file, file in files:
                if too_many <= 0:
                    break
                with contextlib.suppress(OSError):
                    file.unlink()
                    too_many -= of_file


def _files(folder: Path) -> Iterable[tuple[float, int, Path]]:
    """When each was last used, its bytes, and its path; what nobody goes on writing is removed."""
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may remove it meanwhile
            if file.suffix == ENDING:
                status = file.stat()
                yield status.st_mtime, status.st_size, file
            elif file.suffix == ".unfinished" and time.time() - file.stat().st_mtime > SECONDS_OF_A_WRITE:
                file.unlink()


def _checksum(pages: Tensor, values: Tensor) -> str:
    """CRC-32 of both, one after the other: a disk's errors are to be found, not an adversary's."""
    checksum = 0
    for part in (pages, values):
        checksum = zlib.crc32(part.contiguous().numpy().data, checksum)
    return f"{checksum:08x}"


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def used_bytes(folder: Path) -> int:
    """Bytes of the blocks in a folder."""
    return sum(size for _, size, _ in _files(folder))
