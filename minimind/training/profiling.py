"""Record a few training steps with torch.profiler, and show where their time went, as a table and as a picture."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.hooks import RemovableHandle

from minimind.utils.display import decoration, say
from minimind.utils.spans import nvtx_mode, record, span

TRACE, PICTURE = "trace.json.gz", "timeline.png"


def mark_blocks(model: nn.Module) -> list[RemovableHandle]:
    """Add hooks that open a span "block N" around the forward of each of `model.layers`; removing the returned handles
    undoes it.

    In a compiled model the hooks do nothing and break no graph. Its trace shows a "Torch-Compiled Region" per graph
    and, on a GPU, Inductor's fused kernels (triton_poi_..., triton_red_...) instead of blocks.
    """
    handles = []
    for number, layer in enumerate(cast(nn.ModuleList, model.layers)):
        hook = _BlockSpan(f"block {number}")
        handles.append(layer.register_forward_pre_hook(hook.enter))
        handles.append(layer.register_forward_hook(hook.leave, always_call=True))
    return handles


class _BlockSpan:
    def __init__(self, name: str) -> None:
        self.name, self.open = name, list[AbstractContextManager[None]]()

    def enter(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.open.append(span(self.name))
            self.open[-1].__enter__()

    def leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling() and self.open:
            self.open.pop().__exit__(None, None, None)


class StepProfiler:
    """Records `steps` steps of this process from number `first` on, counted from 1.

    Earlier steps are left out because they compile, allocate and warm up. Writes trace.json.gz (for chrome://tracing or
    ui.perfetto.dev) and timeline.png to `folder`, and prints the operators or kernels that took longest. Under
    MINIMIND_NVTX=1 it writes nothing, but tells nsys or ncu when to record, by cudaProfilerStart and Stop. Recording
    slows steps down: compare their times only with each other.
    """

    def __init__(self, folder: Path, console: Console, first: int = 3, steps: int = 3) -> None:
        if first < 1 or steps < 1:
            raise ValueError(f"first={first} and steps={steps} must both be at least 1")
        self.folder, self.console, self.first, self.last = folder, console, first, first + steps - 1
        self._count = 0
        self._recording = False
        self._profile: profile | None = None
        self._step: AbstractContextManager[None] = nullcontext()

    def begin(self, step: int) -> None:
        """Call it before step number `step` of the run, which becomes its name in the trace."""
        self._count += 1
        if self._count == self.first:
            self._start()
        if self._recording:
            self._step = span(f"step {step}")
            self._step.__enter__()

    def end(self) -> None:
        """Call it after the step."""
        self._leave_step()
        if self._recording and self._count == self.last:
            self._stop()

    def close(self) -> None:
        """Call it when training ends. If the recording is still running, it ends here and is shown."""
        self._leave_step()
        if self._recording:
            self._stop()
        elif self._count < self.first:
            say(self.console, f"profile: nothing recorded, this process ended before its step {self.first}")

    def _leave_step(self) -> None:
        self._step.__exit__(None, None, None)
        self._step = nullcontext()

    def _start(self) -> None:
        self._recording = True
        if nvtx_mode():
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()
        record(True)

    def _stop(self) -> None:
        self._recording = False
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the last step's kernels belong to it
        if self._profile is None:
            if torch.cuda.is_initialized():
                torch.cuda.profiler.stop()
            return
        record(False)
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.folder / TRACE))
        self._profile = None
        trace = read_trace(self.folder / TRACE)
        show(trace, self.console)
        draw(trace, self.folder / PICTURE)
        say(self.console, f"profile: {self.folder / PICTURE}, {self.folder / TRACE} (ui.perfetto.dev opens it)")


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
    """start, length and self_ms in milliseconds; self_ms excludes inner events of its kind. lane: a thread or a GPU's
    stream. depth: the number of events of its kind around it."""

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
    """events: sorted by start, at which the first step has 0; memory: (ms, MiB allocated since then) on the GPU, or on
    the CPU without one."""

    events: list[TraceEvent]
    memory: list[tuple[float, float]]

    def of(self, *kinds: Kind) -> list[TraceEvent]:
        return [event for event in self.events if event.kind in kinds]

    @property
    def steps(self) -> list[TraceEvent]:
        return [event for event in self.of("span") if event.name.startswith("step ")]

    @property
    def work(self) -> list[TraceEvent]:
        """Kernels of the GPU, or operators without a GPU."""
        return self.of("kernel") or self.of("operator")


def read_trace(path: Path) -> Trace:
    """The trace that torch.profiler wrote to `path`, a .json.gz."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = json.load(file)["traceEvents"]
    recorded = [row for row in rows if row.get("ph") == "X" and row.get("cat") in _KINDS]
    zero = min((row["ts"] for row in recorded if row["name"].startswith("step ")), default=0.0)
    lanes: dict[Any, dict[Kind, list[TraceEvent]]] = defaultdict(lambda: defaultdict(list))
    for row in recorded:
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
    """A shorter name: communication for collectives of torch.distributed, FSDP's spans without their layers."""
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
    sizes: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row.get("name") == "[memory]":
            values = row["args"]
            sizes[values["Device Type"]].append(((row["ts"] - zero) / 1e3, values["Total Allocated"] / 2**20))
    return sorted(sizes[max(sizes)]) if sizes else []


