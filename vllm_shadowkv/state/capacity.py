"""What a pool of pages holds. The engine bounds its pool by these formulas, `vllm_shadowkv plan` shows them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import PageLayout
from vllm_shadowkv.state import host_pool
from vllm_shadowkv.state.boundary import ExactBoundary
from vllm_shadowkv.state.host_memory import GIB
from vllm_shadowkv.state.host_pool import Backing
from vllm_shadowkv.state.layers_beside import LayersBeside, check_state


@dataclass(frozen=True)
class Capacity:
    """A rank's layers and the rule by which requests hold pages of them.

    A block is one page in each of the layers, in whichever group; pages below are counted in blocks.

    Attributes:
        layout: of the pages.
        num_layers: attention layers of this rank.
        boundary: the rule of exact pages, with what is beside them (`ExactBoundary.beside`).
        slot_pages: of a request that attends to sealed blocks.
        others: layers of other backends, with heads as ours, as far as they are known without vLLM.
    """

    layout: PageLayout
    num_layers: int
    boundary: ExactBoundary
    slot_pages: int
    others: tuple[LayersBeside, ...] = ()

    @classmethod
    def of(
        cls,
        config: ShadowKVConfig,
        layout: PageLayout,
        num_layers: int,
        boundary: ExactBoundary,
        others: tuple[LayersBeside, ...] = (),
    ) -> Capacity:
        """Capacity by the settings; `boundary` as `ExactBoundary.of` makes it.

        Raises:
            ValueError: a state of the other layers is larger than a page.
        """
        slot_pages = layout.slot_pages(config.slot_chunks)
        for other in others:
            if other.kind == "state":
                check_state(layout, other.size)
        in_flight = boundary.steps_in_flight * boundary.max_step_tokens
        foreign = sum(
            other.longest(num_layers, layout.exact_tokens, boundary.max_model_len, in_flight) for other in others
        )
        return cls(layout, num_layers, boundary.beside(slot_pages, foreign), slot_pages, others)

    @property
    def block_bytes(self) -> int:
        """Device bytes of a block, all layers."""
        return self.num_layers * self.layout.page_bytes

    @property
    def host_bytes(self) -> int:
        """Host bytes of a block's values, all layers."""
        return self.num_layers * self.layout.value_row_bytes

    @property
    def min_blocks(self) -> int:
        """Blocks without which the longest request cannot be served, the null block included."""
        return self.boundary.min_blocks

    def backing(
        self, host_memory_gib: float | None, pages_on_host: bool, ranks: int, free: int, fit: bool = False
    ) -> Backing:
        """How many blocks the host can back; arguments as of `host_pool.max_blocks`, and one more.

        Args:
            fit: vLLM will fit the longest request to the pool (--max-model-len auto).

        Raises:
            ValueError: the host cannot back the longest request, or any; the sentence names the flags.
        """
        backing = host_pool.max_blocks(
            host_memory_gib, self.host_bytes, self.block_bytes, pages_on_host=pages_on_host, ranks=ranks, free=free
        )
        least = self.boundary.of_length(1) if fit else self.boundary
        if backing.blocks < least.min_blocks:
            gib = ranks * least.min_blocks * self.host_bytes / GIB
            raise ValueError(
                f"shadowkv: host memory backs {backing.blocks} KV cache blocks ({backing.reason}), one request of "
                f"{least.max_model_len} token(s) needs {least.min_blocks} ({gib:.3g} GiB); {backing.way_out}"
                f"{'' if fit else ', or lower --max-model-len'}."
            )
        return backing

    def resolve(self, num_blocks: int) -> Capacity:
        """Capacity of a pool of this size, with the prefill window that it gives (`ExactBoundary.resolve`)."""
        return replace(self, boundary=self.boundary.resolve(num_blocks))

    def admission_pages(self, tokens: int) -> int:
        """Pages that must be free for a prompt of so many tokens to be admitted. Resolved boundaries only."""
        exact = min(-(-tokens // self.layout.exact_tokens), self.boundary.max_exact_pages)
        in_flight = self.boundary.steps_in_flight * self.boundary.max_step_tokens
        return -(-tokens // self.layout.block_size) + exact + self._slots(tokens) + self.other_pages(tokens, in_flight)

    def decoding_pages(self, tokens: int) -> int:
        """Pages of a request that decodes its token number `tokens`, one token a step, without a prefix hit."""
        computed = tokens - 1
        # Freeing lags by a step, and by the steps whose output is not known yet.
        settled = max(computed - self.boundary.steps_in_flight, 0)
        start = self.boundary.exact_start(settled, prefilling=False)
        exact = -(-tokens // self.layout.exact_tokens) - start // self.layout.exact_tokens
        other = self.other_pages(tokens, self.boundary.steps_in_flight + 1)
        return -(-tokens // self.layout.block_size) + exact + self._slots(tokens) + other

    def other_pages(self, tokens: int, in_flight: int) -> int:
        """Pages that layers of other backends hold of a request, at most; arguments as of `LayersBeside.held`."""
        return sum(other.held(self.num_layers, self.layout.exact_tokens, tokens, in_flight) for other in self.others)

    def peak_decoding_pages(self, tokens: int) -> int:
        """Most pages while the last block's worth of a context of `tokens` tokens is decoded."""
        first = max(tokens - self.layout.block_size, 0) + 1
        return max(map(self.decoding_pages, range(first, tokens + 1)))

    def requests(self, num_blocks: int, tokens: int) -> int:
        """Requests of `tokens` tokens of context that decode side by side, the last one admitted beside the others.

        Args:
            num_blocks: of the pool, the null block included.
            tokens: prompt and generated tokens; at most `max_model_len`.
        """
        room = num_blocks - 1
        peak = self.peak_decoding_pages(tokens)
        beside = (room - self.admission_pages(tokens)) // peak
        return max(min(beside + 1, room // peak), 0)

    def _slots(self, tokens: int) -> int:
        return self.slot_pages if self.boundary.reads_sealed(tokens, hit=0) else 0
