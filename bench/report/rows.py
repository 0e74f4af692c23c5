"""The committed rows of bench/results/DEVICE, read back for the pages that are made of them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
TABLES = ("throughput", "rl", "decode", "decode_attention", "serving", "end_to_end", "kernels", "optimizers", "loader",
          "memory", "tuning")  # fmt: skip
RUN = {  # what two rows of one contender have in common where the newer replaces the older
    "throughput": ("stage", "preset", "data", "rows", "seq_len"),
    "rl": ("model", "prompts", "samples", "prompt", "new"),
    "decode": ("model", "weights", "prompt", "new", "batch"),
    "kernels": ("op", "shape", "tokens", "dtype", "phase"),
    "decode_attention": ("op", "shape", "tokens", "dtype", "phase"),
}
BASE = {"throughput": "upstream-style", "rl": "naive", "decode": "naive"}  # what ratios are against
Row = dict[str, str]


@dataclass(frozen=True)
class Device:
    """tables: the rows of each CSV, oldest first; state: campaign.json, what became of each slice."""

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
        """By its name, which of a CPU counts the threads (minimind/utils/device.py)."""
        return re.search(r", \d+ threads", self.name) is not None

    def runs(self, table: str) -> list[list[Row]]:
        """The newest row of every contender, in groups that measured the same thing."""
        groups: dict[tuple[str, ...], dict[str, Row]] = {}
        name = "contender" if table in ("kernels", "decode_attention") else "peer"
        for row in self.tables[table]:
            group = groups.setdefault(tuple(row[key] for key in RUN[table]), {})
            group.pop(row[name], None)  # the newest last
            group[row[name]] = row
        return [list(group.values()) for group in groups.values()]

    def base_of(self, table: str, row: Row) -> Row | None:
        """The contender that ratios are against, in the run in which `row` was measured."""
        same = (*RUN[table], "date", "commit")
        for other in self.tables[table]:
            if other["peer"] == BASE[table] and all(other[key] == row[key] for key in same):
                return other
        return None


def number(row: Row | None, column: str) -> float | None:
    """The cell as a number; None where there is no row, or nothing in the cell."""
    return float(row[column]) if row is not None and row.get(column) else None


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def rows_of(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def device_of(folder: Path, state: dict[str, dict[str, Any]] | None = None) -> Device:
    record = folder / "campaign.json"
    if state is None:
        state = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    return Device(folder, {name: rows_of(folder / f"{name}.csv") for name in TABLES}, state)


def devices(results: Path = RESULTS) -> list[Device]:
    """GPUs first, each kind by name."""
    found = [device_of(folder) for folder in sorted(results.iterdir()) if folder.is_dir()]
    kept = [device for device in found if any(device.tables.values())]
    return sorted(kept, key=lambda device: (device.is_cpu, device.name))


def find(rows: Sequence[Row], /, **wanted: str) -> Row | None:
    """The newest row with these cells."""
    return next((row for row in reversed(rows) if all(row[k] == v for k, v in wanted.items())), None)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit
