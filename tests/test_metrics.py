from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from generators import make_layout

from vllm_shadowkv import metrics
from vllm_shadowkv.metrics import IDLE_SECONDS, Meter, StepCounts
from vllm_shadowkv.state.slot_counts import SlotCounts

DOCS = Path(__file__).parents[1] / "docs"
LAYOUT = make_layout(2, 64, torch.bfloat16)
LAYERS = 3
ROW_BYTES = LAYERS * LAYOUT.value_row_bytes


class Clock:
    """Time, as a test wants it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Worker:
    """A meter and what it reads."""

    def __init__(self, engine: str, first_rank: bool = True) -> None:
        self.steps, self.slots = StepCounts(), SlotCounts(torch.device("cpu"))
        self.labels = {"model_name": "m", "engine": engine}
        self.meter = Meter(self.steps, self.slots, LAYOUT, LAYERS, self.labels, first_rank, log_seconds=10)
        self.meter.num_blocks = 8
        self.engine = engine

    def read(self) -> dict[str, float]:
        """Published values by short name."""
        self.meter.publish()
        return {
            sample.name.removeprefix("vllm:shadowkv_")
            + sample.labels.get("phase", "")
            + sample.labels.get("kind", ""): sample.value
            for family in metrics.REGISTRY.collect()
            for sample in family.samples
            if sample.labels["engine"] == self.engine and not sample.name.endswith("_created")
        }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(metrics, "_serve", lambda: None)
    return clock


@pytest.mark.usefixtures("clock")
def test_counts_become_metrics() -> None:
    worker = Worker("10")
    nothing = worker.read()
    assert len(nothing) == len(exported() - {"vllm:shadowkv_files_total"}) + 2, "one has two phases, one two kinds"
    assert nothing.pop("host_pool_bytes") == 8 * ROW_BYTES
    assert not any(nothing.values())
    worker.steps.__dict__.update(sealed_blocks=5, sealed_prefills=2, table_reads=4, used_blocks=3, steps=9)
    worker.steps.expanded_tokens, worker.steps.resident_tokens = 7 * LAYOUT.block_size, 3 * LAYOUT.block_size
    worker.slots.tensor += torch.tensor([100, 60, 9, 30])
    metrics.count_hit(worker.labels, 30, 20)
    metrics.count_ownerless_seals(worker.labels, 2)
    assert worker.read() == {
        "sealed_blocks_total": 5,
        "selected_chunks_total": 100,
        "slot_hits_total": 60,
        "slot_misses_total": 39,
        "resident_chunks_total": 9,
        "resident_tokens_total": 3 * LAYOUT.block_size,
        "hit_tokens_totalexact": 30,
        "hit_tokens_totalsealed": 20,
        "ownerless_seals_total": 2,
        "fetched_bytes_totaldecode": 30 * 8 * 64 * 2,
        "fetched_bytes_totalprefill": 7 * ROW_BYTES,
        "expanded_tokens_total": 7 * LAYOUT.block_size,
        "sealed_prefills_total": 2,
        "table_reads_total": 4,
        "refused_requests_total": 0,
        "host_pool_bytes": 8 * ROW_BYTES,
        "host_pool_used_bytes": 3 * ROW_BYTES,
    }
    worker.slots.tensor += torch.tensor([10, 10, 0, 0])
    assert worker.read()["slot_hits_total"] == 70


@pytest.mark.usefixtures("clock")
def test_other_ranks_leave_out_what_the_first_one_reports() -> None:
    worker = Worker("11", first_rank=False)
    worker.steps.sealed_blocks = 5
    worker.slots.tensor += 1
    published = worker.read()
    assert published["slot_hits_total"] == 1
    assert published["host_pool_bytes"] == 8 * ROW_BYTES
    shared = {
        "sealed_blocks_total",
        "expanded_tokens_total",
        "sealed_prefills_total",
        "table_reads_total",
        "refused_requests_total",
        "resident_tokens_total",
        "ownerless_seals_total",
        "hit_tokens_totalexact",
    }
    assert not shared & published.keys()


def test_idle_requests_use_nothing(clock: Clock) -> None:
    worker = Worker("12")
    worker.steps.steps, worker.steps.used_blocks = 1, 3
    assert worker.read()["host_pool_used_bytes"] == 3 * ROW_BYTES
    clock.now += IDLE_SECONDS
    assert worker.read()["host_pool_used_bytes"] == 3 * ROW_BYTES
    clock.now += 1
    assert worker.read()["host_pool_used_bytes"] == 0


@pytest.mark.usefixtures("clock")
def test_a_model_that_is_gone_has_no_pool_and_the_next_one_counts_on() -> None:
    for total in (4, 8):
        worker = Worker("13")
        worker.steps.sealed_blocks = 4
        assert worker.read()["sealed_blocks_total"] == total
        del worker
        pools = [sample.value for family in metrics.HOST_POOL_BYTES.collect() for sample in family.samples]
        assert not any(pools)


def test_a_line_in_the_log_now_and_then(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm.shadowkv")
    worker = Worker("14")

    def lines(seconds: float) -> list[str]:
        caplog.clear()
        clock.now += seconds
        worker.meter.publish()
        return [record.getMessage() for record in caplog.records]

    worker.steps.steps, worker.steps.sealed_blocks = 1, 2
    worker.slots.tensor += torch.tensor([400, 300, 40, 60])
    assert lines(9) == []
    (line,) = lines(1)
    assert line.startswith(
        "Engine 014: shadowkv: sealed 2 blocks, slots held 75.0% of 400 selected chunks, resident pages 10.0%, "
        "fetched 0.1 MiB"
    )
    assert lines(10) == [], "no step, no line"
    worker.steps.steps = 2
    (line,) = lines(10)
    assert "sealed 0 blocks, slots held 0.0% of 0 selected chunks" in line, "it is about the interval"


# -- What is written about them --------------------------------------------------------------------------------------


def exported() -> set[str]:
    """Names as Prometheus shows them."""
    return {
        family.name + ("_total" if family.type == "counter" else "")
        for family in metrics.REGISTRY.collect()
        if not family.name.endswith("_created")
    }


def test_the_dashboard_asks_for_what_there_is() -> None:
    dashboard = json.loads((DOCS / "grafana_dashboard.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    asked = set(re.findall(r"vllm:\w+", json.dumps(dashboard)))
    assert asked == exported()
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables
            selectors = re.findall(r"vllm:\w+(\{[^}]*\})", target["expr"])
            assert set(selectors) == {'{model_name=~"$model_name",engine=~"$engine"}'}


def test_the_page_describes_what_there_is() -> None:
    rows = re.findall(r"^\| `(vllm:\w+)` \| (\w+) ", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    families = {family.name: family.type for family in metrics.REGISTRY.collect()}
    assert dict(rows) == families
