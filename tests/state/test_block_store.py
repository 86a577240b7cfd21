from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_shadowkv.state import block_store
from vllm_shadowkv.state.block_store import ENDING, BadBlockError, BlockFolder, BlockStore, used_bytes

MODEL = {"model": "a model", "settings": {"rank": None}}
CONTENTS = {**MODEL, "rank": "pp0of1-tp0of1", "layers": 3}
HASH = bytes(range(32))
Pair = tuple[Tensor, Tensor]


def block(seed: int = 0, layers: int = 3, page_bytes: int = 40, row_bytes: int = 24) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(0, 256, (layers, size), dtype=torch.uint8, generator=generator)
        for size in (page_bytes, row_bytes)
    )  # type: ignore[return-value]


def store_of(path: Path, max_bytes: int = 2**30, contents: dict[str, Any] = CONTENTS, rank: str = "rank") -> BlockStore:
    return BlockStore(BlockFolder(path, MODEL), rank, contents, max_bytes)


def file_of(path: Path, block_hash: bytes = HASH, rank: str = "rank") -> Path:
    return BlockFolder(path, MODEL).file(rank, block_hash)


def some_hash(number: int) -> bytes:
    """Which has nothing of the number's order."""
    return random.Random(number).randbytes(32)


def names(path: Path) -> set[str]:
    """Of all files."""
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def same(found: Pair, written: Pair) -> bool:
    return all(
        a.dtype == torch.uint8 and a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, written, strict=True)
    )


def of_numbers(path: Path, numbers: Iterable[int], store: BlockStore) -> list[int]:
    """Those whose blocks are there; each has been written as what it is."""
    there = [number for number in numbers if store.has(some_hash(number))]
    assert all(store.read(some_hash(number)) for number in there)
    assert len(names(path)) == len(there)
    return there


# -- What is written is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 40, 24), (1, 40, 24), (2, 1, 1), (5, 4097, 13), (1, 1, 100_003), (3, 8, 0)])
def test_bytes_come_back_as_they_were(shape: tuple[int, int, int], tmp_path: Path) -> None:
    written = block(0, *shape)
    size = sum(part.nbytes for part in written)
    assert store_of(tmp_path).write(HASH, *written) == size
    assert same(store_of(tmp_path).read(HASH), written)


def test_tensors_need_not_be_contiguous(tmp_path: Path) -> None:
    pages, values = block(0, 8, 80, 6)
    parts = (pages[::2, 1::2], values.T)
    store_of(tmp_path).write(HASH, *parts)
    assert same(store_of(tmp_path).read(HASH), parts)
    pages[:], values[:] = 0, 0
    assert store_of(tmp_path).read(HASH)[0].any(), "the file is a copy"


def test_both_may_be_of_one_tensor(tmp_path: Path) -> None:
    both = block()[0]
    store_of(tmp_path).write(HASH, both, both[:, 8:])
    assert same(store_of(tmp_path).read(HASH), (both, both[:, 8:]))


