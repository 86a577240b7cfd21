"""The rows of a step, as far as vLLM knows them on the host."""

from __future__ import annotations

from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata


class Row:
    """One row of a step.

    Attributes:
        index: in the step's tensors.
        tokens: its places among the step's tokens.
        seq_len: tokens of the request, those of the step included.
        prefilling: whether the step still computes the prompt.
        computed: tokens before the step.
        exact_start: its exact boundary, once the planner has read it.
        exact_row: int32 `[max_pages]`, its exact pages, where some of them are no longer its own; else None.
    """

    __slots__ = ("computed", "exact_row", "exact_start", "index", "prefilling", "seq_len", "tokens")

    def __init__(self, index: int, tokens: slice, seq_len: int, prefilling: bool) -> None:
        """A row whose boundary was not read yet."""
        self.index, self.tokens, self.seq_len, self.prefilling = index, tokens, seq_len, prefilling
        self.computed = seq_len - (tokens.stop - tokens.start)
        self.exact_start = 0
        self.exact_row: Tensor | None = None


def read_rows(shadow: CommonAttentionMetadata, max_drafts: int) -> list[Row]:
    """The rows that compute tokens.

    Args:
        shadow: vLLM's metadata of the shadow group.
        max_drafts: most tokens that are drafted for a row and step.
    """
    starts = shadow.query_start_loc_cpu[: shadow.num_reqs + 1].tolist()
    lengths = shadow.seq_lens_cpu_upper_bound  # exact, for drafts are not verified asynchronously (refusals.py)
    seq_lens = (shadow.seq_lens if lengths is None else lengths)[: shadow.num_reqs].tolist()
    flags = shadow.is_prefilling
    prefilling = [] if flags is None else flags.tolist()
    rows = []
    for index, seq_len in enumerate(seq_lens):
        count = starts[index + 1] - starts[index]
        if 0 < count <= seq_len:
            # More tokens than one and its drafts are a prompt's, or those of a resumed request being computed again.
            flag = count > 1 + max_drafts or (index < len(prefilling) and prefilling[index])
            rows.append(Row(index, slice(starts[index], starts[index + 1]), seq_len, prefilling=flag))
    return rows
