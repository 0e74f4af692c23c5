"""Rows of measurements with their date, commit and device, appended to the tables under bench/results."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minimind.utils.device import describe_device

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """The first columns of every table: the date, commit and device of a measurement."""

    date: str
    commit: str | None
    device: str


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def stamp(device: torch.device, *packages: str) -> dict[str, Any]:
    """The columns of `Row` for a measurement made now, and the versions of `packages`."""
    from minimind.training.run_folder import versions  # imports the operators, which bench/host_time.py does itself

    installed = versions(describe_device(device))
    return {"date": now(), **{name: installed[name] for name in ("commit", "device", *packages)}}


def package_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def slug(device: str) -> str:
    """The folder name of a device: 'NVIDIA A100-SXM4-80GB, 79 GiB' -> 'nvidia-a100-sxm4-80gb-79-gib'."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def results_folder(out: str | None, device: str) -> Path:
    """The folder that --out names, or the folder of this device."""
    return Path(out) if out else RESULTS / slug(device)


def columns_of(kind: Any) -> list[str]:
    """The columns of a table whose rows are of the dataclass `kind`."""
    return [field.name for field in dataclasses.fields(kind)]


def check_columns(path: Path, kind: Any) -> None:
    """Raise ValueError if rows of the dataclass `kind` cannot be added to `path`. Call it before measuring anything."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not os.access(existing, os.W_OK) or (existing != path and not existing.is_dir()):
        raise ValueError(f"{path}: cannot be written ({existing}); name another folder with --out")
    if existing != path:
        return
    with path.open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(file), [])
    columns = columns_of(kind)
    if header != columns:
        changed = sorted(set(header) ^ set(columns)) or ["their order"]
        raise ValueError(
            f"{path}: its columns are not those of this version ({', '.join(changed)}); rename the file to keep its "
            "rows, or name another folder with --out"
        )


def append(path: Path, rows: Sequence[Any]) -> None:
    """Add rows, dataclasses of one kind, to a CSV file; a new file gets a header first."""
    check_columns(path, rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns_of(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows({name: _rounded(value) for name, value in dataclasses.asdict(row).items()} for row in rows)


def as_dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows as dicts, for JSON."""
    return [dataclasses.asdict(row) for row in rows]


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
