"""What bench/kernels.py leaves behind: rows added to a CSV that is never rewritten, a table and a picture."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"minimind": "#1b6ca8", "eager": "#8c8c8c", "compiled": "#d98324", "native": "#5aa469", "liger": "#a05195"}
LONGEST = 6.0  # times ours: longer bars are cut there, their figure stands beside them


@dataclass(frozen=True)
class KernelRow:
    """One contender in one pass of one case. status: ok; refused, its numbers broke the contract; failed, and `reason`.
    milliseconds: the median, and what 20 and 80 of a hundred runs stay below. rate in `unit`, share of the measured
    limit of this device, ratio of its time to ours; error_ratio 2 or less keeps the contract."""

    date: str
    commit: str | None
    device: str
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


def columns_of(kind: Any) -> list[str]:
    """The columns for rows of this dataclass, or of one like this."""
    return [f.name for f in dataclasses.fields(kind)]


COLUMNS = columns_of(KernelRow)


def slug(device: str) -> str:
    """A folder's name for a device's: 'NVIDIA A100-SXM4-80GB, 79 GiB' -> 'nvidia-a100-sxm4-80gb-79-gib'."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def check_columns(path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Raises ValueError where `path` holds a table with other columns, or where it could not be written: before
    anything is measured for it."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        raise ValueError(f"{path}: cannot be written ({there}); name another folder with --out")
    if there != path:
        return
    with path.open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(file), [])
    if header != list(columns):
        changed = sorted(set(header) ^ set(columns)) or ["their order"]
        raise ValueError(
            f"{path}: its columns are not those of this version ({', '.join(changed)}); rename the file to keep its "
            "rows, or name another folder with --out"
        )


def append(path: Path, rows: Sequence[Any]) -> None:
    """Add rows, dataclasses of one kind, at the end; a new file begins with the columns' names."""
    columns = columns_of(rows[0])
    check_columns(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows({k: _rounded(v) for k, v in dataclasses.asdict(row).items()} for row in rows)


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def show(rows: Sequence[KernelRow], console: Console) -> None:
    """One case."""
    first = rows[0]
    table = Table(title=f"{first.op}, {first.shape} ({first.preset}), {first.tokens:,} tokens, {first.dtype}")
    for column in ("pass", "contender"):
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
    """Time relative to ours, forward and backward together: one panel an op, one group of bars a case."""
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
    first = rows[0]
    figure.suptitle(f"{first.device}, {first.dtype}, {first.commit}", fontsize=9, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axis, rows: Sequence[KernelRow], groups: Sequence[tuple[str, int]], names: Sequence[str]) -> None:
    thickness = 0.8 / len(names)
    edge = min(LONGEST, max([1.0, *(row.ratio for row in rows if row.ratio is not None)]))
    for g, group in enumerate(groups):
        found = {row.contender: row for row in rows if (row.shape, row.tokens) == group}
        for n, name in enumerate(names):
            if name not in found:
                continue
            row, y = found[name], g + (n - (len(names) - 1) / 2) * thickness
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
    axis.spines[["top", "right"]].set_visible(False)
