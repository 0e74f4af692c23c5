"""Times of parts of MiniMind as ratios to the times of reference workloads, compared with committed ratios.

A time depends on the processor. The ratio of two times, measured alternately in one process, depends on it much less,
and hardly changes when the machine is busy or lowers its clock for a while.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

BASELINE = Path(__file__).parent / "baseline.json"
ALLOWED = 1.5  # for a new entry: above the noise, which the README has

Against = Callable[..., None]  # see the fixture in conftest.py
Verdict = Literal["ok", "better", "WORSE", "NOT IN THE BASELINE", "not run"]
FAILURES: tuple[Verdict, ...] = ("WORSE", "NOT IN THE BASELINE")


@dataclass(frozen=True)
class Entry:
    """A committed ratio. If a new ratio is more than `allowed` times as large, the part has become slower.

    reference: the workload that the part is compared with. processor: the one on which the ratio was measured.
    """

    ratio: float
    allowed: float
    reference: str
    processor: str


@dataclass(frozen=True)
class Measurement:
    """Median seconds of the part and of its reference, and the median of their ratios."""

    reference: str
    subject_seconds: float
    reference_seconds: float
    ratio: float


@dataclass(frozen=True)
class RatioRow:
    """A line of the report: the new measurement, the committed entry, and the verdict. change: the new ratio divided by
    the committed one."""

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
    """A function that calls `function` `count` times, so that a round takes some milliseconds."""

    def run() -> None:
        for _ in range(count):
            function()

    return run


def measurement(reference: str, subject: Sequence[float], beside: Sequence[float]) -> Measurement:
    """Summarise rounds in which the part (`subject`, seconds) and its reference (`beside`, seconds) alternated."""
    rounds = [ours / theirs for ours, theirs in zip(subject, beside, strict=True)]
    times = statistics.median(subject), statistics.median(beside)
    return Measurement(reference, *times, statistics.median(rounds))


def compare(measured: Mapping[str, Measurement], baseline: Mapping[str, Entry]) -> list[RatioRow]:
    """A row for every name that is measured or committed, sorted."""
    names = sorted({*measured, *baseline})
    return [RatioRow(name, measured.get(name), baseline.get(name)) for name in names]


def failures(rows: Sequence[RatioRow]) -> list[RatioRow]:
    return [row for row in rows if row.verdict in FAILURES]


def read(path: Path = BASELINE) -> dict[str, Entry]:
    """The committed entries by name; none if there is no file. Raises ValueError if the file is no baseline."""
    if not path.exists():
        return {}
    try:
        return {name: Entry(**fields) for name, fields in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a baseline ({error}); --rewrite-baseline writes a new one") from None


def rewrite(path: Path, measured: Mapping[str, Measurement], processor: str) -> None:
    """Write the measured ratios into the file. Entries that were not measured stay, and so does every `allowed`."""
    entries = read(path)
    for name, new in measured.items():
        allowed = entries[name].allowed if name in entries else ALLOWED
        entries[name] = Entry(float(f"{new.ratio:.3g}"), allowed, new.reference, processor)
    content = {name: asdict(entries[name]) for name in sorted(entries)}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(rows: Sequence[RatioRow]) -> list[str]:
    """The report: a head, a line for each measured row, and the names of the others."""
    head = ("benchmark", "ms", "reference ms", "ratio", "baseline", "change", "allowed", "verdict")
    cells = [head, *(_cells(row, new) for row in rows if (new := row.measured))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    run = {_benchmark(row.name) for row in rows if row.measured}
    missing = ", ".join(row.name for row in rows if _benchmark(row.name) not in run)
    return [_line(line, widths) for line in cells] + ([f"not run: {missing}"] if missing else [])


def _benchmark(name: str) -> str:
    """The name without its variant, since a run measures the variant of one instruction set only."""
    return name.partition(" ")[0]


def _cells(row: RatioRow, new: Measurement) -> tuple[str, ...]:
    entry, change = row.entry, row.change
    times = [f"{seconds * 1e3:.2f}" for seconds in (new.subject_seconds, new.reference_seconds)]
    committed = ["", "", ""]
    if entry is not None and change is not None:
        committed = [f"{entry.ratio:.3g}", f"{change:.2f}x", f"{entry.allowed:g}x"]
    return (row.name, *times, f"{new.ratio:.3g}", *committed, row.verdict)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *numbers, last = cells
    middle = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
    return "  ".join((first.ljust(widths[0]), *middle, last)).rstrip()
