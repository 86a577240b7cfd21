"""The settings that are tried, by name."""

from __future__ import annotations

from typing import Any

SHARES = {"3.5 %": 0.035, "7 %": 0.07, "14 %": 0.14}
NAMES = (*SHARES, "default", "exact")
"""Budgets as shares of the prompt; default settings; and a control that reads nothing sealed."""


def shadowkv(name: str, tokens: int) -> dict[str, Any] | None:
    """What `additional_config` says of shadowkv for prompts of `tokens` tokens; None: the stock backend.

    Sealed blocks are read as such: exact pages that happen to be there are not used.
    """
    if name == "stock":
        return None
    if name not in NAMES:
        raise ValueError(f"settings: expected stock, {', '.join(NAMES)}, got {name}")
    settings: dict[str, Any] = {"resident_pages": False}
    if name in SHARES:
        settings["sparse_budget"] = 8 * round(SHARES[name] * tokens / 8)
    if name == "exact":
        settings["dense_threshold"] = 2 * tokens
    return settings
