"""The rows, the table and the picture of bench/kernels.py and bench/decode_attention.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common.plots import hide_frame, plt, save
from bench.common.record import Row

COLOURS = {"minimind": "#1b6ca8", "eager": "#8c8c8c", "compiled": "#d98324", "native": "#5aa469", "liger": "#a05195"}
LONGEST = 6.0  # times ours; longer bars are cut there


@dataclass(frozen=True)
class KernelRow(Row):
    """One implementation (the column `contender`) in one pass of one case.

    status: ok; refused (its error is too large) or failed, with the reason. milliseconds: the median, with its 20th and
    80th percentile. rate: in `unit`; share: of the rate that this device reaches. ratio: time / our time. error_ratio:
    2 or less passes (bench/operators/parity.py).
    """

    torch: str | None
    triton: str | None
    liger: str | None
    op: str
    preset: str
    shape: str
    tokens: int
    dtype: str
    phase: str
    contender: str
    status: str
    reason: str = ""
    milliseconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    runs: int | None = None
    peak_mib: float | None = None
    rate: float | None = None
    unit: str = ""
    share: float | None = None
    ratio: float | None = None
    error_ratio: float | None = None


def show(rows: Sequence[KernelRow], console: Console) -> None:
    """A table of one case."""
    first = rows[0]
    table = Table(title=f"{first.op}, {first.shape} ({first.preset}), {first.tokens:,} tokens, {first.dtype}")
    for column in ("pass", "implementation"):
        table.add_column(column, no_wrap=True)
    unit = next((row.unit for row in rows if row.unit), "rate")
    for column in ("ms", "p20-p80", "ours = 1", unit, "of limit", "peak MiB", "error"):
        table.add_column(column, justify="right")
    for phase in dict.fromkeys(row.phase for row in rows):
        for i, row in enumerate(r for r in rows if r.phase == phase):
            table.add_row(phase if i == 0 else "", row.contender, *_cells(row))
        table.add_section()
    console.print(table)
    for row in rows:
        if row.status != "ok" and row.phase == "both":
            console.print(f"{row.contender} {row.status}: {row.reason}", style="red", highlight=False)


def _cells(row: KernelRow) -> list[str]:
    error = "" if row.error_ratio is None else f"{row.error_ratio:.2g}"
    if row.milliseconds is None:
        return [f"[red]{row.status}", "", "", "", "", "", error]
    return [
        f"{row.milliseconds:.4g}",
        f"{row.p20:.4g}-{row.p80:.4g}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.rate is None else f"{row.rate:,.3g}",
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.peak_mib is None else f"{row.peak_mib:,.0f}",
        error,
    ]


def plot(rows: Sequence[KernelRow], path: Path) -> None:
    """Time of forward plus backward relative to ours: a panel for each op, a group of bars for each case."""
    rows = [row for row in rows if row.phase == "both"]
    ops = list(dict.fromkeys(row.op for row in rows))
    names = [name for name in COLOURS if any(row.contender == name for row in rows)]
    groups = {op: list(dict.fromkeys((row.shape, row.tokens) for row in rows if row.op == op)) for op in ops}
    heights = [len(names) * len(groups[op]) for op in ops]
    figure, axes = plt.subplots(
        len(ops),
        1,
        figsize=(9, 1.2 + 0.19 * sum(heights) + 0.75 * len(ops)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axis, op in zip(axes[:, 0], ops, strict=True):
        _panel(axis, [row for row in rows if row.op == op], groups[op], names)
        axis.set_title(op, loc="left", fontsize=10, fontweight="bold")
    axes[-1, 0].set_xlabel("time of forward and backward, ours = 1; longer is slower", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), fontsize=9, frameon=False)
    save(figure, path, f"{rows[0].device}, {rows[0].dtype}, {rows[0].commit}")


def _panel(axis: Any, rows: Sequence[KernelRow], groups: Sequence[tuple[str, int]], names: Sequence[str]) -> None:
    thickness = 0.8 / len(names)
    edge = min(LONGEST, max([1.0, *(row.ratio for row in rows if row.ratio is not None)]))
    for g, group in enumerate(groups):
        by_name = {row.contender: row for row in rows if (row.shape, row.tokens) == group}
        for n, name in enumerate(names):
            if name not in by_name:
                continue
            row, y = by_name[name], g + (n - (len(names) - 1) / 2) * thickness
            length = min(edge, row.ratio or 0.0)
            text = row.status if row.milliseconds is None else f"{row.milliseconds:.3g} ms"
            if row.ratio is not None:
                axis.barh(y, length, thickness * 0.9, color=COLOURS[name])
                text = f"{row.ratio:.2f}x, {text}"
            axis.text(
                length + 0.01 * edge,
                y,
                text,
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    axis.set_yticks(range(len(groups)), [f"{shape}\n{tokens:,} tokens" for shape, tokens in groups], fontsize=8)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlim(0, 1.18 * edge)
    axis.axvline(1.0, color="black", linewidth=0.8, zorder=1.5)
    axis.tick_params(axis="x", labelsize=8)
    hide_frame(axis)
