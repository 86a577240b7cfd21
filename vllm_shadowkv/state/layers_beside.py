"""Layers of other backends that share our pool of pages: with windows, in chunks, with a state of fixed size.

vLLM makes all pages of a pool equal, by giving such a layer as many tokens per page as fit ours, or padding its state
to one, and puts layers in groups of as many as ours are, each with a block table of its own
(`vllm/v1/core/kv_cache_utils.py`). What they hold of a request ends with their reach, so at long context ours alone
grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_shadowkv.page import PageLayout

Kind = Literal["window", "chunk", "state"]


@dataclass(frozen=True)
class LayersBeside:
    """Equal layers of another backend, a rank's.

    Attributes:
        kind: what bounds what they hold.
        count: of the layers.
        size: tokens of the window or of a chunk; bytes of a state.
    """

    kind: Kind
    count: int
    size: int

    def longest(self, num_layers: int, page_tokens: int, max_model_len: int, in_flight: int) -> int:
        """Pages that the longest request needs at most, as vLLM's specs have it (`max_memory_usage_bytes`).

        Args:
            num_layers: our layers, as many as a group has.
            page_tokens: tokens of a page of these layers.
            max_model_len: of the longest request.
            in_flight: most tokens of all steps whose output is not known yet.
        """
        return self._groups(num_layers) * self._most(page_tokens, max_model_len, in_flight)

    def held(self, num_layers: int, page_tokens: int, tokens: int, in_flight: int) -> int:
        """Pages of a request of so many tokens, at most; arguments as of `longest`."""
        most = self._most(page_tokens, tokens, in_flight)
        return self._groups(num_layers) * (most if self.kind == "state" else min(-(-tokens // page_tokens), most))

    def _groups(self, num_layers: int) -> int:
        return groups(self.count, num_layers)

    def _most(self, page_tokens: int, tokens: int, in_flight: int) -> int:
        if self.kind == "state":
            return 1
        window = self.kind == "window"
        reach = self.size - 1 if window else self.size
        return -(-min(reach + in_flight, tokens) // page_tokens) + window  # a window may begin within a page


def groups(count: int, num_layers: int) -> int:
    """Groups that vLLM makes of `count` equal layers beside `num_layers` of ours."""
    return -(-count // num_layers)


def check_state(layout: PageLayout, state_bytes: int) -> None:
    """Refuses a state that is larger than a page of ours, to which vLLM would pad it.

    Raises:
        ValueError: the sentence names the block size that fits.
    """
    if state_bytes > layout.page_bytes:
        tokens = layout.block_size * -(-state_bytes // layout.page_bytes)
        raise ValueError(
            f"shadowkv's pages of {layout.page_bytes} bytes hold no state of the model's other layers ({state_bytes} "
            f"bytes); set shadowkv.block_size to {tokens}, or lower shadowkv.compression, or use another "
            "--attention-backend for this model."
        )