def test_what_was_read_outlives_its_file(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.write(HASH, *block())
    found = store.read(HASH)
    file_of(tmp_path).write_bytes(bytes(1000))
    store.remove(HASH)
    assert same(found, block())


def test_files_are_in_the_safetensors_format(tmp_path: Path) -> None:
    store_of(tmp_path).write(HASH, *block())
    loaded = load_file(file_of(tmp_path))
    assert loaded.keys() == {"pages", "values"}
    assert same((loaded["pages"], loaded["values"]), block())


def test_where_files_are(tmp_path: Path) -> None:
    store_of(tmp_path).write(HASH, *block())
    (name,) = names(tmp_path)
    model, *rest = name.split("/")
    assert rest == ["rank", "00", HASH.hex() + ENDING]
    assert str(BlockFolder(tmp_path, MODEL)) == str(tmp_path / model)
    assert len(model) == 16
    assert file_of(tmp_path) == tmp_path / name


def test_a_model_is_what_it_says_in_whatever_order(tmp_path: Path) -> None:
    reordered = dict(reversed(MODEL.items()))
    assert str(BlockFolder(tmp_path, reordered)) == str(BlockFolder(tmp_path, MODEL))
    others = ({**MODEL, "model": "another"}, {**MODEL, "settings": {"rank": 16}}, {"model": "a model"})
    assert len({str(BlockFolder(tmp_path, model)) for model in (MODEL, *others)}) == 4


def test_others_may_read_what_the_users_mask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        store_of(tmp_path).write(HASH, *block())
    finally:
        os.umask(before)
    assert file_of(tmp_path).stat().st_mode & 0o777 == 0o640


# -- Once, and complete ----------------------------------------------------------------------------------------------


def test_a_block_is_written_once(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    assert not store.has(HASH)
    store.write(HASH, *block())
    assert store.has(HASH)
    status = file_of(tmp_path).stat()
    for again in (store, store_of(tmp_path)):
        assert again.write(HASH, *block(1)) == 0
    assert file_of(tmp_path).stat() == status
    assert same(store.read(HASH), block())


def test_a_file_appears_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], block_store._bytes

    def look(part: Tensor) -> memoryview:
        seen.append((file_of(tmp_path).exists(), names(tmp_path)))
        return original(part)

    monkeypatch.setattr(block_store, "_bytes", look)
    store_of(tmp_path).write(HASH, *block())
    assert [there for there, _ in seen] == [False] * len(seen)
    (unfinished,) = seen[-1][1]
    assert unfinished.endswith(".unfinished")
    assert names(tmp_path) == {str(file_of(tmp_path).relative_to(tmp_path))}


def test_threads_that_write_the_same_block(tmp_path: Path) -> None:
    store, written = store_of(tmp_path), block(0, 4, 200_000, 100_000)
    wrong: list[Any] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if store.has(HASH) and not same(store.read(HASH), written):
                wrong.append("a file that is not complete")

    barrier = threading.Barrier(8)

    def write(_: int) -> int:
        barrier.wait()
        return store.write(HASH, *written)

    with ThreadPoolExecutor(10) as threads:
        readers = [threads.submit(read) for _ in range(2)]
        sizes = set(threads.map(write, range(8)))
        done.set()
        for reader in readers:
            reader.result()
    assert sizes <= {0, 1_200_000}
    assert 1_200_000 in sizes
    assert not wrong
    assert names(tmp_path) == {str(file_of(tmp_path).relative_to(tmp_path))}
    assert same(store.read(HASH), written)


# -- What is not a block ---------------------------------------------------------------------------------------------


def refused(path: Path, data: bytes | None = None) -> str:
    """Why a file is refused, by BadBlockError and nothing else."""
    if data is not None:
        file_of(path).write_bytes(data)
    with pytest.raises(BadBlockError) as caught:
        store_of(path).read(HASH)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    """A block's file."""
    store_of(tmp_path).write(HASH, *block())
    return file_of(tmp_path).read_bytes()


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_a_byte_of_pages_or_values(good: bytes, tmp_path: Path) -> None:
    begin = header_bytes(good)
    assert len(good) == begin + 3 * 40 + 3 * 24
    for place in (begin, begin + 119, begin + 120, len(good) - 1):
        assert refused(tmp_path, flipped(good, place, 1)) == "has another checksum than it says"


def flipped(data: bytes, place: int, by: int) -> bytes:
    return data[:place] + bytes([data[place] ^ by]) + data[place + 1 :]


def test_any_byte(good: bytes, tmp_path: Path) -> None:
    """Every byte of the header with several others in its place, and of the data with one."""
    chosen = random.Random(0)
    places = [place for place in range(header_bytes(good)) for _ in range(8)]
    outcomes = {"refused": 0, "right": 0}
    for place in places + list(range(header_bytes(good), len(good))):
        file_of(tmp_path).write_bytes(flipped(good, place, chosen.randrange(1, 256)))
        try:
            assert same(store_of(tmp_path).read(HASH), block()), place
            outcomes["right"] += 1
        except BadBlockError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 2000
    assert outcomes["right"] < 20, "of a blank, another blank"


def test_random_rubbish(good: bytes, tmp_path: Path) -> None:
    """Several bytes anywhere, and pieces that were cut out, doubled or written over with zeros, as of a torn write."""
    chosen = random.Random(1)
    for _ in range(300):
        begin, end = sorted(chosen.sample(range(len(good) + 1), 2))
        rubbish = chosen.choice(
            [
                good[:begin] + good[end:],
                good[:end] + good[begin:],
                good[:begin] + bytes(end - begin) + good[end:],
                good[:begin] + chosen.randbytes(end - begin) + good[end:],
                good[:begin] + bytes(end - begin),
            ]
        )
        if rubbish != good:
            refused(tmp_path, rubbish)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -193, -192, -191, -73, -72, -1])
