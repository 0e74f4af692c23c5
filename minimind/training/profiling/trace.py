"""A profiler's trace read back, and a table of where the time of its steps went."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Kind = Literal["span", "operator", "kernel", "device span"]
_KINDS: dict[str, Kind] = {
    "user_annotation": "span",
    "cpu_op": "operator",
    "kernel": "kernel",
    "gpu_memcpy": "kernel",
    "gpu_memset": "kernel",
    "gpu_user_annotation": "device span",
}


@dataclass(frozen=True)
class TraceEvent:
    """start, length and self_ms in milliseconds; self_ms is what no event of its kind within it took. lane: a thread
    or a GPU's stream. depth: how many of its kind are around it."""

    name: str
    kind: Kind
    lane: str
    start: float
    length: float
    depth: int = 0
    self_ms: float = 0.0

    @property
    def end(self) -> float:
        return self.start + self.length


@dataclass(frozen=True)
class Trace:
    """Events by start, from the first step's on; (ms, MiB) of memory allocated since, on the GPU if there is one."""

    events: list[TraceEvent]
    memory: list[tuple[float, float]]

    def of(self, *kinds: Kind) -> list[TraceEvent]:
        return [event for event in self.events if event.kind in kinds]

    @property
    def steps(self) -> list[TraceEvent]:
        return [event for event in self.of("span") if event.name.startswith("step ")]

    @property
    def work(self) -> list[TraceEvent]:
        """Kernels of the GPU or, without one, operators."""
        return self.of("kernel") or self.of("operator")


def read_trace(path: Path) -> Trace:
    """The trace that torch.profiler wrote to `path`, a .json.gz."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = json.load(file)["traceEvents"]
    found = [row for row in rows if row.get("ph") == "X" and row.get("cat") in _KINDS]
    zero = min((row["ts"] for row in found if row["name"].startswith("step ")), default=0.0)
    lanes: dict[Any, dict[Kind, list[TraceEvent]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        kind = _KINDS[row["cat"]]
        lane = f"thread {row['tid']}"
        if kind in ("kernel", "device span"):
            lane = f"GPU {row['pid']} stream {row['tid']}"
        name = _span_name(row["name"]) if kind in ("span", "device span") else row["name"]
        event = TraceEvent(name, kind, lane, (row["ts"] - zero) / 1e3, row.get("dur", 0.0) / 1e3)
        lanes[lane][kind].append(event)
    events = [e for kinds in lanes.values() for lane_events in kinds.values() for e in _nested(lane_events)]
    return Trace(sorted(events, key=lambda e: (e.start, -e.length)), _memory(rows, zero))


def _span_name(name: str) -> str:
    """As we call it: a collective of torch.distributed is communication, and FSDP's spans do not name their layers."""
    if name.startswith(("nccl:", "gloo:")):
        return "communication"
    if name.startswith("FSDP::"):
        return re.split(r" \(| for ", name)[0]
    return name.rpartition("#")[2]  # Optimizer.step#Muon.step


def _nested(events: Sequence[TraceEvent]) -> list[TraceEvent]:
    """The events of one kind and lane with their depth and self_ms."""
    ordered = sorted(events, key=lambda e: (e.start, -e.length))
    inner = [0.0] * len(ordered)
    depths, around = [], list[int]()
    for i, event in enumerate(ordered):
        while around and ordered[around[-1]].end <= event.start:
            around.pop()
        if around:
            inner[around[-1]] += event.length
        depths.append(len(around))
        around.append(i)
    return [
        TraceEvent(e.name, e.kind, e.lane, e.start, e.length, depth, max(0.0, e.length - taken))
        for e, depth, taken in zip(ordered, depths, inner, strict=True)
    ]


def _memory(rows: Iterable[dict[str, Any]], zero: float) -> list[tuple[float, float]]:
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row.get("name") == "[memory]":
            values = row["args"]
            found[values["Device Type"]].append(((row["ts"] - zero) / 1e3, values["Total Allocated"] / 2**20))
    return sorted(found[max(found)]) if found else []


def busy_periods(events: Iterable[TraceEvent]) -> list[tuple[float, float]]:
    """(start, end) of each stretch of time in which at least one of the events ran."""
    periods: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda e: e.start):
        if periods and event.start <= periods[-1][1]:
            periods[-1] = periods[-1][0], max(periods[-1][1], event.end)
        else:
            periods.append((event.start, event.end))
    return periods


def busy_ms(events: Iterable[TraceEvent]) -> float:
    """Milliseconds in which at least one of the events ran."""
    return sum(end - start for start, end in busy_periods(events))


def show(trace: Trace, console: Console, top: int = 15) -> None:
    """The `top` operators (on a GPU kernels) by self time, and the spans."""
    steps = max(1, len(trace.steps))
    wall = sum(step.length for step in trace.steps) or 1.0
    what = "kernel" if trace.of("kernel") else "operator"
    table = Table(title=f"{steps} steps of {wall / steps:,.1f} ms, recorded")
    for column in (what, "ms a step", "of a step", "calls a step"):
        table.add_column(column, justify="left" if column == what else "right", no_wrap=True)
    for name, events in ranked(trace.work)[:top]:
        own = sum(e.self_ms for e in events)
        table.add_row(short(name, 60), f"{own / steps:,.2f}", f"{own / wall:.1%}", f"{len(events) / steps:,.0f}")
    idle = max(0.0, wall - busy_ms(trace.work))
    table.add_row(f"no {what} running", f"{idle / steps:,.2f}", f"{idle / wall:.1%}", "", style="bold")
    console.print(table)
    console.print(_span_table(trace, steps, wall))


def _span_table(trace: Trace, steps: int, wall: float) -> Table:
    table = Table()
    device = trace.of("device span")
    columns = ["span", "ms a step", "of a step", "outside inner spans", "calls a step"]
    for column in columns + ["GPU ms a step"] * bool(device):
        table.add_column(column, justify="left" if column == "span" else "right")
    groups: dict[str, list[TraceEvent]] = defaultdict(list)
    for event in trace.of("span"):
        if not event.name.startswith("step "):
            groups["blocks" if event.name.startswith("block ") else event.name].append(event)
    for name, events in groups.items():
        ms, own = busy_ms(events), sum(e.self_ms for e in events)
        row = [f"{ms / steps:,.2f}", f"{ms / wall:.1%}", f"{own / wall:.1%}", f"{len(events) / steps:,.0f}"]
        names = {e.name for e in events}
        row += [f"{busy_ms(e for e in device if e.name in names) / steps:,.2f}"] * bool(device)
        table.add_row(name, *row)
    return table


def ranked(events: Iterable[TraceEvent]) -> list[tuple[str, list[TraceEvent]]]:
    """(name, its events), the largest sum of self times first."""
    groups: dict[str, list[TraceEvent]] = defaultdict(list)
    for event in events:
        groups[event.name].append(event)
    return sorted(groups.items(), key=lambda pair: -sum(e.self_ms for e in pair[1]))


def short(name: str, width: int) -> str:
    """An operator's or kernel's name in at most `width` characters."""
    name = re.sub(r"^(void |autograd::engine::evaluate_function: )", "", name)
    return name if len(name) <= width else f"{name[: width // 2 - 1]}...{name[2 - width // 2 :]}"
