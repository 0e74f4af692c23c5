"""The picture of a profiler's trace: spans, operators, kernels and memory over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind.training.profiling.trace import Kind, Trace, TraceEvent, busy_ms, busy_periods, ranked, short
from minimind.utils.display import decoration

_NAMED = 8  # operators or kernels with a colour of their own
_LANES = 6  # of operators and kernels, the busiest
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
        if not spans:  # gray wherever anything ran, so that white is idle however short the operators are
            bars = [(a - begin, b - a) for a, b in busy_periods(seen)]
            axis.broken_barh(bars, (y - 0.42, 0.84), facecolors=_OTHER, linewidth=0)
            seen = [e for e in seen if e.length > width / 10_000]
        # inner events come later and are painted over the outer: what one sees is what ran
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
    """The name and its time where they fit, else the name, else the number in it."""
    room = (end - begin) / width * 200  # characters of this size across the picture
    texts = (f"{event.name}  {event.length:,.1f} ms", event.name, event.name.rpartition(" ")[2])
    text = next((t for t in texts if len(t) + 0.5 < room), "")
    axis.text((begin + end) / 2, y, text, ha="center", va="center", fontsize=7, clip_on=True)
