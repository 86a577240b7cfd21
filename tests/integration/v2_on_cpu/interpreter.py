"""Makes Triton interpret its kernels, and closes two gaps of Triton's interpreter. Import it before vLLM.

The patches reach into Triton 3.9; where a later Triton does without them, drop them.
"""

from __future__ import annotations

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


def _yield_tensors_from_ranges() -> None:
    """Kernels call methods of a loop variable of `tl.range`; the interpreter yields Python integers."""
    patch_language = interpreter._patch_lang

    def patched(function: Any) -> Any:
        scope = patch_language(function)
        if function.__globals__.get("tl") is tl:
            plain = tl.range
            scope.set_attr(
                tl, "range", lambda *args, **kwargs: (interpreter._implicit_cvt(int(i)) for i in plain(*args, **kwargs))
            )
        return scope

    interpreter._patch_lang = patched


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=_Compiler, driver=_Driver)
_accept_integer_masks(interpreter.InterpreterBuilder)
_yield_tensors_from_ranges()
