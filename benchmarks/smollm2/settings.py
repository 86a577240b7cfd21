"""The settings that are tried, by name."""

from __future__ import annotations

from typing import Any

SHARES = {"3.5 %": 0.035, "7 %": 0.07, "14 %": 0.14}
NAMES = (*SHARES, "default", "twice", "all", "exact")
"""Budgets as shares of the prompt; default settings; twice their budget; and two controls: every chunk is selected, so
that only what sealing does to keys is left, and nothing sealed is read."""


def shadowkv(name: str, tokens: int) -> dict[str, Any] | None:
    """What `additional_config` says of shadowkv for prompts of `tokens` tokens; None: the stock backend.

    Sealed blocks are read as such: exact pages that happen to be there are not used, but by `exact`, which would read
    what it hits in the prefix cache sealed otherwise, as default settings do.
    """
    if name == "stock":
        return None
    if name not in NAMES:
        raise ValueError(f"settings: expected stock, {', '.join(NAMES)}, got {name}")
    settings: dict[str, Any] = {"resident_pages": False}
    if name in SHARES:
        settings["sparse_budget"] = 8 * round(SHARES[name] * tokens / 8)
    if name in ("twice", "all"):
        budget = 4096 if name == "twice" else 8 * -(-tokens // 8)
        settings |= {"sparse_budget": budget, "slot_chunks": budget // 8 + 128}
    if name == "exact":
        settings |= {"dense_threshold": 2 * tokens, "resident_pages": True}
    return settings
