"""The rows of bench/time_to_loss.py: figures read while a run goes on, times to a loss, the table and the picture."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table

from bench.common.plots import hide_frame, plt, save
from bench.common.record import Row, check_columns
from bench.report.rows import rows_of
from minimind.utils.display import caption as plain

POLL = 0.05  # seconds
COLOURS = {"upstream": "tab:brown", "upstream-style": "tab:red", "hf": "tab:orange", "hf-eager": "goldenrod",
           "ours": "tab:blue", "ours-eager": "tab:cyan"}  # fmt: skip
LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class CurvePoint:
    """A held-out figure. seconds: since the command was started, evaluations excluded; tokens: positions trained on so
    far, padding included; bpb: bits per byte of text, or of answers; nats: per token."""

    seconds: float
    tokens: int
    bpb: float
    nats: float
    exact: float | None = None


@dataclass(frozen=True)
class TimeToLossRow(Row):
    """One run. minutes: the time that its steps were planned to fill; lr: the peak rate, None where the command
    chooses. The figures are those at the end of the run; exact: the share of held-out questions answered exactly, of
    SFT. curve: seconds/tokens/bits-per-byte of every evaluation, separated by spaces."""

    torch: str
    transformers: str | None
    stage: str
    implementation: str
    data: str
    preset: str
    seed: int
    lr: float | None
    minutes: float
    steps: int
    tokens: int
    seconds: float
    evaluation_seconds: float
    heldout_loss: float
    heldout_bpb: float
    exact: float | None
    curve: str


def read(table: Path) -> list[TimeToLossRow]:
    """The rows of a file; none if it does not exist. Raises ValueError for columns of another version."""
    check_columns(table, TimeToLossRow)
    return [typed(row) for row in rows_of(table)]


def typed(row: dict[str, str]) -> TimeToLossRow:
    """A row as it was before it was written."""
    values: dict[str, Any] = dict(row)
    for field in dataclasses.fields(TimeToLossRow):
        kind = str(field.type)
        if "None" in kind and not row[field.name]:
            values[field.name] = None
        elif kind.startswith(("int", "float")):
            values[field.name] = (int if kind.startswith("int") else float)(row[field.name])
    return TimeToLossRow(**values)


def curve_text(points: Sequence[CurvePoint]) -> str:
    return " ".join(f"{p.seconds:.1f}/{p.tokens}/{p.bpb:.4f}" for p in points)


def read_curve(text: str) -> list[tuple[float, int, float]]:
    """(seconds, tokens, bits per byte) of every evaluation in a row's `curve`."""
    parts = (point.split("/") for point in text.split())
    return [(float(seconds), int(tokens), float(bpb)) for seconds, tokens, bpb in parts]


@dataclass(frozen=True)
class Watched:
    """A finished command: its evaluations, and the seconds that they took."""

    points: list[CurvePoint]
    evaluating: float


def watch(command: Sequence[str], metrics: Path, log: Path, env: dict[str, str], cwd: Path) -> Watched:
    """Run a command that writes minimind's metrics.jsonl, and note when each evaluation appears in it. Raises
    ValueError if it fails."""
    points: list[CurvePoint] = []
    evaluating = 0.0
    seen = 0

    def look(elapsed: float) -> None:
        nonlocal evaluating, seen
        rows = _complete_lines(metrics)
        for row in map(json.loads, rows[seen:]):
            if row["kind"] == "eval":
                evaluating += row["time"]["seconds"]
                points.append(point_of(row, elapsed - evaluating))
        seen = len(rows)

    run_and_poll(command, log, env, cwd, look)
    return Watched(points, evaluating)


def run_and_poll(
    command: Sequence[str], log: Path, env: dict[str, str], cwd: Path, look: Callable[[float], None]
) -> float:
    """Run a command, its output in `log`; look(seconds since its start) is called all the time. Returns the seconds
    that it took. Raises ValueError if it fails."""
    with log.open("w", encoding="utf-8") as file:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, env=env)
        try:
            while True:
                ended = process.poll() is not None
                look(time.perf_counter() - began)
                if ended:
                    break
                time.sleep(POLL)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        raise ValueError(f"{' '.join(command[:3])} ended with status {process.returncode}; see the end of {log}")
    return time.perf_counter() - began


def point_of(row: dict[str, Any], seconds: float) -> CurvePoint:
    """The point of a row of kind eval in metrics.jsonl."""
    return CurvePoint(seconds, row["tokens"], row["heldout_bpb"], row["heldout_loss"], row.get("heldout_exact"))