def test_a_truncated_file(length: int, good: bytes, tmp_path: Path) -> None:
    refused(tmp_path, good[: length if length >= 0 else len(good) + length])


def test_bytes_behind_the_end(good: bytes, tmp_path: Path) -> None:
    refused(tmp_path, good + b"\0")


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"__metadata__": {}}', '{"pages": 1}', "\xff", "{" * 1000])
def test_headers_that_say_nothing(text: str, good: bytes, tmp_path: Path) -> None:
    raw = text.encode("latin1")
    refused(tmp_path, len(raw).to_bytes(8, "little") + raw + good[header_bytes(good) :])


@pytest.mark.parametrize("length", [0, 2**20, 2**31, 2**63, 2**64 - 1])
def test_headers_of_another_length(length: int, good: bytes, tmp_path: Path) -> None:
    refused(tmp_path, length.to_bytes(8, "little") + good[8:])


def with_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with a header that was changed, as a program that writes good ones would."""
    header = json.loads(data[8 : header_bytes(data)])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[header_bytes(data) :]


def part(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


CHANGED_HEADERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "other numbers of as many bytes": part("pages", dtype="I8"),
    "bool": part("pages", dtype="BOOL"),
    "float8": part("pages", dtype="F8_E4M3"),
    "float8 scales": part("pages", dtype="F8_E8M0"),
    "float4": part("pages", dtype="F4", shape=[3, 80]),
    "bfloat16": part("values", dtype="BF16", shape=[3, 12]),
    "float64": part("values", dtype="F64", shape=[9]),
    "another shape": part("pages", shape=[40, 3]),
    "a flat shape": part("pages", shape=[120]),
    "a number": lambda header: header.update(
        pages={"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
        values={"dtype": "U8", "shape": [191], "data_offsets": [1, 192]},
    ),
    "another border": lambda header: header.update(
        pages={"dtype": "U8", "shape": [3, 32], "data_offsets": [0, 96]},
        values={"dtype": "U8", "shape": [3, 32], "data_offsets": [96, 192]},
    ),
    "no values": lambda header: header.pop("values"),
    "no checksum": lambda header: header["__metadata__"].pop("crc32"),
    "a checksum that is empty": lambda header: header["__metadata__"].update(crc32=""),
    "no metadata": lambda header: header.pop("__metadata__"),
    "more parts": lambda header: header.update(more={"dtype": "U8", "shape": [0], "data_offsets": [192, 192]}),
}


@pytest.mark.parametrize("change", CHANGED_HEADERS)
def test_another_header_over_the_same_bytes(change: str, good: bytes, tmp_path: Path) -> None:
    file_of(tmp_path).write_bytes(with_header(good, lambda header: None))
    assert same(store_of(tmp_path).read(HASH), block())
    if change == "more parts":  # of which nothing is read
        file_of(tmp_path).write_bytes(with_header(good, CHANGED_HEADERS[change]))
        assert same(store_of(tmp_path).read(HASH), block())
    else:
        refused(tmp_path, with_header(good, CHANGED_HEADERS[change]))


def test_another_file(tmp_path: Path, good: bytes) -> None:
    for data in (b"", b"#!/bin/sh\n" * 100, bytes(4096), random.Random(2).randbytes(4096)):
        refused(tmp_path, data)
    save_file({"weight": torch.ones(3)}, file_of(tmp_path))
    assert refused(tmp_path) == "is of something else: it does not say"


def test_what_is_no_file(good: bytes, tmp_path: Path) -> None:
    file = file_of(tmp_path)
    file.unlink()
    assert refused(tmp_path) == "is gone"
    for make in (
        file.mkdir,
        lambda: file.symlink_to(tmp_path / "nowhere"),
        lambda: file.symlink_to(file),
        lambda: os.mkfifo(file),
    ):
        make()
        if not file.is_fifo():  # whoever opens one waits for a writer
            refused(tmp_path)
        assert not store_of(tmp_path).has(HASH)
        assert BlockFolder(tmp_path, MODEL).count(["rank"], [HASH]) == 0
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    shutil.rmtree(tmp_path)
    assert refused(tmp_path) == "is gone"


def test_a_file_that_says_something_else(good: bytes, tmp_path: Path) -> None:
    sentence = store_error({**CONTENTS, "layers": 4}, tmp_path)
    assert sentence.startswith("is of something else: {")
    assert '"layers": 3' in sentence
    assert store_error({}, tmp_path).startswith("is of something else: {")
    assert same(store_of(tmp_path, contents=dict(reversed(CONTENTS.items()))).read(HASH), block())


def store_error(contents: dict[str, Any], path: Path) -> str:
    with pytest.raises(BadBlockError) as caught:
        store_of(path, contents=contents).read(HASH)
    return str(caught.value)


def test_a_block_under_the_name_of_another(good: bytes, tmp_path: Path) -> None:
    other = bytes(32)
    file = file_of(tmp_path, other)
    file.parent.mkdir(exist_ok=True)
    shutil.copy(file_of(tmp_path), file)
    store = store_of(tmp_path)
    with pytest.raises(BadBlockError, match=f"^is block {HASH.hex()}$"):
        store.read(other)
    store.remove(other)
    store.write(other, *block(1))
    assert same(store.read(other), block(1))
    assert same(store.read(HASH), block())


OF_A_PROCESS = """
import os, sys
from pathlib import Path
import torch
from vllm_shadowkv.state import block_store
from vllm_shadowkv.state.block_store import BadBlockError, BlockFolder, BlockStore
store = BlockStore(BlockFolder(Path(sys.argv[1]), {}), "rank", {}, int(sys.argv[2]))
"""
SHORTER = f"""{OF_A_PROCESS}
store.write(b"h", torch.ones(16, 65536, dtype=torch.uint8), torch.ones(16, 65536, dtype=torch.uint8))
opened = block_store.safe_open
def open_and_truncate(file, **options):
    made = opened(file, **options)
    os.truncate(file, 4096)
    return made
