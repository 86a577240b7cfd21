"""Tables in Markdown."""

from __future__ import annotations


def table(lines: list[list[str]]) -> str:
    """The first line is the head."""
    head, *rows = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))
