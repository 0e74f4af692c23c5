"""The time of a piece of MiniMind as a ratio to that of a reference workload, held against committed ratios.

A time belongs to one processor. The ratio of two times that are taken in turns in one process holds across processors
much better, and does not see a machine that is busy or clocks down for a while.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

BASELINE = Path(__file__).parent / "baseline.json"
ALLOWED = 1.5  # of a new entry; the README has the spread that it stands above

Against = Callable[..., None]  # see the fixture in conftest.py
Verdict = Literal["ok", "better", "WORSE", "NOT IN THE BASELINE", "not run"]
FAILURES: tuple[Verdict, ...] = ("WORSE", "NOT IN THE BASELINE")


@dataclass(frozen=True)
class Entry:
    """A committed ratio: a run whose ratio is more than `allowed` times as large has become slower.

    reference: what the subject is timed beside. processor: where the ratio was taken.
    """

    ratio: float
    allowed: float
    reference: str
    processor: str


@dataclass(frozen=True)
class Measurement:
    """Medians in seconds, and the ratio."""

    reference: str
    subject_seconds: float
    reference_seconds: float
    ratio: float


@dataclass(frozen=True)
class RatioRow:
    """What was measured, what is committed, and what follows. change: the new ratio over the committed one."""

    name: str
    measured: Measurement | None
    entry: Entry | None

    @property
    def change(self) -> float | None:
        if self.measured is None or self.entry is None:
            return None
        return self.measured.ratio / self.entry.ratio

    @property
    def verdict(self) -> Verdict:
        if self.measured is None:
            return "not run"
        if self.entry is None:
            return "NOT IN THE BASELINE"
        change = self.measured.ratio / self.entry.ratio
        if change > self.entry.allowed:
            return "WORSE"
        return "better" if change < 1 / self.entry.allowed else "ok"


def times(count: int, function: Callable[[], Any]) -> Callable[[], None]:
    """`function` so often in a row: a round takes some milliseconds, whatever is timed."""

    def run() -> None:
        for _ in range(count):
            function()

    return run


def measurement(reference: str, subject: Sequence[float], beside: Sequence[float]) -> Measurement:
    """Of rounds in which reference and subject took turns: seconds of each in `beside` and `subject`."""
    rounds = [mine / theirs for mine, theirs in zip(subject, beside, strict=True)]
    times = statistics.median(subject), statistics.median(beside)
    return Measurement(reference, *times, statistics.median(rounds))


def compare(measured: Mapping[str, Measurement], baseline: Mapping[str, Entry]) -> list[RatioRow]:
    """A row for every name of either, sorted."""
    names = sorted({*measured, *baseline})
    return [RatioRow(name, measured.get(name), baseline.get(name)) for name in names]


def failures(rows: Sequence[RatioRow]) -> list[RatioRow]:
    return [row for row in rows if row.verdict in FAILURES]


def read(path: Path = BASELINE) -> dict[str, Entry]:
    """Empty where there is no file. ValueError for one that is not a baseline."""
    if not path.exists():
        return {}
    try:
        return {name: Entry(**fields) for name, fields in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a baseline ({error}); --rewrite-baseline writes a new one") from None


def rewrite(path: Path, measured: Mapping[str, Measurement], processor: str) -> None:
    """Put the measured ratios into the file. What was not measured stays, and so does what an entry allows."""
    entries = read(path)
    for name, found in measured.items():
        allowed = entries[name].allowed if name in entries else ALLOWED
        entries[name] = Entry(float(f"{found.ratio:.3g}"), allowed, found.reference, processor)
    content = {name: asdict(entries[name]) for name in sorted(entries)}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(rows: Sequence[RatioRow]) -> list[str]:
    """Lines of text: a head, a line for each measured row, and the names of the others."""
    head = ("benchmark", "ms", "reference ms", "ratio", "baseline", "change", "allowed", "verdict")
    cells = [head, *(_cells(row, found) for row in rows if (found := row.measured))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    run = {_benchmark(row.name) for row in rows if row.measured}
    missing = ", ".join(row.name for row in rows if _benchmark(row.name) not in run)
    return [_line(line, widths) for line in cells] + ([f"not run: {missing}"] if missing else [])


def _benchmark(name: str) -> str:
    """Without the variant: that of another processor's instructions is not missed."""
    return name.partition(" ")[0]


def _cells(row: RatioRow, found: Measurement) -> tuple[str, ...]:
    entry, change = row.entry, row.change
    times = [f"{seconds * 1e3:.2f}" for seconds in (found.subject_seconds, found.reference_seconds)]
    committed = ["", "", ""]
    if entry is not None and change is not None:
        committed = [f"{entry.ratio:.3g}", f"{change:.2f}x", f"{entry.allowed:g}x"]
    return (row.name, *times, f"{found.ratio:.3g}", *committed, row.verdict)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *numbers, last = cells
    middle = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
    return "  ".join((first.ljust(widths[0]), *middle, last)).rstrip()
