"""The instrument itself, without a GPU: ops called through it give what they give when called directly."""

from __future__ import annotations

import generators
import pytest
import torch
from on_device import OnDevice

from vllm_shadowkv import ops


def test_on_device_keeps_views_and_copies_back(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = generators.make_layout(2, 64, value_int8=True)
    generator = generators.make_generator("on device")
    pages = generators.garbage_pages(generator, 8, layout.page_bytes)
    values = layout.exact_views(pages)[1]
    values.copy_(generators.randn(generator, *values.shape))
    per_block = layout.block_size // layout.exact_tokens
    exact_ids = torch.arange(1, 1 + per_block, dtype=torch.int32)[None]
    results = []
    for library in (ops._ops, OnDevice(ops._ops, "cpu")):
        monkeypatch.setattr(ops, "_ops", library)
        wide = torch.zeros(8, layout.value_row_bytes + 16, dtype=torch.uint8)
        ops.store_values(torch.tensor([7], dtype=torch.int32), exact_ids, values, pages, wide[:, :-16], layout)
        results.append(wide)
    assert results[0].any()
    assert torch.equal(*results)