block_store.safe_open = open_and_truncate
try:
    store.read(b"h")
except BadBlockError as error:
    print(error)
"""


def test_a_file_that_becomes_shorter_is_no_end_of_the_process(tmp_path: Path) -> None:
    """As one that another machine removes, or whose disk fails: one that is mapped would raise SIGBUS."""
    command = [sys.executable, "-c", SHORTER, str(tmp_path), str(2**30)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode != -signal.SIGBUS
    assert ended.stdout.startswith("cannot be read: "), ended.stderr


# -- Finding, noting, removing ---------------------------------------------------------------------------------------


def test_the_count_stops_at_the_first_hole_of_any_rank(tmp_path: Path) -> None:
    folder = BlockFolder(tmp_path, MODEL)
    hashes = [some_hash(number) for number in range(6)]
    there = {"a": [0, 1, 2, 3, 5], "b": [0, 1, 2, 4, 5], "c": [1, 2, 3, 4, 5]}
    for rank, numbers in there.items():
        for number in numbers:
            store_of(tmp_path, rank=rank).write(hashes[number], *block())
    assert folder.count(["a"], hashes) == 4
    assert folder.count(["b"], hashes) == 3
    assert folder.count(["a", "b"], hashes) == folder.count(iter(["b", "a"]), iter(hashes)) == 3
    assert folder.count(["a", "b", "c"], hashes) == 0
    assert folder.count(["a", "b", "c"], hashes[1:]) == 2
    assert folder.count(["a", "d"], hashes) == 0
    assert folder.count(["a"], []) == 0
    assert BlockFolder(tmp_path, {**MODEL, "model": "another"}).count(["a"], hashes) == 0


def test_a_disk_that_does_not_answer_has_no_blocks(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def fail(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(ENDING):
            raise OSError(errno.EIO, "Input/output error")
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        assert not store_of(tmp_path).has(HASH)
        assert BlockFolder(tmp_path, MODEL).count(["rank"], [HASH]) == 0
    assert BlockFolder(tmp_path, MODEL).count(["rank"], [HASH]) == 1


def test_what_is_not_there_is_neither_touched_nor_removed(good: bytes, tmp_path: Path) -> None:
    store = store_of(tmp_path)
    os.utime(file_of(tmp_path), (1000, 1000))
    store.touch([some_hash(1), HASH, some_hash(2)])
    assert time.time() - file_of(tmp_path).stat().st_mtime < 60
    store.remove(some_hash(1))
    assert names(tmp_path) == {str(file_of(tmp_path).relative_to(tmp_path))}
    store.remove(HASH)
    store.remove(HASH)
    store.touch([HASH])
    assert not store.has(HASH)
    assert names(tmp_path) == set()


# -- The bound -------------------------------------------------------------------------------------------------------

PAGE, ROW = 8000, 2000
SIZE = PAGE + ROW
FILE = SIZE + 400
"""Most that a file has with its header."""


def write(store: BlockStore, *numbers: int) -> None:
    for number in numbers:
        assert store.write(some_hash(number), *block(number, 1, PAGE, ROW)) == SIZE


def use_at(path: Path, number: int, seconds: float) -> None:
    os.utime(file_of(path, some_hash(number)), (seconds, seconds))


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = store_of(tmp_path, max_bytes=5 * FILE + SIZE // 16 * 5)
    write(store, *range(5))
    assert of_numbers(tmp_path, range(9), store) == [0, 1, 2, 3, 4]
    for number, seconds in enumerate([300.0, 100.0, 500.0, 200.0, 400.0]):
        use_at(tmp_path, number, seconds)
    write(store, 5)
    assert of_numbers(tmp_path, range(9), store) == [0, 2, 3, 4, 5]
    store.touch([some_hash(3)])
    write(store, 6)
    assert of_numbers(tmp_path, range(9), store) == [2, 3, 4, 5, 6]


def test_times_that_differ_by_little_count(tmp_path: Path) -> None:
    """A float of seconds has a quarter of a microsecond in it."""
    store = store_of(tmp_path)
    write(store, *range(8))
    now = time.time_ns()
    for number in range(8):
        os.utime(file_of(tmp_path, some_hash(number)), ns=(now, now + number))
    write(store_of(tmp_path, max_bytes=5 * FILE), 8)
    there = of_numbers(tmp_path, range(9), store)
    assert there == list(range(9))[-len(there) :]
    assert 3 <= len(there) < 6


@pytest.mark.parametrize("kept", [1, 7, 29])
def test_of_a_context_the_last_blocks_go_first(kept: int, tmp_path: Path) -> None:
    store = store_of(tmp_path)
    write(store, *range(30))
    store.touch(iter([some_hash(number) for number in range(30)]))
    write(store_of(tmp_path, max_bytes=(kept + 1) * FILE * 16 // 15), 99)
    assert of_numbers(tmp_path, range(100), store) == [*range(kept), 99]


def test_a_context_in_use_outlives_another_of_the_same_beginning(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    write(store, *range(12))
    first, second = [0, 1, 2, 3, 4, 5], [0, 1, 2, 8, 9, 10, 11]
    store.touch([some_hash(number) for number in first])
    for number in first:  # a minute ago
        last = file_of(tmp_path, some_hash(number)).stat().st_mtime_ns - 60 * 10**9
        os.utime(file_of(tmp_path, some_hash(number)), ns=(last, last))
    store.touch([some_hash(number) for number in second])
    use_at(tmp_path, 6, 1000)
    use_at(tmp_path, 7, 2000)
    gone = []
    for left in range(12, 0, -1):  # one more at a time
        write(store_of(tmp_path, max_bytes=left * FILE * 16 // 15), 99)
        store.remove(some_hash(99))
        gone += [number for number in range(12) if not store.has(some_hash(number)) and number not in gone]
    assert gone == [6, 7, 5, 4, 3, 11, 10, 9, 8, 2, 1, 0]


def test_the_bound_is_of_all_models_and_ranks(tmp_path: Path) -> None:
    others = [BlockFolder(tmp_path, {**MODEL, "model": str(number)}) for number in range(3)]
    for folder in others:
        for rank in ("a", "b"):
            BlockStore(folder, rank, {}, 2**30).write(HASH, *block(0, 1, PAGE, ROW))
            os.utime(folder.file(rank, HASH), (1000, 1000))
    assert 6 * SIZE < used_bytes(tmp_path) < 6 * FILE
    store = store_of(tmp_path, max_bytes=3 * FILE * 16 // 15)
    write(store, 0)
    assert store.has(some_hash(0))
    assert sum(folder.file(rank, HASH).exists() for folder in others for rank in "ab") == 2
    assert used_bytes(tmp_path) < 3 * FILE


def test_a_block_larger_than_all_is_written_alone(tmp_path: Path) -> None:
    store = store_of(tmp_path, max_bytes=1)
    for number in range(3):
        write(store, number)
        assert of_numbers(tmp_path, range(3), store) == [number]


@pytest.mark.parametrize("between", [2**30, 15_000])
def test_what_two_stores_write_stays_within_the_bound(
    between: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes less than it may between two looks, after the look of either."""
    monkeypatch.setattr(block_store, "BYTES_BETWEEN_LOOKS", between)
    most = 48 * SIZE
    look = min(most // 16, between)
    headers = 2 * (look // SIZE + 1) * (FILE - SIZE)
    stores = [store_of(tmp_path, most), store_of(tmp_path, most)]
    chosen, largest = random.Random(3), 0
    for number in range(240):
        write(chosen.choice(stores), number)
        if number > 60:
            largest = max(largest, used_bytes(tmp_path))
            assert most - look - 3 * FILE < used_bytes(tmp_path) < most + look + headers
    assert largest > most - look + SIZE, "it looks before every write"
    there = of_numbers(tmp_path, range(240), stores[0])
    assert there == list(range(240))[-len(there) :]


WRITE_MANY = f"""{OF_A_PROCESS}
print("begin", flush=True)
sys.stdin.readline()
for number in range(200):
    pages = torch.full((1, {PAGE}), number % 256, dtype=torch.uint8)
    store.write(sys.argv[3].encode() + number.to_bytes(2, "big"), pages, pages[:, :{ROW}])
"""


def test_what_two_processes_write_stays_within_the_bound(tmp_path: Path) -> None:
    most = 40 * SIZE
    command = [sys.executable, "-c", WRITE_MANY, str(tmp_path), str(most)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, name], **pipes) for name in ("a", "b")]
    for process in processes:
        assert process.stdout.readline() == "begin\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    largest = 0
    while any(process.poll() is None for process in processes):
        largest = max(largest, used_bytes(tmp_path))
    assert [process.returncode for process in processes] == [0, 0]
    for process in processes:
        process.communicate()
    headers = 2 * (most // 16 // SIZE + 1) * (FILE - SIZE)
    # Beside what each writes between looks, a look does not see what the other is just writing.
    assert max(largest, used_bytes(tmp_path)) < most + most // 16 + headers + FILE
    assert used_bytes(tmp_path) > most // 2
    assert {name.rpartition(".")[2] for name in names(tmp_path)} == {"safetensors"}


def test_files_that_are_no_blocks_are_left_alone(tmp_path: Path) -> None:
    """A folder of checkpoints, for one, which are in the same format."""
    checkpoint = torch.zeros(20 * SIZE, dtype=torch.uint8)
    model = Path(str(BlockFolder(tmp_path, MODEL)))
    foreign = [
        tmp_path / "model.safetensors",
        tmp_path / "a model" / "model-00001-of-00002.safetensors",
        tmp_path / "models--a--model" / "snapshots" / ("0a" * 20) / "model.safetensors",
        tmp_path / "checkpoints" / "step" / "10" / "model.safetensors",
        tmp_path / "a" / "download.unfinished",
        model / "README.md",
        model / "notes.safetensors",
        model / "rank" / "00" / "notes.txt",
    ]
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"weight": checkpoint}, file)
        os.utime(file, (1000, 1000))
    store = store_of(tmp_path, max_bytes=3 * FILE * 16 // 15)
    assert used_bytes(tmp_path) == 0
    write(store, *range(10))
    assert [file for file in foreign if not file.exists()] == []
    assert [number for number in range(10) if store.has(some_hash(number))] == [7, 8, 9]
    assert 2 * SIZE < used_bytes(tmp_path) <= 3 * FILE


# -- What goes wrong in writing --------------------------------------------------------------------------------------


def test_old_unfinished_files_are_removed(tmp_path: Path) -> None:
    write(store_of(tmp_path), 0)
    file = file_of(tmp_path, some_hash(0))
    old, young = file.with_suffix(".1.1.unfinished"), file.with_suffix(".2.2.unfinished")
    for unfinished, hours in ((old, 1.1), (young, 0.9)):
        unfinished.write_bytes(bytes(100))
        os.utime(unfinished, (time.time() - hours * 3600,) * 2)
    use_at(tmp_path, 0, 1000)
    store = store_of(tmp_path)
    assert store.has(some_hash(0))
    assert old.exists()
    write(store, 1)
    assert not old.exists()
    assert young.exists()
    assert store.has(some_hash(0)), "a block is none of them, however old"


def test_a_process_that_is_killed_leaves_only_what_is_removed_later(tmp_path: Path) -> None:
    script = f"""{OF_A_PROCESS}
large = torch.zeros(16, 2**24, dtype=torch.uint8)
print("begin", flush=True)
store.write(b"h", large, large)
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(2**40)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    while process.poll() is None and not names(tmp_path):
        pass
    process.kill()
    process.communicate()
    (left,) = names(tmp_path)
    assert left.endswith(".unfinished"), "it was too fast to be killed"
    os.utime(tmp_path / left, (1000, 1000))
    write(store_of(tmp_path), 0)
    assert names(tmp_path) == {str(file_of(tmp_path, some_hash(0)).relative_to(tmp_path))}


@contextmanager
def full_at(num_bytes: int) -> Iterator[None]:
    """Lets no file of this process become longer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("num_bytes", [0, 100, 5000, 9000, SIZE])
def test_a_full_disk(num_bytes: int, tmp_path: Path) -> None:
    store = store_of(tmp_path)
    with full_at(num_bytes), pytest.raises(OSError, match="File too large"):
        write(store, 0)
    assert names(tmp_path) == set()
    assert not store.has(some_hash(0))
    write(store, 0)
    assert of_numbers(tmp_path, [0], store) == [0]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = store_of(tmp_path / "file" / "below")
    assert not store.has(HASH)
    with pytest.raises(NotADirectoryError):
        store.write(HASH, *block())
    store.touch([HASH])
    store.remove(HASH)
    with pytest.raises(BadBlockError):
        store.read(HASH)
    assert names(tmp_path) == {"file"}


def test_a_folder_where_the_file_should_be(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    file_of(tmp_path).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        store.write(HASH, *block())
    store.remove(HASH)
    assert names(tmp_path) == set()
    write(store_of(tmp_path, max_bytes=1), 1)
    assert file_of(tmp_path).is_dir()


def test_folders_that_are_removed_while_they_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, or by another engine."""
    write(store_of(tmp_path), *range(20))
    scandir, numbers = os.scandir, iter(range(1000))

    def scan(path: Any) -> Any:
        if next(numbers) == 4:
            shutil.rmtree(str(BlockFolder(tmp_path, MODEL)))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    store = store_of(tmp_path)
    write(store, 99)
    assert next(numbers) > 5
    assert [number for number in range(100) if store.has(some_hash(number))] == [99]