def busy_periods(events: Iterable[TraceEvent]) -> list[tuple[float, float]]:
    """(start, end) of every period in which at least one of the events ran."""
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
    """Print the `top` operators, or a GPU's kernels, by self time, and the spans."""
    steps = max(1, len(trace.steps))
    wall = sum(step.length for step in trace.steps) or 1.0
    noun = "kernel" if trace.of("kernel") else "operator"
    table = Table(title=f"{steps} steps of {wall / steps:,.1f} ms, recorded")
    for column in (noun, "ms a step", "of a step", "calls a step"):
        table.add_column(column, justify="left" if column == noun else "right", no_wrap=True)
    width = max(16, min(60, console.width - 46))  # the numbers of a narrow terminal stay whole
    for name, events in ranked(trace.work)[:top]:
        own = sum(e.self_ms for e in events)
        table.add_row(short(name, width), f"{own / steps:,.2f}", f"{own / wall:.1%}", f"{len(events) / steps:,.0f}")
    idle = max(0.0, wall - busy_ms(trace.work))
    table.add_row(f"no {noun} running", f"{idle / steps:,.2f}", f"{idle / wall:.1%}", "", style="bold")
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


_NAMED = 8  # operators or kernels with their own colour
_LANES = 6  # the busiest lanes of operators and kernels
_OTHER = "#d9d9d9"
_COLOURS = {
    "data": "#f2c14e", "forward": "#9ecae1", "loss": "#6baed6", "backward": "#a1d99b", "optimizer": "#fdae6b",
    "communication": "#dd8fc0", "step": "#e4e4e4", "block": "#c6dbef", "Muon.step": "#fdd0a2", "AdamW.step": "#fee0c0",
}  # fmt: skip


