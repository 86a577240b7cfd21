"""What a case of a refusal is, and how one is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from doors import Door, Fields, Platform

LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
"""What is served."""

Change = dict[str, Any]


def options(**changes: Any) -> Change:
    return {"options": changes}


def drafts(method: str, **more: Any) -> Change:
    return {"speculative_config": {"method": method, "num_speculative_tokens": 2} | more}


def ours(**settings: Any) -> Change:
    return {"additional_config": {"shadowkv": settings}}


def connector(role: str = "kv_both", **settings: Any) -> Change:
    """Ours; with a path in the model's folder, unless settings say something else."""
    settings = {"path": "{folder}/blocks"} | settings
    given = {name: setting for name, setting in settings.items() if setting is not None}
    return {
        "kv_transfer_config": {
            "kv_connector": "ShadowKVConnector",
            "kv_role": role,
            "kv_connector_extra_config": given,
        }
    }


NO_CONNECTOR = {"kv_transfer_config": None}


def changed(door: Door, change: Change) -> Door:
    """The door with other fields; dictionaries are joined."""
    joined = {
        name: {**(getattr(door, name) or {}), **value} if isinstance(value, dict) else value
        for name, value in change.items()
    }
    return dataclasses.replace(door, **joined)


OTHER = options(attention_backend=None)
"""What "use another --attention-backend" asks for."""
OTHER_BACKEND = "use another --attention-backend"
DRAFT = drafts("draft_model", attention_backend="CPU_ATTN")
ONE_KIND: Change = {"attention_backend": None, "attention_config": {"backend_per_kind": {"full_attention": "SHADOWKV"}}}


@dataclass(frozen=True)
class Case:
    """A refusal.

    Attributes:
        name: of the case.
        door: that is refused.
        says: type and sentence, whole; "…" stands for anything.
        ways_out: changes of the door, each of which opens it.
        platforms: where.
        quick: `make test` tries it, too.
    """

    name: str
    door: Door
    says: str
    ways_out: tuple[Change, ...]
    platforms: tuple[Platform, ...]
    quick: bool


def case(
    name: str,
    says: str,
    *ways_out: Change,
    on: Platform | None = None,
    quick: bool = False,
    model: Fields = LLAMA,
    **fields: Any,
) -> Case:
    return Case(name, Door(model, **fields), says, ways_out or (OTHER,), (on,) if on else ("cpu", "cuda"), quick)


def value(name: str, says: str, *ways_out: Change, **fields: Any) -> Case:
    return case(name, f"ValueError: shadowkv {says}.", *ways_out, **fields)
