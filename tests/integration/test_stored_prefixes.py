"""Sealed blocks in files: what one engine has computed another one finds, also after the first has ended.

A writer is asked first, in a process of its own, then a reader the same. With settings that lose nothing both must say
what the stock engine says; with those that do, the reader what the writer says of blocks in its memory.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import needle_trial
import pytest
import torch
from engine import Result, Trial, Trials, differences
from simulation import Engine, Files, vllm_config
from test_life_of_a_token import LOSSLESS, NGRAM, RESIDENT, TOLERANCE
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import get_block_hash, resolve_block_hashes

from benchmarks.needle import CHECKPOINT
from benchmarks.needle.tasks import FAMILIES, make_prompts
from vllm_shadowkv.integration import stored
from vllm_shadowkv.integration.scheduler import stored_prefixes
from vllm_shadowkv.integration.scheduler.exact import ExactManager
from vllm_shadowkv.integration.scheduler.managers import ShadowManager
from vllm_shadowkv.integration.scheduler.publishing import PublishingManager
from vllm_shadowkv.integration.worker import transfers
from vllm_shadowkv.integration.worker.transfers import Transfers
from vllm_shadowkv.state.block_state import BlockState
from vllm_shadowkv.state.block_store import BlockFolder

SCENARIOS = ("prefixes", "stored", "aborts", "reset")
STOCK = Trial("stock-of-files", SCENARIOS, shadowkv=None, quick=("prefixes", "stored"))
NAMES = ("0: 700 tokens", "1: 1100 tokens", "2: 520 tokens")
"""Of the prompts of the scenario "stored"."""
SETTINGS = LOSSLESS | {"block_size": 256}
# Rebuilt keys and values of 8 bits, for which the sealed blocks of the memory are the measure.
REBUILT: dict[str, Any] = {"block_size": 256, "dense_threshold": 256, "resident_pages": False}
SAVED, LOADED, REFUSED, UNSAVED = (
    f"vllm:shadowkv_files_total {kind}" for kind in ("saved", "loaded", "refused", "unsaved")
)

READERS = (
    Trial("files-v1", SCENARIOS, SETTINGS | RESIDENT, poison=True, quick=("prefixes", "stored")),
    Trial("files-v1-sealed", SCENARIOS, SETTINGS, poison=True, quick=()),
    Trial(
        "files-v1-small-pool", SCENARIOS, SETTINGS | RESIDENT, options={"num_gpu_blocks_override": 23}, poison=True,
        quick=(),
    ),
    Trial(
        "files-v2-graphs", SCENARIOS, SETTINGS | RESIDENT, runner="v2", asynchronous=True, graphs=True, poison=True,
        options={"num_gpu_blocks_override": 40}, quick=("prefixes", "stored"),
    ),
    Trial(
        "files-drafts", ("prefixes", "stored"), SETTINGS, options={"speculative_config": NGRAM}, poison=True, quick=()
    ),
    Trial(
        "files-two-ranks", ("prefixes", "stored"), SETTINGS | RESIDENT, options={"tensor_parallel_size": 2},
        in_process=False, quick=(),
    ),
    Trial(
        "files-two-stages", ("prefixes", "stored"), SETTINGS | RESIDENT, runner="v2",
        options={"pipeline_parallel_size": 2}, in_process=False, quick=(),
    ),
)  # fmt: skip


def on_files(trial: Trial, folder: Path, name: str, role: str = "kv_both", **options: Any) -> Trial:
    """The trial with a folder of files."""
    connector = {
        "kv_connector": "ShadowKVConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"path": str(folder)},
    }
    more = {**trial.options, **options, "kv_transfer_config": connector}
    return replace(trial, name=f"{trial.name}-{name}", options=more)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def check_against_stock(trials: Trials, result: Result) -> None:
    stock = trials(STOCK).sequences
    for scenario, sequences in result.sequences.items():
        assert differences(sequences, stock[scenario], TOLERANCE) == []


@pytest.mark.parametrize(
    "trial", [pytest.param(one, id=one.name, marks=[pytest.mark.slow] if one.slow else []) for one in READERS]
)
def test_another_engine_finds_what_one_has_computed(trials: Trials, trial: Trial, tmp_path: Path) -> None:
    writer = trials(on_files(trial, tmp_path, "writer"))
    written = files(tmp_path)
    assert written
    check_against_stock(trials, writer)
    # Nothing is held; what the engine did in its last step is there, too.
    ranks = 2 if "parallel" in str(trial.options) else 1
    assert not trial.in_process or writer.counts[SAVED] == len(written)
    reader = trials(on_files(trial, tmp_path, "reader", role="kv_consumer"))
    check_against_stock(trials, reader)
    assert files(tmp_path) == written, "a consumer wrote"
    cached = {name: sequence["cached"] for name, sequence in reader.sequences["stored"].items()}
    assert {name: cached[f"first {name}"] for name in NAMES} == dict(zip(NAMES, (512, 1024, 512), strict=True))
    assert reader.sequences["prefixes"]["first"]["cached"] >= 256
    if trial.in_process:
        assert reader.counts[LOADED] >= 8
        assert reader.counts[SAVED] == reader.counts[REFUSED] == reader.counts[UNSAVED] == 0
    assert len(written) % ranks == 0


def test_rebuilt_keys_are_those_of_the_memory(trials: Trials, tmp_path: Path) -> None:
    trial = Trial("files-rebuilt", ("stored",), REBUILT)
    writer, reader = (trials(on_files(trial, tmp_path, name)).sequences["stored"] for name in ("writer", "reader"))
    again = {name: sequence for name, sequence in writer.items() if "first" not in name}
    found = {name.removeprefix("first "): sequence for name, sequence in reader.items() if "first" in name}
    assert differences(found, again, 1e-5) == []  # the last tokens of prompts are computed in other company
    computed = {name.removeprefix("first "): sequence for name, sequence in writer.items() if "first" in name}
    assert differences(found, computed, 1e-3), "nothing was lost in sealing"


@pytest.mark.slow
def test_needles_are_found_in_files(tmp_path: Path) -> None:
    """By the needle model, with the default settings of a page."""
    options = {"max_model_len": 4144, "max_num_batched_tokens": 4096, "skip_tokenizer_init": False}
    trial = Trial("files-needles", ("needles",), needle_trial.SETTINGS, options=options)
    trials = Trials(CHECKPOINT, tmp_path)
    try:
        writer, reader = (trials(on_files(trial, tmp_path / "files", name)) for name in ("writer", "reader"))
    finally:
        trials.close()
    right = 0
    for family in FAMILIES:
        again, found = writer.sequences["needles"][family], reader.sequences["needles"][f"first {family}"]
        assert again["cached"] == found["cached"] == 3072
        assert differences({family: found}, {family: again}, 1e-4) == []
        answer = make_prompts(family, 4080, 2_000_000, 1)[0].answer_ids
        right += sum(one == other for one, other in zip(found["tokens"], answer, strict=True)) / len(answer)
    assert right > len(FAMILIES) - 1.5
    assert reader.counts[LOADED] == 3 * len(FAMILIES)


def test_bad_files_are_refused_and_made_anew(trials: Trials, tmp_path: Path) -> None:
    trial = replace(READERS[0], scenarios=("stored",), quick=None)
    trials(on_files(trial, tmp_path, "before-bad"))
    good = {file: file.read_bytes() for file in files(tmp_path)}
    for number, (file, content) in enumerate(good.items()):
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        of_another_block = good[files(tmp_path)[number - 1]]
        file.write_bytes([flipped, content[:-1], b"no block", of_another_block][number % 4])
    reader = trials(on_files(trial, tmp_path, "after-bad"))
    check_against_stock(trials, reader)
    assert reader.counts[REFUSED] == reader.counts[SAVED] == len(good) == 8
    assert reader.counts[LOADED] == 0
    another = trials(on_files(trial, tmp_path, "after-good"))
    check_against_stock(trials, another)
    assert (another.counts[REFUSED], another.counts[LOADED]) == (0, len(good))


def test_a_producer_finds_nothing(trials: Trials, tmp_path: Path) -> None:
    trial = replace(READERS[0], scenarios=("stored",), quick=None)
    for name in ("producer", "second producer"):
        result = trials(on_files(trial, tmp_path, name, role="kv_producer"))
        assert result.counts[LOADED] == 0
        assert {result.sequences["stored"][f"first {name}"]["cached"] for name in NAMES} == {0}


# -- The scheduler's side ---------------------------------------------------------------------------------------------


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 500) for _ in range(length)]


def test_blocks_that_are_too_many_to_wait_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Files()
    engine = Engine(files=found)
    monkeypatch.setattr(transfers, "MOST_WAITING_BYTES", 2 * engine.worker.layout.page_bytes)
    run = engine.worker.threads.run
    monkeypatch.setattr(engine.worker.threads, "run", lambda most: run(most if most == 1000 else 0))  # a slow disk
    engine.add(prompt(6 * 64), max_tokens=2)
    engine.finish()
    assert len(found.blocks) == 2


def test_all_is_saved_before_the_engine_rests() -> None:
    found = Files()
    engine = Engine(files=found, max_step=400)
    engine.add(prompt(5 * 64), max_tokens=1)
    engine.finish()
    assert len(found.blocks) == 5
    another = Engine(files=found, max_step=400)
    request = another.add(prompt(5 * 64 + 1), max_tokens=1)
    another.finish()
    assert another.hits[request.request_id] == 5 * 64


def test_after_a_reset_of_the_connectors_cache_files_are_of_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Files()
    engine = Engine(files=found)
    engine.add(prompt(3 * 64), max_tokens=2)
    engine.finish()
    assert engine.scheduler.reset_prefix_cache()
    again = engine.add(prompt(3 * 64), max_tokens=2)
    engine.finish()
    assert engine.hits[again.request_id] == 2 * 64
    said: list[str] = []
    monkeypatch.setattr(stored_prefixes.logger, "info", said.append)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert said == ["shadowkv: the KV connector's cache was reset; no files are used until the next start."]
    kept = dict(found.blocks)
    with_new_weights = engine.add(prompt(5 * 64), max_tokens=2)
    engine.finish()
    assert engine.hits[with_new_weights.request_id] == 0
    assert found.blocks.keys() == kept.keys(), "other engines' files are gone, or there are files of new weights"


def test_what_one_request_waits_for_another_one_waits_for_too() -> None:
    found = Files()
    first = Engine(files=found)
    first.add(prompt(6 * 64), max_tokens=1)
    first.finish()
    engine = Engine(files=found, max_seqs=4)
    requests = [engine.add([*prompt(6 * 64), 7 + number], max_tokens=1) for number in range(4)]
    engine.finish()
    assert engine.worker.loaded == 1
    assert [engine.hits[request.request_id] for request in requests] == [6 * 64] * 4


def test_a_bad_block_costs_what_is_behind_it() -> None:
    found = Files()
    first = Engine(files=found)
    request = first.add(prompt(6 * 64), max_tokens=1)
    first.finish()
    order = resolve_block_hashes(request.block_hashes, first.hash_size, 64)
    found.bad_blocks = {bytes(order[3])}
    engine = Engine(files=found)
    again = engine.add(prompt(6 * 64 + 1), max_tokens=1)
    engine.finish()
    assert engine.hits[again.request_id] == 3 * 64
    assert (engine.worker.unread, engine.worker.loaded) == (1, 1)
    assert len(found.blocks) == 6, "it was not made anew"


def test_requests_that_wait_for_files_leave_each_other_room() -> None:
    """Each holds its sealed blocks while it waits, and needs exact pages for the end of its prompt then."""
    found = Files()
    prompts = [prompt(600, seed) for seed in range(8)]
    first = Engine(files=found)
    for one in prompts:
        first.add(one[: 8 * 64], max_tokens=1)
        first.finish()
    engine = Engine(num_blocks=38, files=found, dense_threshold=0, prefill_exact_tokens=0, max_step=96)
    for one in prompts:
        engine.add(one, max_tokens=3)
    engine.finish()
    assert engine.worker.loaded >= 8


def test_what_is_in_memory_is_not_read() -> None:
    """A hit goes on in files where it ends in memory, and never reads the block of the last token."""
    found = Files()
    engine = Engine(files=found)
    engine.add(prompt(6 * 64), max_tokens=1)
    engine.finish()
    shadow, pool = engine.managers[0], engine.manager.block_pool
    cached = [block for block in pool.blocks if block.block_hash is not None]
    first = engine.add(prompt(6 * 64), max_tokens=1)
    engine.finish()
    assert engine.hits[first.request_id] == 6 * 64 - 16
    assert not engine.worker.loaded
    hashes = shadow.kv_cache_spec.block_size // engine.hash_size
    kept = first.block_hashes[: 2 * hashes]
    pool.evict_blocks({block.block_id for block in cached if get_block_hash(block.block_hash) not in kept})
    again = engine.add(prompt(6 * 64), max_tokens=1)
    engine.finish()
    assert engine.hits[again.request_id] == 5 * 64
    assert engine.worker.loaded == 1


# -- Storms, and errors that are planted in them ----------------------------------------------------------------------


def storm(seed: int, bad: float) -> Engine:
    """Requests with common beginnings in a small pool, whose prefixes are forgotten whenever it is idle."""
    draw = random.Random(seed)
    engine = Engine(
        num_blocks=draw.choice([45, 60]),
        asynchronous=draw.random() < 0.5,
        runner=draw.choice(["v1", "v2", "v2-cuda"]),
        max_step=draw.choice([96, 300]),
        dense_threshold=draw.choice([0, 128]),
        compression=2,
        prefill_exact_tokens=draw.choice([0, 128]),
        files=Files(bad),
    )
    heads = [[random.Random(head).randrange(3, 500) for _ in range(400)] for head in range(3)]
    for _ in range(15):
        for _ in range(draw.randrange(3)):
            head, tail = draw.choice(heads)[: draw.choice([128, 200, 384, 400])], random.Random(draw.randrange(10))
            own = [tail.randrange(3, 500) for _ in range(draw.choice([1, 64, 100]))]
            engine.add(head + own, max_tokens=draw.choice([1, 2, 30, 60]))
        for _ in range(draw.randrange(1, 10)):
            engine.step()
        engine.scheduler.reset_prefix_cache()
    engine.finish()
    return engine


def storms(*seeds: int) -> list[Engine]:
    return [storm(seed, bad=0.5 * (seed % 2)) for seed in seeds]


def test_storms() -> None:
    engines = storms(*range(12))
    assert sum(engine.worker.loaded for engine in engines) > 5
    assert sum(engine.worker.unread for engine in engines) > 0


def loaded_in_the_old_epoch(self: Transfers, *load: Any) -> None:
    """What held other blocks' exact pages still passes for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockState, "write_exact", lambda self, block_ids: None)
        load_blocks(self, *load)


