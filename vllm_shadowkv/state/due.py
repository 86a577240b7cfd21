"""Blocks that are complete and not sealed yet, each with the exact pages that it will be sealed from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor


class DueBlocks:
    """Such blocks, in the order in which they were completed, until they are sealed or given to somebody else.

    Nobody need own them any more, nor their pages: what is given away holds what it did until it is written to.
    """

    def __init__(self) -> None:
        """None yet."""
        self._sources: dict[int, tuple[Tensor, int]] = {}
        self._blocks_of: defaultdict[int, set[int]] = defaultdict(set)

    def __contains__(self, block: int) -> bool:
        """Whether a block is due."""
        return block in self._sources

    def __len__(self) -> int:
        """How many are."""
        return len(self._sources)

    def __getitem__(self, block: int) -> Tensor:
        """A due block's exact pages: int32 `[block_size / exact_tokens]`, in token order, on the host."""
        return self._sources[block][0]

    def add(self, block: int, exact_ids: Tensor, first_position: int) -> None:
        """A block that is complete, or will be by the end of the step.

        Args:
            block: its id.
            exact_ids: int32 `[block_size / exact_tokens]`, its exact pages in token order, on the host; copied, for on
                a CPU a table is vLLM's own, which is another step's by then.
            first_position: of its tokens.
        """
        self._sources[block] = exact_ids.clone(), first_position
        for page in exact_ids.tolist():
            self._blocks_of[page].add(block)

    def of_pages(self, pages: Iterable[int]) -> set[int]:
        """The blocks that will be sealed from one of these pages."""
        return {block for page in pages for block in self._blocks_of.get(page, ())}

    def drop(self, blocks: Iterable[int]) -> None:
        """Blocks that were given to somebody else; any others, too."""
        self.take(blocks)

    def take(self, blocks: Iterable[int] | None = None) -> dict[int, tuple[Tensor, int]]:
        """Those of these blocks that are due, which they no longer are; None: all.

        Returns:
            Each with its exact pages and its first position, in the order in which they were completed.
        """
        chosen = self._sources.keys() if blocks is None else self._sources.keys() & set(blocks)
        taken = {block: source for block, source in self._sources.items() if block in chosen} if chosen else {}
        for block, (exact_ids, _) in taken.items():
            del self._sources[block]
            for page in exact_ids.tolist():
                self._blocks_of[page].discard(block)
                if not self._blocks_of[page]:
                    del self._blocks_of[page]
        return taken
