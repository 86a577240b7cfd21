"""Calls and objects in processes of their own: engines leave traces."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def alone(call: Callable[..., Any], *arguments: Any) -> Any:
    """The call's result, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


class Alone:
    """An object in a process of its own, which ends with the context; several can be alive at once."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        """Begins to make it.

        Args:
            make: what returns the object, in its process. The object's `close` is called at the end.
            arguments: of `make`.
        """
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._made = self._pool.submit(_keep, make, arguments)

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        with self._pool:
            if not self._made.exception():
                self.call("close")

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the object returns, once it is made."""
        self._made.result()
        return self._pool.submit(_call, method, arguments).result()


_kept: list[Any] = []


def _keep(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _kept.append(make(*arguments))


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_kept[0], method)(*arguments)
