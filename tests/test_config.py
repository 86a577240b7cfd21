from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_shadowkv.config import LOCAL_CHUNKS, SINK_CHUNKS, ShadowKVConfig, StoreConfig


def read(**settings: Any) -> ShadowKVConfig:
    return ShadowKVConfig.from_vllm({"shadowkv": settings})


def refusal(settings: Any) -> str:
    with pytest.raises(ValueError, match=r"^--additional-config") as caught:
        ShadowKVConfig.from_vllm({"shadowkv": settings})
    assert not isinstance(caught.value, ValidationError), "pydantic's own report is several lines"
    return str(caught.value)


@pytest.mark.parametrize("entry", [None, {}, {"shadowkv": {}}, {"another plugin": {"rank": "many"}}])
def test_defaults_are_used_where_nothing_is_set(entry: dict[str, Any] | None) -> None:
    assert ShadowKVConfig.from_vllm(entry) == ShadowKVConfig()


def test_the_defaults() -> None:
    assert ShadowKVConfig().model_dump() == {
        "block_size": 1024,
        "compression": 8,
        "rank": None,
        "chunk_size": 8,
        "sparse_budget": 2048,
        "num_outlier_chunks": 1,
        "slot_chunks": 384,
        "dense_threshold": 4096,
        "prefill_exact_tokens": None,
        "decode_exact_tokens": 0,
        "resident_pages": True,
        "key_codec": "int8",
        "value_dtype": "int8",
        "host_memory_gib": None,
    }


def test_derived_sizes() -> None:
    config = read(block_size=512, compression=4, chunk_size=16, sparse_budget=1024)
    assert config.exact_tokens_per_page == 128
    assert config.chunks_per_block == 32
    assert config.budget_chunks == 64
    assert config.forced_chunks == SINK_CHUNKS + LOCAL_CHUNKS == 5


# Values that differ from the default, with what else they need.
VALID: list[dict[str, Any]] = [
    {"block_size": 2048},
    {"block_size": 64, "compression": 4},
    {"compression": 1},
    {"compression": 16},
    {"rank": 16},
    {"rank": None},
    {"chunk_size": 16},
    {"sparse_budget": 8},
    {"num_outlier_chunks": 0},
    {"num_outlier_chunks": 128},
    {"slot_chunks": 261},
    {"dense_threshold": 0},
    {"prefill_exact_tokens": 0},
    {"prefill_exact_tokens": 100_000},
    {"decode_exact_tokens": 4096},
    {"resident_pages": False},
    {"key_codec": "none"},
    {"value_dtype": "auto"},
    {"host_memory_gib": 0.5},
    {"host_memory_gib": 64},
]


@pytest.mark.parametrize("settings", VALID, ids=str)
def test_every_key_can_be_set(settings: dict[str, Any]) -> None:
    config = read(**settings)
    assert {key: getattr(config, key) for key in settings} == settings


def test_the_list_above_is_complete() -> None:
    assert set().union(*VALID) == set(ShadowKVConfig.model_fields)


# Settings, and what the one sentence must name: the key, what is allowed, and what was given.
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"sparse_buget": 1024}, ["unknown key 'sparse_buget'", "known: block_size, compression,", "sparse_budget"]),
    ({"block_size": "1024"}, ["'block_size'", "integer", "'1024'"]),
    ({"block_size": 1024.0}, ["'block_size'", "integer", "1024.0"]),
    ({"block_size": True}, ["'block_size'", "integer", "True"]),
    ({"block_size": 0}, ["block_size", "positive multiple of 64", "got 0"]),
    ({"block_size": -64}, ["block_size", "positive multiple of 64", "got -64"]),
    ({"block_size": 1000}, ["block_size", "multiple of 64", "got 1000"]),
    ({"block_size": 64}, ["block_size / compression", "multiple of 16", "got 64 / 8"]),
    ({"compression": 3}, ["'compression'", "1, 2, 4, 8 or 16", "got 3"]),
    ({"compression": None}, ["'compression'", "got None"]),
    ({"rank": 8}, ["'rank'", "16", "got 8"]),
    ({"rank": 100}, ["rank", "multiple of 16", "got 100"]),
    ({"chunk_size": 4}, ["'chunk_size'", "8 or 16", "got 4"]),
    ({"sparse_budget": 0}, ["'sparse_budget'", "got 0"]),
    ({"sparse_budget": 1001}, ["sparse_budget", "multiple of chunk_size 8", "got 1001"]),
    ({"num_outlier_chunks": -1}, ["'num_outlier_chunks'", "got -1"]),
    ({"num_outlier_chunks": 129}, ["num_outlier_chunks", "at most the 128 chunks of a block", "got 129"]),
    ({"slot_chunks": 0}, ["'slot_chunks'", "got 0"]),
    ({"slot_chunks": 260}, ["slot_chunks", "at least 261", "sparse_budget of 2048", "got 260"]),
    ({"sparse_budget": 4096}, ["slot_chunks", "at least 517", "sparse_budget of 4096", "got 384"]),
    ({"dense_threshold": -1}, ["'dense_threshold'", "got -1"]),
    ({"prefill_exact_tokens": -1}, ["'prefill_exact_tokens'", "got -1"]),
    ({"prefill_exact_tokens": "all"}, ["'prefill_exact_tokens'", "'all'"]),
    ({"decode_exact_tokens": None}, ["'decode_exact_tokens'", "None"]),
    ({"resident_pages": 1}, ["'resident_pages'", "boolean", "got 1"]),
    ({"key_codec": "fp8"}, ["'key_codec'", "'int8' or 'none'", "'fp8'"]),
    ({"value_dtype": "none"}, ["'value_dtype'", "'auto' or 'int8'", "'none'"]),
    ({"host_memory_gib": 0}, ["'host_memory_gib'", "greater than 0", "got 0"]),
    ({"host_memory_gib": "64"}, ["'host_memory_gib'", "number", "'64'"]),
    ({"host_memory_gib": math.inf}, ["'host_memory_gib'", "finite", "inf"]),
    ({"host_memory_gib": math.nan}, ["'host_memory_gib'", "nan"]),
    ({"rank": 8, "chunk_size": 4}, ["'rank'", "'chunk_size'"]),
]


