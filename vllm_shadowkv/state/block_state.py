"""What the worker must remember of every block: whether it is sealed, and when its bytes last changed."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockState:
    """Per-block facts, keyed by physical block id like everything else.

    A block id is handed out again and again. `sealed` says whether the shadow page and the host pool row hold the
    tokens of the block's present owner; `epochs` changes whenever a page of the block is written, so that a slot filled
    from, or lying in, an earlier life of the block is known to be stale.

    Attributes:
        sealed: bool `[num_blocks]`. It speaks of what requests have as blocks: a block that is reused as an exact or a
            slot page keeps it until it becomes an open block again.
        epochs: int64 `[num_blocks]`, positive; no two seals share one.
        sources: int32 `[num_blocks, pages]`, the exact pages that a block was sealed from, in token order; 0: not kept.
            One whose epoch is lower than its block's was not written to since: it is resident.
        clock: int64 `[1]`, grows with every step.
    """

    def __init__(self, num_blocks: int, pages_per_block: int, device: torch.device) -> None:
        self.sealed = torch.zeros(num_blocks, dtype=torch.bool, device=device)
        self.epochs = torch.ones(num_blocks, dtype=torch.int64, device=device)
        self.clock = torch.ones(1, dtype=torch.int64, device=device)
        self.sources = torch.zeros(num_blocks, pages_per_block, dtype=torch.int32, device=device)
        self._has_slots = torch.zeros(num_blocks, dtype=torch.bool, device=device)

    def start_step(self) -> None:
        """Moves the clock."""
        self.clock += 1

    def write_open(self, block_ids: Tensor) -> None:
        """Blocks that get new tokens in this step: whatever was sealed there belongs to an earlier owner."""
        self.sealed[block_ids] = False

    def write_exact(self, block_ids: Tensor) -> None:
        """Pages that are written as exact pages in this step."""
        self.epochs[block_ids] = self.clock
        self._has_slots[block_ids] = False

    def write_slots(self, block_ids: Tensor) -> None:
        """Slot pages of this step's rows: the first step that has one overwrites what it was."""
        kept = self._has_slots[block_ids]
        self.epochs[block_ids] = torch.where(kept, self.epochs[block_ids], self.clock)
        self._has_slots[block_ids] = True

    def resident(self, block_ids: Tensor) -> Tensor:
        """The exact pages of sealed blocks, as far as they are resident.

        Args:
            block_ids: int64 `[n]`, on the device.

        Returns:
            int32 `[n, pages]` in token order; 0 where one is not.
        """
        sources = self.sources[block_ids]
        intact = (sources > 0) & (self.epochs[sources.long()] < self.epochs[block_ids, None])
        return sources.where(intact, 0)

    def seal(self, block_ids: Tensor, sources: Tensor | None) -> None:
        """Blocks that were sealed in this step; each gets an epoch of its own.

        Args:
            block_ids: int64 `[n]`, without repetition.
            sources: int32 `[n, pages]`, the exact pages they were sealed from; None: not to be kept.
        """
        self.sealed[block_ids] = True
        self._has_slots[block_ids] = False
        if sources is None:
            self.sources[block_ids] = 0
        else:
            self.sources[block_ids] = sources
            # Whatever takes one for slots must raise its epoch.
            self._has_slots[sources.long()] = False
        count = len(block_ids)
        self.epochs[block_ids] = self.clock + 1 + torch.arange(count, device=self.epochs.device)
        self.clock += count + 1

    def check_integrity(self, blocks: Tensor | None = None) -> None:
        """Raises AssertionError where an invariant is broken. For tests.

        Args:
            blocks: int64 `[n]`, without repetition, the blocks that requests have; None: not known.
        """
        assert (self.epochs > 0).all(), "an epoch is not positive"
        assert (self.epochs <= self.clock).all(), "an epoch lies in the future"
        if blocks is not None:
            sealed = self.epochs[blocks[self.sealed[blocks]].to(self.epochs.device)]
            assert len(sealed.unique()) == len(sealed), "two sealed blocks share an epoch"
