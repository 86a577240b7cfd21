"""What the model says, as tables: in a terminal, or in Markdown, as docs/gpu_predictions.md has them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.step_model.assumed import CASES, Assumed, Case, Machine
from benchmarks.step_model.model import SHAPE, Model, Op
from vllm_shadowkv.state.host_memory import GIB

BATCHES = (1, 8, 32)
WIDE = 19
"""Columns of a terminal, within which a cell is kept in one line."""
BF16, FP8, OURS = CASES[:3]


@dataclass(frozen=True)
class Sheet:
    """A table."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """With its title before it, without a line's end."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join((f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)))

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, column in enumerate(self.columns):
            widest = max(len(row[index]) for row in self.rows)
            justify = "right" if index and column != "what" else "left"
            least = min(widest, WIDE) if index else None
            table.add_column(column, justify=justify, min_width=least, overflow="fold")
        for row in self.rows:
            table.add_row(*(re.sub(r"\*\*|`", "", cell) for cell in row))
        return table


def sheets(machines: dict[str, Machine], assumed: Assumed, contexts: list[int], cases: tuple[Case, ...]) -> list[Sheet]:
    """All of them: layers at the longest context, whole models at all, and of the first machine what costs how much."""
    longest, ours = max(contexts), next((case for case in cases if case.backend == "shadowkv"), OURS)
    layers = [_layer(name, machine, assumed, longest, ours) for name, machine in machines.items()]
    models = [
        _models(name, machine, assumed, tokens, cases) for name, machine in machines.items() for tokens in contexts
    ]
    name, machine = next(iter(machines.items()))
    model = Model(machine, assumed, ours, longest)
    return [*layers, *models, _costs(name, model), _ranges(name, model), _machines(machines), _assumed(assumed)]


def _cell(op: Op) -> str:
    return f"{_us(op.limit)} → {_us(op.time)} ({_percent(op.limit / op.time)})" if op.limit else _us(op.time)


def _us(time: float) -> str:
    return f"{time:.1f}" if time < 9.95 else f"{time:.0f}"


def _ratio(rate: float, other: float) -> str:
    return f"{rate / other:.2f}" if other else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _sum(ops: list[Op]) -> Op:
    return Op(sum(op.limit for op in ops), sum(op.time for op in ops))


def _layer(name: str, machine: Machine, assumed: Assumed, tokens: int, case: Case) -> Sheet:
    ours = Model(machine, assumed, case, tokens)
    resident = replace(ours, case=replace(case, resident=1.0, parts=1))  # nothing crosses the link
    batches = [ours.ops(batch) for batch in BATCHES]
    rows = [(f"`{op}`", *(_cell(ops[op]) for ops in batches)) for op in batches[0]]
    selects = [_sum([ops[op] for op in ("logits", "pick", "rest")]) for ops in batches]
    rows.insert(3, ("these three, `select_chunks`", *map(_cell, selects)))
    sums = [replace(_sum([*ops.values()]), time=ours.layer(batch)) for ops, batch in zip(batches, BATCHES, strict=True)]
    stock = [[replace(ours, case=other).layer(batch) for other in (BF16, FP8)] for batch in BATCHES]
    exact = [resident.layer(batch) for batch in BATCHES]

    def ratio(times: list[float]) -> list[str]:
        pairs = zip(stock, times, strict=True)
        return [" / ".join(f"{other / time:.2f}" for other in others) for others, time in pairs]

    rows.append(("all", *map(_cell, sums)))
    rows.append(("FlashAttention bf16 / fp8", *(" / ".join(map(_us, times)) for times in stock)))
    rows.append(("times as fast", *ratio([op.time for op in sums])))
    rows.append(("all, where every miss is resident", *map(_us, exact)))
    rows.append(("times as fast", *ratio(exact)))
    title = f"{name}: a layer of a decode step at {tokens:,} tokens, {_percent(ours.row.hits)} hits; µs"
    return Sheet(title, ("op", *(f"batch {batch}" for batch in BATCHES)), rows)


