"""What a worker counts, and the meter that publishes it."""

from __future__ import annotations

import torch
from vllm import envs

from vllm_shadowkv.integration.worker.geometry import Geometry
from vllm_shadowkv.metrics import Meter, StepCounts, labels_of
from vllm_shadowkv.state.slot_counts import SlotCounts


class Metering:
    """The counts of one model in one worker.

    Attributes:
        steps: what the planner counts.
    """

    def __init__(self, geometry: Geometry) -> None:
        """Publishes nothing yet."""
        self.steps = StepCounts()
        self._geometry = geometry
        self._slots: SlotCounts | None = None
        self._meter: Meter | None = None

    def of_pool(self, num_blocks: int, num_layers: int, device: torch.device) -> SlotCounts:
        """Publishes for a pool from now on; counts of a pool before go on.

        Returns:
            What the kernels add to.
        """
        self._slots = self._slots or SlotCounts(device)
        self._meter = self._meter or self._make_meter(self._slots, num_layers)
        self._meter.num_blocks = num_blocks
        return self._slots

    def _make_meter(self, slots: SlotCounts, num_layers: int) -> Meter:
        vllm_config = self._geometry.vllm_config
        return Meter(
            self.steps,
            slots,
            self._geometry.layout,
            num_layers,
            labels=labels_of(vllm_config),
            first_rank=vllm_config.parallel_config.rank == 0,
            log_seconds=envs.VLLM_LOG_STATS_INTERVAL,
        )
