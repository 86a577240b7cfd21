"""Which versions of vLLM the tests run on; docs/vllm_compat.md says which tests, and how."""

from __future__ import annotations

SUPPORTED = ("0.32", "0.33")
"""Minor versions of vLLM."""

ANY_VERSION = "SHADOWKV_ANY_VLLM"
"""Environment variable; 1 goes on with a version that is not among them."""


def is_supported(version: str) -> bool:
    """Whether a version of vLLM, as `vllm.__version__` has it, is one that the tests run on."""
    return any(version == minor or version.startswith(f"{minor}.") for minor in SUPPORTED)
