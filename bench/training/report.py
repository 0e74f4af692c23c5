"""The rows, the table and the picture of bench/throughput.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.common.plots import bars, plt, save
from bench.common.record import Row
from bench.training.stages import Padding
from minimind.utils.display import caption


@dataclass(frozen=True)
class ThroughputRow(Row):
    """One implementation.

    rows, seq_len: size of upstream's batch. tokens_per_second: without padding; positions_per_second: with it; padding:
    its share. step_seconds: the median, with its 20th and 80th percentile. peak_mib: allocated on a GPU, resident on a
    CPU, compilation included. utilisation: the model's operations per second, as a share of those of one large product
    on this device. loader_share: share of the time spent waiting for data. once_seconds: time for a step's batch of
    work that is done once for the data set, before the first step, and is not part of the step's time. attention: the
    implementation, as minimind.ops.attention.attention_name names it, or sdpa, PyTorch's own choice for rows of one
    sequence; empty in rows from before it was recorded.
    """

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


def _ratio(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value / base:.2f}"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# Columns of the table: the heading, and the cell of a row given the row that ratios are against.
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
    """A table of one stage and preset; ratios are against the last row. padding: counted over all of its data."""
    first, base = rows[0], rows[-1]
    table = Table(
        title=f"{first.stage}, {first.preset}, {first.rows} x {first.seq_len}, {first.data}, {first.device}",
        caption=f"ratios against {base.peer}; real: without padding. Over all of {first.data}, rows of one sequence "
        f"are {padding.padded:.1%} padding and packed rows {padding.packed:.1%}: at equal positions/s, packing gives "
        f"{(1 - padding.packed) / (1 - padding.padded):.2f} times the real tokens/s",
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
                f"{row.peer}: the reference's log-probabilities are computed once for the data set, which takes "
                f"{share:.0%} of a step for each batch; with that, a single pass over the data reaches {rate:,.0f} "
                f"real tokens/s, {ratio:.2f} times {base.peer}",
                highlight=False,
                soft_wrap=True,
            )


def plot(rows: Sequence[ThroughputRow], path: Path) -> None:
    """Real tokens/s, positions/s and peak memory; a row of panels for each stage and preset."""
    groups = list(dict.fromkeys((row.stage, row.preset) for row in rows))
    rows_of = {group: [row for row in rows if (row.stage, row.preset) == group] for group in groups}
    figure, axes = plt.subplots(
        len(groups),
        3,
        figsize=(11, 1.3 + 0.34 * len(rows) + 0.6 * len(groups)),
        squeeze=False,
        layout="constrained",
        sharey="row",
        gridspec_kw={"height_ratios": [len(rows_of[group]) for group in groups]},
    )
    panels = (
        ("real tokens/s", lambda r: r.tokens_per_second, "#1b6ca8"),
        ("positions/s, padding included", lambda r: r.positions_per_second, "#5aa469"),
        ("peak memory, MiB", lambda r: r.peak_mib or 0.0, "#8c8c8c"),
    )
    for (stage, preset), line in zip(groups, axes, strict=True):
        here = rows_of[stage, preset]
        for axis, (title, value, colour) in zip(line, panels, strict=True):
            bars(axis, title, [value(row) for row in here], [row.peer for row in here], colour)
        line[0].set_ylabel(f"{stage}\n{preset}", fontsize=9, fontweight="bold")
        line[0].invert_yaxis()
    first = rows[0]
    data = ", ".join(dict.fromkeys(f"{row.stage} {row.rows} x {row.seq_len} of {caption(row.data)}" for row in rows))
    save(figure, path, f"{data}; {first.device}, {first.commit}")