@pytest.mark.parametrize(("settings", "named"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_what_is_wrong_is_said_in_one_sentence(settings: dict[str, Any], named: list[str]) -> None:
    sentence = refusal(settings)
    assert sentence.startswith("--additional-config shadowkv: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "value error" not in sentence.lower()
    missing = [part for part in named if part not in sentence]
    assert not missing, f"{sentence!r} does not say {missing}"


@pytest.mark.parametrize("entry", [2048, "rank=160", ["rank", 160], True, None])
def test_an_entry_that_is_no_object_is_refused(entry: Any) -> None:
    sentence = refusal(entry)
    assert f"'shadowkv' must be an object like {{\"sparse_budget\": 2048}}, got {type(entry).__name__}." in sentence


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ShadowKVConfig().rank = 16  # type: ignore[misc]


@settings(deadline=None)
@given(
    block_size=st.integers(1, 64).map(lambda n: n * 64),
    compression=st.sampled_from([1, 2, 4, 8, 16]),
    chunk_size=st.sampled_from([8, 16]),
    budget=st.integers(1, 400),
    slots=st.integers(1, 800),
    outliers=st.integers(0, 80),
)
def test_a_combination_is_accepted_exactly_if_it_is_possible(
    block_size: int, compression: int, chunk_size: int, budget: int, slots: int, outliers: int
) -> None:
    settings = {
        "block_size": block_size,
        "compression": compression,
        "chunk_size": chunk_size,
        "sparse_budget": budget * chunk_size,
        "slot_chunks": slots,
        "num_outlier_chunks": outliers,
    }
    wrong = {
        "block_size / compression": block_size % (16 * compression) != 0,
        "num_outlier_chunks": outliers > block_size // chunk_size,
        "slot_chunks": slots < budget + 5,
    }
    if any(wrong.values()):
        assert any(refused and key in refusal(settings) for key, refused in wrong.items())
    else:
        assert read(**settings).chunks_per_block * chunk_size == block_size


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
# Often a valid value, or one that is valid with others; else anything that JSON can hold.
NEAR = st.sampled_from([0, 1, 8, 16, 64, 256, 384, 1024, 2048, "int8", "none", "auto"]) | ANYTHING
KEYS = st.sampled_from([*ShadowKVConfig.model_fields, "Block_Size", "", "a\nb"])


@settings(deadline=None, max_examples=100)
@given(entry=st.dictionaries(KEYS, NEAR, max_size=6) | ANYTHING)
def test_whatever_is_set_is_valid_or_refused_in_one_sentence(entry: Any) -> None:
    try:
        config = ShadowKVConfig.from_vllm({"shadowkv": entry})
    except ValueError:
        sentence = refusal(entry)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        named = entry if isinstance(entry, dict) else [type(entry).__name__]
        assert any(key in sentence or repr(key) in sentence for key in named), f"{sentence!r} names no key"
    else:
        assert config.model_dump() == ShadowKVConfig().model_dump() | entry


# The forms in which vLLM's command line takes --additional-config.
COMMAND_LINES = [
    (["--additional-config", '{"shadowkv": {"rank": 160, "key_codec": "none"}}'], {"rank": 160, "key_codec": "none"}),
    (["--additional-config.shadowkv.rank", "160"], {"rank": 160}),
    (["--additional-config.shadowkv.rank=160"], {"rank": 160}),
    (["--additional_config.shadowkv.host_memory_gib", "1.5"], {"host_memory_gib": 1.5}),
    (
        ["--additional-config.shadowkv.value_dtype", "int8", "--additional-config.shadowkv.dense_threshold", "0"],
        {"value_dtype": "int8", "dense_threshold": 0},
    ),
]


@pytest.mark.parametrize(("line", "settings"), COMMAND_LINES, ids=[" ".join(line) for line, _ in COMMAND_LINES])
def test_command_line_forms(line: list[str], settings: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = EngineArgs.from_cli_args(parser.parse_args(line))
    assert ShadowKVConfig.from_vllm(arguments.additional_config) == ShadowKVConfig(**settings)


# -- The KV connector's ----------------------------------------------------------------------------------------------


def store_refusal(settings: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"^--kv-transfer-config") as caught:
        StoreConfig.from_vllm(settings)
    assert not isinstance(caught.value, ValidationError), "pydantic's own report is several lines"
    return str(caught.value)


VALID_STORES: list[dict[str, Any]] = [
    {"path": "/blocks"},
    {"path": "~/blocks", "max_gib": None},
    {"path": " ", "max_gib": 0.5},
    {"path": "blocks", "max_gib": 64},
]


@pytest.mark.parametrize("settings", VALID_STORES, ids=str)
def test_every_key_of_the_connector_can_be_set(settings: dict[str, Any]) -> None:
    assert StoreConfig.from_vllm(settings).model_dump() == {"max_gib": None} | settings
    assert set().union(*VALID_STORES) == set(StoreConfig.model_fields)


REFUSED_STORES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["'path' is missing"]),
    ({"max_gib": 1}, ["'path' is missing"]),
    ({"path": "/blocks", "max_gb": 1}, ["unknown key 'max_gb'", "known: path, max_gib"]),
    ({"path": ""}, ["'path'", "at least 1 character", "got ''"]),
    ({"path": None}, ["'path'", "string", "got None"]),
    ({"path": 7}, ["'path'", "string", "got 7"]),
    ({"path": ["/blocks"]}, ["'path'", "string", "['/blocks']"]),
    ({"path": "/blocks", "max_gib": 0}, ["'max_gib'", "greater than 0", "got 0"]),
    ({"path": "/blocks", "max_gib": -1.5}, ["'max_gib'", "greater than 0", "got -1.5"]),
    ({"path": "/blocks", "max_gib": "64"}, ["'max_gib'", "number", "'64'"]),
    ({"path": "/blocks", "max_gib": True}, ["'max_gib'", "number", "True"]),
    ({"path": "/blocks", "max_gib": math.inf}, ["'max_gib'", "finite", "inf"]),
    ({"path": "/blocks", "max_gib": math.nan}, ["'max_gib'", "nan"]),
    ({"paths": "/blocks", "max_gib": 0}, ["'path' is missing", "unknown key 'paths'", "'max_gib'"]),
]


@pytest.mark.parametrize(("settings", "named"), REFUSED_STORES, ids=[str(settings) for settings, _ in REFUSED_STORES])
def test_what_is_wrong_with_the_connector_is_said_in_one_sentence(settings: dict[str, Any], named: list[str]) -> None:
    sentence = store_refusal(settings)
    assert sentence.startswith("--kv-transfer-config kv_connector_extra_config of ShadowKVConnector: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    missing = [part for part in named if part not in sentence]
    assert not missing, f"{sentence!r} does not say {missing}"


NEAR_A_STORE = st.dictionaries(
    st.sampled_from([*StoreConfig.model_fields, "Path", "", "a\nb"]), st.sampled_from(["/blocks", 1, 0.5]) | ANYTHING
)


@settings(deadline=None, max_examples=100)
@given(entry=NEAR_A_STORE)
def test_whatever_is_set_of_the_connector_is_valid_or_refused_in_one_sentence(entry: dict[str, Any]) -> None:
    try:
        config = StoreConfig.from_vllm(entry)
    except ValueError:
        sentence = store_refusal(entry)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        named = [*entry, "'path' is missing"]
        assert any(key in sentence or repr(key) in sentence for key in named), f"{sentence!r} names no key"
    else:
        assert config.model_dump() == {"max_gib": None} | entry


CONNECTOR_LINES = [
    [
        "--kv-transfer-config",
        '{"kv_connector": "ShadowKVConnector", "kv_role": "kv_both", '
        '"kv_connector_extra_config": {"path": "/blocks", "max_gib": 500}}',
    ],
    [
        *("--kv-transfer-config.kv_connector", "ShadowKVConnector"),
        *("--kv-transfer-config.kv_role", "kv_both"),
        *("--kv-transfer-config.kv_connector_extra_config.path", "/blocks"),
        *("--kv-transfer-config.kv_connector_extra_config.max_gib", "500"),
    ],
]


@pytest.mark.parametrize("line", CONNECTOR_LINES, ids=["JSON", "dotted"])
def test_command_line_forms_of_the_connector(line: list[str]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    transfer = EngineArgs.from_cli_args(parser.parse_args(line)).kv_transfer_config
    assert transfer is not None
    assert (transfer.is_kv_consumer, transfer.is_kv_producer) == (True, True)
    assert StoreConfig.from_vllm(transfer.kv_connector_extra_config) == StoreConfig(path="/blocks", max_gib=500)
