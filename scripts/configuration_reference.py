"""Writes docs/configuration.md from the settings' classes; tests/test_docs.py checks that it is current."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vllm_shadowkv.config import ShadowKVConfig, StoreConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

<!-- Made by scripts/configuration_reference.py from vllm_shadowkv/config.py. -->

All settings of the backend are keys of `shadowkv` in vLLM's `--additional-config`; an unknown key is an error.

```
vllm serve MODEL --attention-backend shadowkv --additional-config '{"shadowkv": {"sparse_budget": 1024}}'
vllm serve MODEL --attention-backend shadowkv --additional-config.shadowkv.sparse_budget 1024
```

`vllm-shadowkv explain` prints the effective values and where each came from. [Tuning](tuning.md) says which matter.

"""
COMBINATIONS = """
What must fit together:

- `block_size` is a multiple of 64, and `block_size / compression` and `rank` are multiples of 16;
- `sparse_budget` is a multiple of `chunk_size`;
- `slot_chunks` is at least `sparse_budget / chunk_size` and the 5 chunks that are always selected;
- `num_outlier_chunks` is at most the chunks of a block.
"""
CONNECTOR = """
## The KV connector

`ShadowKVConnector` keeps sealed blocks in files, where other engines and the next start find them. Its settings are
keys of `kv_connector_extra_config` in vLLM's `--kv-transfer-config`; an unknown key is an error here, too.

```
vllm serve MODEL --attention-backend shadowkv --kv-transfer-config '{"kv_connector": "ShadowKVConnector",
    "kv_role": "kv_both", "kv_connector_extra_config": {"path": "/var/cache/shadowkv", "max_gib": 500}}'
```

With `kv_role` `kv_both` an engine reads and writes blocks, with `kv_consumer` it only reads them, with `kv_producer` it
only writes them.

"""
TAIL = """
## Environment variables

| environment variable | meaning |
| --- | --- |
| `SHADOWKV_CPU_ISA` | `baseline`, `avx2` or `avx512`: the CPU kernels' instruction set; default: the best there is |
| `SHADOWKV_ANY_VLLM` | `1`: go on with a version of vLLM that is not tested |
| `SHADOWKV_CUDA`, `CUDA_HOME` | of the build: `1` with CUDA kernels, `0` without; where the toolkit is |
"""


def reference() -> str:
    """The page."""
    return HEAD + _table(ShadowKVConfig) + COMBINATIONS + CONNECTOR + _table(StoreConfig) + TAIL


def _table(settings: type[BaseModel]) -> str:
    head = "| key | values | default | meaning |\n| --- | --- | --- | --- |\n"
    return head + "".join(_row(name, field) for name, field in settings.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    default = "" if field.default is None else f"`{str(field.default).lower()}`"  # as JSON has it
    if field.is_required():
        default = "none, must be set"
    return f"| `{name}` | {_values(field)} | {default} | {field.description} |\n"


def _values(field: FieldInfo) -> str:
    kinds = [kind for kind in typing.get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in kinds)
    if kinds == [bool]:
        return "`true`, `false`"
    limits = [_limit(rule) for rule in field.metadata]
    kind = {int: "integer", float: "number", str: "text"}[kinds[0]]
    return " ".join([kind, *filter(None, limits)])


def _limit(rule: Any) -> str:
    if hasattr(rule, "ge"):
        return f"≥ {rule.ge}"
    return f"> {rule.gt}" if hasattr(rule, "gt") else ""


if __name__ == "__main__":
    PAGE.write_text(reference())
