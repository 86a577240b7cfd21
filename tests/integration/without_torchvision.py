"""Lets models that take images be built for text where there is no torchvision: their files import it, nobody calls it.

The torchvision that vLLM for the CPU brings is a build for CUDA, which does not import beside a CPU torch, so the
installation leaves it out (`scripts/install.py`).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PARTS = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional", ".io", ".ops")


class _Named(ModuleType):
    """Has a class of any name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__getattr__": lambda self, _: self, "__module__": self.__name__})()


def install() -> None:
    """Puts a torchvision without contents where there is none; Transformers has looked by then, and uses none."""
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    for part in PARTS:
        name = f"torchvision{part}"
        module = sys.modules[name] = _Named(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        if part:
            parent, _, last = name.rpartition(".")
            setattr(sys.modules[parent], last, module)
