"""Read the committed rows of bench/results/DEVICE, for the pages that are made from them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.record import RESULTS

TABLES = ("throughput", "rl", "decode", "decode_attention", "serving", "end_to_end", "time_to_loss", "kernels",
          "optimizers", "loader", "memory", "tuning")  # fmt: skip
RUN = {  # columns that are equal in two rows of one implementation if the newer replaces the older
    "throughput": ("stage", "preset", "data", "rows", "seq_len"),
    "rl": ("model", "prompts", "samples", "prompt", "new"),
    "decode": ("model", "weights", "prompt", "new", "batch"),
    "kernels": ("op", "shape", "tokens", "dtype", "phase"),
    "decode_attention": ("op", "shape", "tokens", "dtype", "phase"),
}
BASE = {"throughput": "upstream-style", "rl": "naive", "decode": "naive"}  # ratios are against these
Row = dict[str, str]


@dataclass(frozen=True)
class Device:
    """tables: the rows of each CSV, oldest first. state: card.json of bench/card.py, the outcome of each task."""

    folder: Path
    tables: dict[str, list[Row]]
    state: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        rows = [row for table in ("throughput", "decode", "kernels") for row in self.tables[table]]
        rows += [row for table in self.tables.values() for row in table]
        return rows[0]["device"] if rows else self.folder.name

    @property
    def is_cpu(self) -> bool:
        """The name of a CPU has its number of threads (minimind/utils/device.py)."""
        return re.search(r", \d+ threads", self.name) is not None

    def runs(self, table: str) -> list[list[Row]]:
        """The newest row of every implementation, in groups that measured the same thing."""
        groups: dict[tuple[str, ...], dict[str, Row]] = {}
        name = "contender" if table in ("kernels", "decode_attention") else "peer"
        for row in self.tables[table]:
            group = groups.setdefault(tuple(row[key] for key in RUN[table]), {})
            group.pop(row[name], None)  # the newest last
            group[row[name]] = row
        return [list(group.values()) for group in groups.values()]

    def base_of(self, table: str, row: Row) -> Row | None:
        """The row of the same run that ratios are against."""
        same = (*RUN[table], "date", "commit")
        for other in self.tables[table]:
            if other["peer"] == BASE[table] and all(other[key] == row[key] for key in same):
                return other
        return None


def number(row: Row | None, column: str) -> float | None:
    """The cell as a number; None if there is no row or the cell is empty."""
    return float(row[column]) if row is not None and row.get(column) else None


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def rows_of(path: Path) -> list[Row]:
    """The rows of a CSV file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def device_of(folder: Path) -> Device:
    """The device of a folder of bench/results."""
    record = folder / "card.json"
    state = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    return Device(folder, {name: rows_of(folder / f"{name}.csv") for name in TABLES}, state)


def devices(results: Path = RESULTS) -> list[Device]:
    """All devices with rows, GPUs first, then by name."""
    every = [device_of(folder) for folder in sorted(results.iterdir()) if folder.is_dir()]
    with_rows = [device for device in every if any(device.tables.values())]
    return sorted(with_rows, key=lambda device: (device.is_cpu, device.name))


def find(rows: Sequence[Row], /, **wanted: str) -> Row | None:
    """The newest row with these cells."""
    return next((row for row in reversed(rows) if all(row[k] == v for k, v in wanted.items())), None)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ("---",) * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    """A cell of a table; empty for None."""
    return "" if value is None else format(value, form) + unit
