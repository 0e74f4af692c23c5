"""What bench/throughput.py leaves behind: rows of a CSV, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from bench.kernel_report import columns_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Row:
    """One contender. tokens_per_second counts real tokens, positions_per_second padding too; p20 and p80 are what 20
    and 80 of a hundred steps stay below. peak_mib: allocated, or resident on a CPU. utilisation: the model's operations
    over what one large product of this device reaches. loader_share: of the time, spent waiting for data."""

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
    steps: int
    tokens_per_second: float
    positions_per_second: float
    step_seconds: float
    p20: float
    p80: float
    peak_mib: float
    reserved_mib: float | None
    utilisation: float | None
    loader_share: float
    host_syncs: int | None
    graphs: int | None
    graph_breaks: int | None


COLUMNS = columns_of(Row)


def show(rows: Sequence[Row], console: Console) -> None:
    """One preset; ratios against the last row."""
    first, base = rows[0], rows[-1]
    table = Table(
        title=f"{first.stage}, {first.preset}, {first.rows} x {first.seq_len}, {first.data}, {first.device}",
        caption=f"ratios against {base.peer}; real: tokens learnt from; positions: with padding",
    )
    for column in ("", "real tokens/s", "ratio", "positions/s", "ratio", "step s, p20-p80", "peak MiB", "ratio",
                   "utilisation", "data", "syncs", "breaks"):  # fmt: skip
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row.peer,
            f"{row.tokens_per_second:,.0f}",
            f"{row.tokens_per_second / base.tokens_per_second:.2f}",
            f"{row.positions_per_second:,.0f}",
            f"{row.positions_per_second / base.positions_per_second:.2f}",
            f"{row.p20:.3g}-{row.p80:.3g}",
            f"{row.peak_mib:,.0f}",
            f"{row.peak_mib / base.peak_mib:.2f}",
            "" if row.utilisation is None else f"{row.utilisation:.0%}",
            f"{row.loader_share:.1%}",
            "" if row.host_syncs is None else str(row.host_syncs),
            "" if row.graph_breaks is None else str(row.graph_breaks),
        )
    console.print(table)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Real tokens/s, positions/s and peak memory of every contender, a row of panels a preset."""
    presets = list(dict.fromkeys(row.preset for row in rows))
    figure, axes = plt.subplots(
        len(presets), 3, figsize=(11, 1.3 + 0.34 * len(rows) + 0.5 * len(presets)), squeeze=False,
        layout="constrained", sharey="row",
        gridspec_kw={"height_ratios": [sum(r.preset == p for r in rows) for p in presets]},
    )  # fmt: skip
    panels = (
        ("real tokens/s", lambda r: r.tokens_per_second, "#1b6ca8"),
        ("positions/s, padding counted", lambda r: r.positions_per_second, "#5aa469"),
        ("peak memory, MiB", lambda r: r.peak_mib, "#8c8c8c"),
    )
    for preset, line in zip(presets, axes, strict=True):
        here = [row for row in rows if row.preset == preset]
        for axis, (title, value, colour) in zip(line, panels, strict=True):
            values = [value(row) for row in here]
            axis.barh(range(len(here)), values, 0.7, color=colour)
            for y, v in enumerate(values):
                axis.text(
                    v + 0.01 * max(values), y, f"{v:,.0f}, {v / values[-1]:.2f}x", va="center", fontsize=8
                )
            axis.set_yticks(range(len(here)), [row.peer for row in here], fontsize=9)
            axis.set_xlim(0, 1.35 * max(values))
            axis.set_title(title, fontsize=9, loc="left")
            axis.tick_params(axis="x", labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(preset, fontsize=10, fontweight="bold")
        line[0].invert_yaxis()
    first = rows[0]
    figure.suptitle(
        f"{first.stage}, {first.rows} x {first.seq_len}, {first.data}; {first.device}, {first.commit}",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
