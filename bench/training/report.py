"""What bench/throughput.py leaves behind: rows of a CSV, a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from bench.operators.report import columns_of
from bench.training.stages import Padding
from minimind.utils.display import caption

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class ThroughputRow:
    """One contender. tokens_per_second counts real tokens, positions_per_second padding too, whose share is `padding`;
    p20 and p80 are what 20 and 80 of a hundred steps stay below. rows, seq_len: of upstream's batch. peak_mib:
    allocated, or resident on a CPU, compilation included (bench/common/timing.py). utilisation: the model's operations over
    what one large product of this device reaches. loader_share: of the time, spent waiting for data. once_seconds: for
    the batch of a step, what is done once for the data before the first step, and is not in the step's time.
    attention: whose, as minimind.ops.attention.attention_name says; sdpa: PyTorch's on rows of one sequence, the
    kernels that it chose itself. Empty in rows from before it was noted."""

    date: str
    commit: str | None
    device: str
    torch: str | None
    triton: str | None
    stage: str
    preset: str
    data: str
    rows: int
    seq_len: int
    peer: str
    optimizer: str
    attention: str
    steps: int
    tokens_per_second: float
    positions_per_second: float
    step_seconds: float
    p20: float
    p80: float
    peak_mib: float | None
    reserved_mib: float | None
    utilisation: float | None
    loader_share: float
    host_syncs: int | None
    graphs: int | None
    graph_breaks: int | None
    padding: float
    once_seconds: float | None


COLUMNS = columns_of(ThroughputRow)


def _ratio(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value / base:.2f}"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# Columns of the table: heading, and the cell of a row beside the one that ratios are against.
_CELLS: tuple[tuple[str, Callable[[ThroughputRow, ThroughputRow], str]], ...] = (
    ("", lambda row, base: row.peer),
    ("attention", lambda row, base: row.attention),
    ("real tokens/s", lambda row, base: f"{row.tokens_per_second:,.0f}"),
    ("ratio", lambda row, base: _ratio(row.tokens_per_second, base.tokens_per_second)),
    ("padding", lambda row, base: f"{row.padding:.1%}"),
    ("positions/s", lambda row, base: f"{row.positions_per_second:,.0f}"),
    ("ratio", lambda row, base: _ratio(row.positions_per_second, base.positions_per_second)),
    ("step s", lambda row, base: f"{row.step_seconds:.3g}"),
    ("p20-p80", lambda row, base: f"{row.p20:.3g}-{row.p80:.3g}"),
    ("once s", lambda row, base: _text(row.once_seconds, ".3g")),
    ("peak MiB", lambda row, base: _text(row.peak_mib, ",.0f")),
    ("ratio", lambda row, base: _ratio(row.peak_mib, base.peak_mib)),
    ("MFU", lambda row, base: _text(row.utilisation, ".0%")),
    ("data", lambda row, base: f"{row.loader_share:.1%}"),
    ("syncs", lambda row, base: _text(row.host_syncs, "d")),
    ("breaks", lambda row, base: _text(row.graph_breaks, "d")),
)


def show(rows: Sequence[ThroughputRow], padding: Padding, console: Console) -> None:
    """One stage and preset; ratios against the last row. padding: of all its data."""
    first, base = rows[0], rows[-1]
    table = Table(
        title=f"{first.stage}, {first.preset}, {first.rows} x {first.seq_len}, {first.data}, {first.device}",
        caption=f"ratios against {base.peer}; real: no padding. Of all of {first.data}, rows of one sequence are "
        f"{padding.padded:.1%} padding, packed ones {padding.packed:.1%}: at equal positions/s worth "
        f"{(1 - padding.packed) / (1 - padding.padded):.2f} in real tokens/s",
    )
    columns = []
    for heading, cell in _CELLS:
        cells = [cell(row, base) for row in rows]
        if any(cells):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
            columns.append(cells)
    for line in zip(*columns, strict=True):
        table.add_row(*line)
    console.print(table)
    for row in rows:
        if row.once_seconds is not None:
            share = row.once_seconds / row.step_seconds
            rate = row.tokens_per_second / (1 + share)
            ratio = rate / base.tokens_per_second
            console.print(
                f"{row.peer}: the reference is worked out once for the data, {share:.0%} of a step for each batch; "
                f"with it, a single pass has {rate:,.0f} real tokens/s, {ratio:.2f} of {base.peer}",
                highlight=False,
                soft_wrap=True,
            )


def plot(rows: Sequence[ThroughputRow], path: Path) -> None:
    """Real tokens/s, positions/s and peak memory of every contender, a row of panels for each stage and preset."""
    groups = list(dict.fromkeys((row.stage, row.preset) for row in rows))
    found = {group: [row for row in rows if (row.stage, row.preset) == group] for group in groups}
    figure, axes = plt.subplots(
        len(groups),
        3,
        figsize=(11, 1.3 + 0.34 * len(rows) + 0.6 * len(groups)),
        squeeze=False,
        layout="constrained",
        sharey="row",
        gridspec_kw={"height_ratios": [len(found[group]) for group in groups]},
    )
    panels = (
        ("real tokens/s", lambda r: r.tokens_per_second, "#1b6ca8"),
        ("positions/s, padding counted", lambda r: r.positions_per_second, "#5aa469"),
        ("peak memory, MiB", lambda r: r.peak_mib or 0.0, "#8c8c8c"),
    )
    for (stage, preset), line in zip(groups, axes, strict=True):
        here = found[stage, preset]
        for axis, (title, value, colour) in zip(line, panels, strict=True):
            _bars(axis, [value(row) for row in here], [row.peer for row in here], colour)
            axis.set_title(title, fontsize=9, loc="left")
        line[0].set_ylabel(f"{stage}\n{preset}", fontsize=9, fontweight="bold")
        line[0].invert_yaxis()
    first = rows[0]
    data = ", ".join(dict.fromkeys(f"{row.stage} {row.rows} x {row.seq_len} of {caption(row.data)}" for row in rows))
    figure.suptitle(f"{data}; {first.device}, {first.commit}", fontsize=9, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis: Any, values: Sequence[float], names: Sequence[str], colour: str) -> None:
    """Each with its value, and its ratio to the last."""
    axis.barh(range(len(values)), values, 0.7, color=colour)
    for y, value in enumerate(values):
        ratio = f", {value / values[-1]:.2f}x" if values[-1] else ""
        axis.text(value + 0.01 * max(values), y, f"{value:,.0f}{ratio}", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_xlim(0, 1.35 * max(*values, 1e-9))
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
