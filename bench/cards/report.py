"""The results of bench/card.py: a line for each task, a table of the lines, and an archive of all files."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report.rows import markdown
from minimind.utils.files import write_atomically

LARGEST = 6 << 20  # bytes of a file in the archive: logs, rows and traces, but no weights
TABLE = "card.md"
HEAD = ("task", "state", "seconds", "result")


def result_line(log: Path, telling: Sequence[str] = ()) -> str:
    """A task's result in one line: the last lines with the words of `telling`; or the figures of the rows, if a
    benchmark ended with its JSON; or the last line of the output."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    matches = [next((line.strip() for line in reversed(lines) if words in line), "") for words in telling]
    if any(matches):
        return "; ".join(filter(None, matches))[:300]
    for line in reversed(lines):
        with suppress(ValueError, AttributeError):
            result = json.loads(line) if line.startswith("{") else {}
            rows = result.get("rows") or ([result] if "tokens_per_second" in result else [])
            if rows:
                return "; ".join((figures(rows), *left_out(lines)))[:300]
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def left_out(lines: Sequence[str]) -> list[str]:
    """The implementations that could not run; the rows do not have them."""
    matches = [re.search(r"\bwithout ([\w.-]+): ", line) for line in lines]
    return [f"without {match[1]}" for match in matches if match]


def figures(rows: Sequence[dict[str, Any]]) -> str:
    """For kernels, the time of each implementation divided by ours, forward and backward; for others, the rate."""
    parts = []
    for row in rows:
        name = row.get("peer") or row.get("contender") or row.get("stage") or row.get("model") or ""
        status = row.get("status", "ok")
        if status != "ok":
            parts.append(f"{row.get('op', '')} {name} {status}".strip())
        elif "contender" not in row:
            rate = row.get("positions_per_second") or row.get("tokens_per_second") or 0.0
            parts.append(f"{name} {rate:,.0f}/s".strip())
        elif (row["phase"] == "both" or row["op"] == "decode_attention") and row.get("ratio") and name != "minimind":
            parts.append(f"{row['op']} {name} {row['ratio']:.2f}x")
    return "; ".join(dict.fromkeys(parts))


def lines_of(state: dict[str, dict[str, Any]], names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """(name, state, seconds, result) of each task."""
    lines = []
    for name in names:
        entry = state[name]
        seconds = "" if entry.get("seconds") is None else f"{entry['seconds']:.0f}"
        lines.append((name, entry["state"], seconds, entry.get("said", "")))
    return lines


def show(lines: Sequence[tuple[str, ...]], console: Console) -> None:
    table = Table(*HEAD)
    table.columns[2].justify = "right"
    for line in lines:
        table.add_row(*(cell.replace("[", r"\[") for cell in line))
    console.print(table)


def write_table(path: Path, lines: Sequence[tuple[str, ...]]) -> None:
    body = [[cell.replace("|", "/") for cell in line] for line in lines]
    path.write_text(markdown(HEAD, body) + "\n", encoding="utf-8")


def pack(folder: Path, archive: Path) -> list[str]:
    """Write all files of `folder` into `archive` at once; return the names of those that are too large for it."""
    buffer, too_large = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as tar:
        for path in sorted(folder.rglob("*")):
            with suppress(OSError):  # a running task may remove its files
                if not path.is_file():
                    continue
                name = str(path.relative_to(folder))
                if path.stat().st_size > LARGEST:
                    too_large.append(name)
                    continue
                data = path.read_bytes()  # before its size, since it may grow
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
                tar.addfile(entry, io.BytesIO(data))
    write_atomically(archive, buffer.getvalue())
    return too_large


def unpack(archive: Path, folder: Path) -> None:
    """Restore the files of an earlier call."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
