"""Makes Triton interpret its kernels, closes two gaps of its interpreter and speeds it up. Import it before vLLM.

The patches reach into Triton 3.9; where a later Triton does without them, drop them.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import numpy as np
import triton.backends
import triton.language as tl
from triton.runtime import interpreter


class _Driver:
    """vLLM looks whether Triton has an active backend for this machine."""

    @classmethod
    def is_active(cls) -> bool:
        return True


class _Compiler:
    """Never asked: kernels are interpreted."""


def _as_bool(mask: Any) -> Any:
    """Sampling kernels combine masks with integers, which the interpreter refuses."""
    if mask is None or mask.data.dtype == np.bool_:
        return mask
    return interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)


def _accept_integer_masks(builder: Any) -> None:
    load, store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load = lambda self, pointers, mask, *args, **kwargs: load(
        self, pointers, _as_bool(mask), *args, **kwargs
    )
    builder.create_masked_store = lambda self, pointers, value, mask, *args, **kwargs: store(
        self, pointers, value, _as_bool(mask), *args, **kwargs
    )


def _patch_language_once() -> None:
    """Patches `triton.language` for good, and makes `tl.range` yield tensors.

    The interpreter patches it anew for every call of every kernel, which takes most of its time, and lets `tl.range`
    yield Python integers, whose methods kernels call.
    """
    patch_language = interpreter._patch_lang
    patched = set()

    def patch_once(function: Any) -> Any:
        visible = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if visible not in patched:
            patched.add(visible)
            patch_language(function)
            if id(tl) in visible:
                tl.range = _tensor_range(tl.range)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch_once


def _tensor_range(plain: Any) -> Any:
    return lambda *args, **kwargs: (interpreter._implicit_cvt(int(i)) for i in plain(*args, **kwargs))


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=_Compiler, driver=_Driver)
_accept_integer_masks(interpreter.InterpreterBuilder)
_patch_language_once()
# Checks of integer arithmetic for overflow, at a quarter of the time.
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
