"""Blocks that drafts may have completed and that are not sealed yet: a later step has to look for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class CompletedBlocks:
    """Such blocks, each with the length of its row after the step, until it is sealed or begun anew.

    A row goes on where its last step ended. So where a row's next step begins shows whether it may have one of them;
    those of a row that ended with that step are nobody's.
    """

    def __init__(self) -> None:
        """None yet."""
        self._length_of: dict[int, int] = {}
        self._lengths: Counter[int] = Counter()

    def add(self, blocks: Iterable[int], length: int) -> None:
        """Blocks that a row has when it is of this length."""
        for block in blocks:
            self._length_of[block] = length
            self._lengths[length] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Blocks that were sealed, or that another row begins; any others, too."""
        for block in blocks:
            length = self._length_of.pop(block, None)
            if length is not None:
                self._lengths[length] -= 1
                if not self._lengths[length]:
                    del self._lengths[length]

    def may_have(self, computed: int, max_drafts: int) -> bool:
        """Whether a row of which so many tokens are computed may have some.

        Args:
            computed: tokens before its next step.
            max_drafts: most of its last step's tokens that may have been rejected since.
        """
        return any(computed + rejected in self._lengths for rejected in range(max_drafts + 1))
