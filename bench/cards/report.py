"""What is left of a session on a card: a line for each question, a table of them, and all files in one archive."""

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

from bench.cards.running import last_line
from bench.report.rows import markdown
from minimind.utils.files import write_atomically

LARGEST = 6 << 20  # bytes of a file: weights stay behind, logs, rows and traces do not
TABLE = "card.md"
HEAD = ("question", "state", "seconds", "what it said last")


def said(log: Path, telling: Sequence[str] = ()) -> str:
    """One line: the last ones with the words of `telling`; the figures of the rows where a benchmark ended with its
    JSON; else the last line of the output."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    found = [next((line.strip() for line in reversed(lines) if words in line), "") for words in telling]
    if any(found):
        return "; ".join(filter(None, found))[:300]
    for line in reversed(lines):
        with suppress(ValueError, AttributeError):
            rows = json.loads(line).get("rows") if line.startswith("{") else None
            if rows:
                return "; ".join((figures(rows), *left_out(lines)))[:300]
    return last_line(log)


def left_out(lines: Sequence[str]) -> list[str]:
    """Contenders that could not run there: a table without them would not say so."""
    found = [re.search(r"\bwithout ([\w.-]+): ", line) for line in lines]
    return [f"without {match[1]}" for match in found if match]


def figures(rows: Sequence[dict[str, Any]]) -> str:
    """Of kernels, how many times as long as ours each contender takes, forward and backward; of others, their rate."""
    parts = []
    for row in rows:
        name, status = row.get("peer") or row.get("contender"), row.get("status", "ok")
        if status != "ok":
            parts.append(f"{row.get('op', '')} {name} {status}".strip())
        elif "contender" not in row:
            rate = row.get("positions_per_second") or row.get("tokens_per_second") or 0.0
            parts.append(f"{name} {rate:,.0f}/s")
        elif row["phase"] == "both" and row.get("ratio") and name != "minimind":
            parts.append(f"{row['op']} {name} {row['ratio']:.2f}x")
    return "; ".join(dict.fromkeys(parts))


def lines_of(state: dict[str, dict[str, Any]], names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    found = []
    for name in names:
        entry = state[name]
        seconds = "" if entry.get("seconds") is None else f"{entry['seconds']:.0f}"
        found.append((name, entry["state"], seconds, entry.get("said", "")))
    return found


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
    """All files of `folder` into `archive`, whole or not at all; returns the names of those too large for it."""
    buffer, left_out = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as tar:
        for path in sorted(folder.rglob("*")):
            with suppress(OSError):  # a question may remove its own files meanwhile
                if not path.is_file():
                    continue
                name = str(path.relative_to(folder))
                if path.stat().st_size > LARGEST:
                    left_out.append(name)
                    continue
                data = path.read_bytes()  # first, as it may grow
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
                tar.addfile(entry, io.BytesIO(data))
    write_atomically(archive, buffer.getvalue())
    return left_out


def unpack(archive: Path, folder: Path) -> None:
    """What an earlier session left."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