def _complete_lines(path: Path) -> list[str]:
    """The lines of a file that is being written, without an unfinished last one."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def seconds_to(row: TimeToLossRow, target: float) -> float | None:
    """Seconds until the run's held-out loss was `target` bits per byte, interpolated linearly between its evaluations;
    None if it never was."""
    points = [(seconds, bpb) for seconds, _, bpb in read_curve(row.curve)]
    if points[0][1] <= target:
        return points[0][0]
    for (before, high), (after, low) in pairwise(points):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None


def groups_of(rows: Sequence[TimeToLossRow]) -> list[list[TimeToLossRow]]:
    """The rows of one commit that differ in the seed alone, in order of their first."""
    groups: dict[Any, list[TimeToLossRow]] = {}
    for row in rows:
        groups.setdefault((row.implementation, row.lr, row.minutes, row.commit), []).append(row)
    return list(groups.values())


def mean_bpb(group: Sequence[TimeToLossRow]) -> float:
    return statistics.fmean(row.heldout_bpb for row in group)


def targets_of(rows: Sequence[TimeToLossRow]) -> dict[str, tuple[float, float]]:
    """name -> (bits per byte, seconds), means over seeds of what others reach at their end: upstream's recipe, and
    transformers with AdamW at its best rate. `rows` are of one stage, file and preset."""
    groups = groups_of(rows)
    targets = {}
    for names in (("upstream",), ("upstream-style",), ("hf", "hf-eager")):
        own = [group for group in groups if group[0].implementation in names]
        if own:
            best = min(own, key=mean_bpb)
            targets[best[0].implementation] = mean_bpb(best), statistics.fmean(row.seconds for row in best)
    return targets


def table_of(rows: Sequence[TimeToLossRow]) -> Table:
    """A table of the rows of one stage, file and preset."""
    first, targets = rows[0], targets_of(rows)
    caption = "s to NAME's X: seconds until the held-out loss is what NAME ends with; ratio to the time that NAME took"
    table = Table(title=f"{first.stage}, {first.data}, {first.preset}", caption=caption)
    table.add_column("implementation")
    heads = ["rate", "seeds", "planned min", "steps", "seconds", "bits/byte", "from-to", "exact"]
    heads += [f"s to {name}'s {bpb:.3f}" for name, (bpb, _) in targets.items()]
    for head in heads:
        table.add_column(head, justify="right")
    for group in groups_of(rows):
        one, losses = group[0], [row.heldout_bpb for row in group]
        exact = [row.exact for row in group if row.exact is not None]
        table.add_row(
            one.implementation, "" if one.lr is None else f"{one.lr:g}", str(len(group)), f"{one.minutes:g}",
            str(one.steps), f"{statistics.fmean(row.seconds for row in group):.1f}", f"{mean_bpb(group):.3f}",
            f"{min(losses):.3f}-{max(losses):.3f}", f"{statistics.fmean(exact):.1%}" if exact else "",
            *(reach_text(group, *target) for target in targets.values()),
        )  # fmt: skip
    return table


def reach(group: Sequence[TimeToLossRow], bpb: float) -> float | None:
    """Mean seconds to the target over seeds; None unless every seed reached it."""
    seconds = [found for row in group if (found := seconds_to(row, bpb)) is not None]
    return statistics.fmean(seconds) if len(seconds) == len(group) else None


def reach_text(group: Sequence[TimeToLossRow], bpb: float, seconds: float) -> str:
    """The seconds to a target, and how many times as fast that is as the implementation whose end it is."""
    taken = reach(group, bpb)
    if taken is None:
        reached = sum(seconds_to(row, bpb) is not None for row in group)
        return f"{reached} of {len(group)} seeds" if reached else "not reached"
    return f"{taken:.1f}, {seconds / max(taken, 1e-9):.1f}x"


def plot(rows: Sequence[TimeToLossRow], path: Path) -> None:
    """Bits per byte over seconds, and below over positions: a column for each stage and file, a colour for each
    implementation, a line for each seed. Of each stage and file the newest commit's rows are drawn."""
    newest = {(row.stage, row.data, row.preset): row.commit for row in rows}
    rows = [row for row in rows if row.commit == newest[row.stage, row.data, row.preset]]
    kinds = list(dict.fromkeys((row.stage, row.data, row.preset) for row in rows))
    figure, axes = plt.subplots(2, len(kinds), figsize=(5.6 * len(kinds), 7.6), squeeze=False, layout="constrained")
    for column, kind in enumerate(kinds):
        own = [row for row in rows if (row.stage, row.data, row.preset) == kind]
        for number, group in enumerate(groups_of(own)):
            one = group[0]
            colour, line = COLOURS[one.implementation], LINES[number % len(LINES)]
            name = f"{one.implementation}{'' if one.lr is None else f' {one.lr:g}'}, {one.minutes:g} min"
            for row in group:
                label = f"{name}: {mean_bpb(group):.3f}" if row is one else None
                style = {"color": colour, "linestyle": line, "linewidth": 1.3, "marker": ".", "label": label}
                points = [p for p in read_curve(row.curve) if p[1] > 0]
                axes[0, column].plot([p[0] for p in points], [p[2] for p in points], **style)
                axes[1, column].plot([p[1] for p in points], [p[2] for p in points], **style)
        for axis, unit in ((axes[0, column], "seconds of the command, without evaluations"),
                           (axes[1, column], "positions trained on, padding included")):  # fmt: skip
            for bpb, _ in targets_of(own).values():
                axis.axhline(bpb, color="gray", linewidth=0.8, linestyle=":")
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(axis="x", labelsize=8)
            axis.set_xlabel(unit, fontsize=9)
            hide_frame(axis)
        lines = math.ceil(len(groups_of(own)) / 2)
        axes[0, column].set_title(plain(", ".join(kind)), fontsize=10, pad=12 + 11 * lines)
        axes[0, column].legend(fontsize=7, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for row_axes in axes:
        row_axes[0].set_ylabel("held-out bits per byte", fontsize=9)
    save(figure, path)