@decoration
def draw(trace: Trace, picture: Path) -> None:
    """Write a PNG: all steps and their memory, then the last step enlarged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = trace.steps or trace.events
    begin, last = steps[0].start, steps[-1].start
    end = max(e.end for e in (*steps, *trace.of("kernel")))  # a GPU ends after the host has
    lanes = _lanes(trace)
    height = 0.32 * len(lanes) + 0.5
    figure, axes = plt.subplots(
        3, 1, figsize=(14, 2 * height + 2.6), height_ratios=(height, 1, height), layout="constrained"
    )
    names = [name for name, _ in ranked(trace.work)[:_NAMED]]
    colours = {name: plt.get_cmap("tab10")(i) for i, name in enumerate(names)}
    _panel(axes[0], lanes, colours, begin, end, f"{len(steps)} steps")
    _memory_panel(axes[1], trace, begin, end)
    _panel(axes[2], lanes, colours, last, end, f"{steps[-1].name}, the last of them")
    axes[2].set_xlabel("milliseconds", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    labels = [short(name, 44) for name in names]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def _lanes(trace: Trace) -> list[tuple[str, list[TraceEvent]]]:
    """(label, events) from top to bottom: spans by depth, then operators and kernels by thread and stream."""
    host = trace.steps[0].lane if trace.steps else ""
    spans = [e for e in trace.of("span") if e.lane == host]
    depths = sorted({e.depth for e in spans})
    lanes = [("spans" if depth == 0 else "", [e for e in spans if e.depth == depth]) for depth in depths]
    busy: dict[tuple[str, Kind], list[TraceEvent]] = defaultdict(list)
    for event in trace.of("operator", "kernel"):
        busy[event.lane, event.kind].append(event)
    most = sorted(busy, key=lambda lane: -busy_ms(busy[lane]))[:_LANES]
    for lane, kind in sorted(most, key=lambda key: (key[1] == "kernel", key[0] != host, key[0])):
        lanes.append(("operators" if lane == host else lane, busy[lane, kind]))
    return lanes


def _panel(
    axis: Any,
    lanes: Sequence[tuple[str, list[TraceEvent]]],
    colours: dict[str, Any],
    begin: float,
    end: float,
    title: str,
) -> None:
    width = end - begin
    for y, (_, events) in enumerate(lanes):
        seen = [e for e in events if e.end > begin and e.start < end]
        spans = [e for e in seen if e.kind == "span"]
        if not spans:  # gray where anything ran, so that white is idle even between short operators
            bars = [(a - begin, b - a) for a, b in busy_periods(seen)]
            axis.broken_barh(bars, (y - 0.42, 0.84), facecolors=_OTHER, linewidth=0)
            seen = [e for e in seen if e.length > width / 10_000]
        # inner events come later and are painted over outer ones
        paint = [_colour(e, colours) for e in seen]
        bars, edge = [(e.start - begin, e.length) for e in seen], 0.4 if spans else 0.0
        axis.broken_barh(bars, (y - 0.42, 0.84), facecolors=paint, edgecolor="white", linewidth=edge)
        for event in spans:
            _label(axis, event, y, max(0.0, event.start - begin), min(width, event.end - begin), width)
    axis.set_ylim(len(lanes) - 0.5, -0.5)
    axis.set_yticks(range(len(lanes)), [label for label, _ in lanes], fontsize=8)
    axis.tick_params(axis="y", length=0)
    _finish(axis, width, title)


def _memory_panel(axis: Any, trace: Trace, begin: float, end: float) -> None:
    if trace.memory:
        times, sizes = zip(*trace.memory, strict=True)
        axis.fill_between([t - begin for t in times], sizes, step="post", color="#c4c4c4", linewidth=0)
    axis.set_ylabel("MiB", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylim(bottom=0)
    _finish(axis, end - begin, "memory allocated since recording began")


def _finish(axis: Any, width: float, title: str) -> None:
    axis.set_xlim(0, width)
    axis.set_title(title, loc="left", fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _colour(event: TraceEvent, colours: dict[str, Any]) -> Any:
    if event.kind == "span":
        return _COLOURS.get(event.name.split()[0], "#d0d0d0")
    return colours.get(event.name, _OTHER)


def _label(axis: Any, event: TraceEvent, y: int, begin: float, end: float, width: float) -> None:
    """Write the name and the time if they fit, else the name, else the number in it."""
    room = (end - begin) / width * 200  # characters across the picture
    texts = (f"{event.name}  {event.length:,.1f} ms", event.name, event.name.rpartition(" ")[2])
    text = next((t for t in texts if len(t) + 0.5 < room), "")
    axis.text((begin + end) / 2, y, text, ha="center", va="center", fontsize=7, clip_on=True)
