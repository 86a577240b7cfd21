"""Runs ops that are given CPU tensors on another device, so that the tests of `tests/ops` run there as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OnDevice:
    """Stands where `torch.ops.shadowkv` stands in `vllm_shadowkv.ops`.

    Whole storages are moved, so strides, offsets and what lies beside a view stay as they were, and are copied back
    after the call. The host pool stays on the host, pinned.
    """

    def __init__(self, library: Any, device: str) -> None:
        """For the ops of `library`."""
        self._library, self._device = library, device

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._library, name)
        names = [argument.name for argument in op.default._schema.arguments]

        def call(*arguments: Any) -> None:
            moved: dict[int, tuple[Tensor, Tensor]] = {}
            op(
                *(
                    self._move(value, moved, stays=name == "host_pool") if isinstance(value, Tensor) else value
                    for name, value in zip(names, arguments, strict=True)
                )
            )
            if self._device == "cuda":
                torch.cuda.synchronize()
            for here, there in moved.values():
                here.copy_(there)

        return call

    def _move(self, tensor: Tensor, moved: dict[int, tuple[Tensor, Tensor]], stays: bool) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in moved:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            pinned = stays and self._device == "cuda"
            moved[key] = here, (here.pin_memory() if pinned else here.to("cpu" if stays else self._device, copy=True))
        there = moved[key][1]
        view = torch.empty(0, dtype=tensor.dtype, device=there.device)
        return view.set_(there.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
