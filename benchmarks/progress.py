"""How far long work has come: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn

LINE_SECONDS = 10.0
"""Between two lines in a log that is no terminal."""

T = TypeVar("T")


class Progress(rich.progress.Progress):
    """Rich's progress, which writes lines where there is no terminal to draw in."""

    def __init__(self, console: Console) -> None:
        """Draws, or writes, to `console`."""
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
        columns += [MofNCompleteColumn(), TimeElapsedColumn()]
        super().__init__(*columns, console=console, auto_refresh=console.is_terminal, get_time=time.monotonic)
        self._next_line = time.monotonic() + LINE_SECONDS

    def advance(self, task_id: rich.progress.TaskID, advance: float = 1) -> None:
        """One more is done."""
        super().advance(task_id, advance)
        if self.console.is_terminal or time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + LINE_SECONDS
        task = self._tasks[task_id]
        of = "" if task.total is None else f" of {task.total:.0f}"
        self.console.print(f"{task.description}: {task.completed:.0f}{of} after {task.elapsed:.0f} s", highlight=False)


def track(items: Sequence[T], description: str, console: Console) -> Iterator[T]:
    """The items, and how many of them are done."""
    with Progress(console) as progress:
        yield from progress.track(items, description=description)
