"""campaign.md: what a device was asked and answered, as tables."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def summary(folder: Path, stamp: dict[str, Any], state: dict[str, dict[str, Any]]) -> str:
    """Markdown from campaign.json's state and the newest rows of throughput.csv and kernels.csv in `folder`."""
    parts = [
        f"# {stamp['device']}",
        f"torch {stamp['torch']}, triton {stamp['triton']}, Python {stamp['python']}. Written by bench/campaign.py: "
        "every number is measured on this device at the commit beside it.",
        "## Slices",
        _table(
            ("slice", "outcome", "seconds", "commit"),
            [(name, row["status"], f"{row['seconds']:g}", row["commit"]) for name, row in state.items()],
        ),
    ]
    throughput = _rows(folder / "throughput.csv")
    if throughput:
        parts += ["## Training", _throughput(throughput)]
    kernels = [r for r in _rows(folder / "kernels.csv") if r["phase"] == "both"]
    if kernels:
        parts += ["## Ops, forward and backward", _kernels(kernels)]
    return "\n\n".join(parts) + "\n"


def _throughput(rows: list[dict[str, str]]) -> str:
    newest = _newest(rows, ("stage", "preset", "rows", "seq_len", "data", "peer"))
    body = [
        (
            r["stage"], r["preset"], f"{r['rows']} x {r['seq_len']}, {r['data']}", r["peer"],
            f"{float(r['tokens_per_second']):,.0f}",
            f"{float(r['positions_per_second']):,.0f}", f"{float(r['peak_mib']):,.0f}" if r["peak_mib"] else "",
            f"{float(r['utilisation']):.0%}" if r["utilisation"] else "", r["host_syncs"], r["graph_breaks"],
            r["commit"],
        )
        for r in newest
    ]  # fmt: skip
    head = (
        "stage",
        "model",
        "batch",
        "peer",
        "real tokens/s",
        "positions/s",
        "peak MiB",
        "utilisation",
        "syncs",
        "breaks",
        "commit",
    )
    return _table(head, body)


def _kernels(rows: list[dict[str, str]]) -> str:
    newest = _newest(rows, ("op", "shape", "tokens", "dtype", "contender"))
    body = [
        (
            r["op"], r["shape"], f"{int(r['tokens']):,}", r["contender"],
            f"{float(r['milliseconds']):.3g}" if r["milliseconds"] else r["status"],
            f"{float(r['ratio']):.2f}" if r["ratio"] else "", f"{float(r['share']):.0%}" if r["share"] else "",
            f"{float(r['peak_mib']):,.0f}" if r["peak_mib"] else "", r["commit"],
        )
        for r in newest
    ]  # fmt: skip
    return _table(
        ("op", "shape", "tokens", "contender", "ms", "ours = 1", "of limit", "peak MiB", "commit"), body
    )


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _newest(rows: list[dict[str, str]], key: tuple[str, ...]) -> list[dict[str, str]]:
    """The last row of each key: files only grow at their end."""
    return list({tuple(row[name] for name in key): row for row in rows}.values())


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