def _models(name: str, machine: Machine, assumed: Assumed, tokens: int, cases: tuple[Case, ...]) -> Sheet:
    stock = [Model(machine, assumed, case, tokens).rate for case in (BF16, FP8)]
    rows = []
    for case in cases:
        model = Model(machine, assumed, case, tokens)
        against = ", ".join(_ratio(model.rate, rate) for rate in stock)
        said = ("", "", "", "")
        if case.backend == "shadowkv":
            link = SHAPE.num_layers * model.row.link / 2**20
            host = model.plan.host_pool_bytes / GIB
            said = (_percent(model.row.hits), f"{link:.0f}", f"{host:.0f}", against)
        hits, mib, gib, against = said
        cells = (str(model.requests), hits, mib, gib, f"{model.step:.1f}", f"{model.rate:.0f}", against)
        rows.append((case.name, *cells))
    columns = ("", "requests", "hits", "MiB a token", "host, GiB", "step, ms", "tokens a second", "against bf16, fp8")
    return Sheet(f"{name}: the whole model at {tokens:,} tokens", columns, rows)


def _costs(name: str, model: Model) -> Sheet:
    """Where the time of a step goes."""
    layers, ops = SHAPE.num_layers / 1e3, model.ops(model.requests)
    above = sorted(ops.items(), key=lambda item: item[1].limit - item[1].time)
    rows = [(f"`{op}`", f"{layers * took.time:.1f}", f"{layers * (took.time - took.limit):.1f}") for op, took in above]
    rest = model.step - layers * model.layer(model.requests)
    busy = layers * model.requests * model.row.link / model.machine.link_gbs / 1e3 / model.assumed.link_share
    rows.append(("all else", f"{rest:.1f}", f"{rest - model.beside_limit:.1f}"))
    rows.append(("the whole step", f"{model.step:.1f}", ""))
    rows.append(("of it the link idles", f"{model.step - busy:.1f}", ""))
    title = f"{name}: where a step of {model.requests} requests of {model.tokens:,} tokens goes"
    return Sheet(title, ("op", "ms", "above its bytes' limit, ms"), rows)


def _ranges(name: str, model: Model) -> Sheet:
    """What a rate becomes at the ends of each uncertain assumption alone."""
    rows = []
    for field, ends in _uncertain():
        models = [replace(model, assumed=replace(model.assumed, **{field: end})) for end in ends]
        rates = [model.rate for model in models]
        if len({round(rate) for rate in (*rates, model.rate)}) == 1 and field != "flash_fp8_share":
            continue
        fp8 = [_ratio(rate, replace(other, case=FP8).rate) for rate, other in zip(rates, models, strict=True)]
        cells = ([f"{end:g}" for end in ends], [f"{rate:.0f}" for rate in rates], fp8)
        rows.append((f"`{field}`", *map(" to ".join, cells)))
    title = f"{name}: {model.requests} requests of {model.tokens:,} tokens, an assumption at its worst and at its best"
    return Sheet(title, ("assumption", "worst to best", "tokens a second", "against fp8"), rows)


def _uncertain() -> Iterator[tuple[str, tuple[float, float]]]:
    for field in fields(Assumed):
        if field.metadata["low"] is not None:
            yield field.name, (field.metadata["low"], field.metadata["high"])


def _machines(machines: dict[str, Machine]) -> Sheet:
    rows = [
        (f"`{field.name}`", *(f"{getattr(machine, field.name):g}" for machine in machines.values()), _meaning(field))
        for field in fields(Machine)
    ]
    return Sheet("Machines", ("", *machines, "what"), rows)


def _assumed(assumed: Assumed) -> Sheet:
    rows = []
    ranges = dict(_uncertain())
    for field in fields(Assumed):
        ends = " to ".join(f"{end:g}" for end in ranges.get(field.name, ()))
        rows.append((f"`{field.name}`", f"{getattr(assumed, field.name):g}", ends, _meaning(field)))
    title = "What is assumed of kernels; µs, where it is no share or number"
    return Sheet(title, ("", "value", "worst to best", "what"), rows)


def _meaning(field: Field[Any]) -> str:
    return str(field.metadata["meaning"])