load_blocks = Transfers._load


def saved_unseen(self: Transfers, block_hash: bytes, block: int) -> None:
    """Whoever seals the block anew, or loads into it, does not know that its row is being read."""
    save(self, block_hash, block)
    self._memory.bind().reading.clear()


save = Transfers._save


def saved_before_it_is_sealed(self: ShadowManager) -> Any:
    published, self._published = self._published, []
    return [*take_sealed(self), *((block.block_id, block_hash) for block, block_hash in published)]


take_sealed = ShadowManager.take_sealed


def saved_after_it_was_given_away(self: ShadowManager) -> Any:
    given = [(block.block_id, block_hash) for block, block_hash in self._sealed]
    take_sealed(self)
    return given


def hit_with_the_pages_before_what_is_loaded(self: ExactManager, *blocks: Any) -> None:
    PublishingManager.add_local_computed_blocks(self, *blocks)


@pytest.mark.parametrize(
    ("owner", "name", "planted", "seed"),
    [
        (Transfers, "_load", loaded_in_the_old_epoch, 3),
        (Transfers, "_save", saved_unseen, 59),
        (ShadowManager, "take_sealed", saved_before_it_is_sealed, 4),
        (ShadowManager, "take_sealed", saved_after_it_was_given_away, 37),
        (ExactManager, "add_local_computed_blocks", hit_with_the_pages_before_what_is_loaded, 0),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) and not isinstance(value, type) else "",
)
def test_a_planted_error_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, planted: Callable[..., Any], seed: int
) -> None:
    """The seed is one that found it once; any will do."""
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises(AssertionError):
        storms(seed, *range(60))


# -- What a file is of ------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> VllmConfig:
    """Of a model with weights in two files."""
    for name in ("one", "other"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(300_000))
    changed = copy.deepcopy(vllm_config())
    changed.model_config.model = str(tmp_path)
    return changed


def weights(config: VllmConfig) -> None:
    file = Path(config.model_config.model) / "other.safetensors"
    content = bytearray(file.read_bytes())
    content[5000:6000] = b"1" * 1000
    file.write_bytes(content)


def settings(config: VllmConfig) -> None:
    config.additional_config = {"shadowkv": {"rank": 64}}


def hashed_otherwise(config: VllmConfig) -> None:
    config.additional_config = {"shadowkv": {"resident_pages": False}}


def overrides(config: VllmConfig) -> None:
    config.model_config.hf_config.rope_theta = 5.0


def dtype(config: VllmConfig) -> None:
    config.model_config.dtype = torch.float16


def hashes(config: VllmConfig) -> None:
    config.cache_config.prefix_caching_hash_algo = "sha256_cbor"


def seed_of_dummy_weights(config: VllmConfig) -> None:
    config.load_config.load_format = "dummy"


@pytest.mark.parametrize(
    "change", [weights, settings, hashed_otherwise, overrides, dtype, hashes, seed_of_dummy_weights]
)
def test_what_changes_blocks_changes_their_folder(config: VllmConfig, change: Callable[[VllmConfig], None]) -> None:
    before = stored._model(config)
    assert stored._model(config) == before
    change(config)
    assert str(BlockFolder(Path(), stored._model(config))) != str(BlockFolder(Path(), before))


def test_what_does_not_change_blocks(config: VllmConfig, tmp_path: Path) -> None:
    before = stored._model(config)
    config.additional_config = {"shadowkv": {"sparse_budget": 1024, "host_memory_gib": 1.0}}
    config.cache_config.num_gpu_blocks = 7
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    config.model_config.model = str(moved)
    assert stored._model(config) == before
