"""Measure the host's time in one compiled step: how long Python and the dispatcher take to launch a GPU's work.

    python bench/host_time.py [--preset minimind2-small minimind2 minimind2-moe] [--runs 60] [--turns 5]

No GPU is needed or used: bench/compilation/host_stub.py runs the code that torch.compile generates, with kernels that
do nothing. Two forms take turns, each in a process of its own: in `operator`, the generated code calls our operators;
in `launch`, torch.compile has looked into them and launches their kernels itself, as on a GPU (kernel_op in
kernels/triton_support.py). For each form, the model's forward and backward pass are timed, and the time that one more
call of each op adds.

The driver's part of a launch, CUDA's allocator, cuBLAS's choice of a kernel and flash attention below its Python
operator are not measured; they are the same in both forms. The loss, clipping and the optimizer are not either, since
they run uncompiled. A step therefore takes a GPU's host longer than shown, and only the difference of the forms counts.
The smallest time of all runs is shown, when nothing interrupts the work.

Rows are added to host_time.csv in --out. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console
from rich.table import Table

from bench.common.command import check_at_least, check_choices, run, table_console
from bench.common.record import Row, append, as_dicts, check_columns, results_folder, stamp
from bench.common.worker import ImplementationError, Worker
from bench.compilation.host_cases import CALLS, OPS, start
from minimind.config import PRESETS

FORMS = {"operator": False, "launch": True}  # form -> whether torch.compile looks into our operators
Seconds = list[tuple[float, float]]


@dataclass(frozen=True)
class Args:
    """Time the host in a compiled step."""

    preset: tuple[str, ...] = ("minimind2-small", "minimind2", "minimind2-moe")
    """Models, with an eighth of their widths; the ops of the first are timed one by one."""
    op: tuple[str, ...] = OPS
    """Ops that are timed one by one."""
    runs: int = 60
    """Timed runs of each form in a turn."""
    turns: int = 5
    """Turns of each form."""
    arch: int = 90
    """Compute capability of the imitated GPU, such as 86 for 8.6."""
    out: str | None = None
    """Folder of the rows; None: bench/results/DEVICE."""


@dataclass(frozen=True)
class HostTimeRow(Row):
    """One form. what: a preset, or an op of the first preset. Times: microseconds of the host, the smallest and the
    median of all runs. launches: of our kernels in forward and backward together."""

    torch: str | None
    triton: str | None
    arch: int
    what: str
    form: str
    launches: int
    forward_us: float
    backward_us: float
    forward_median_us: float
    backward_median_us: float
    runs: int

    @property
    def both_us(self) -> float:
        return self.forward_us + self.backward_us


def time_forms(case: str, args: Args, workers: dict[str, Worker]) -> dict[str, tuple[int, Seconds]]:
    """Form -> (launches, seconds of every run), the forms taking turns."""
    launches = {form: worker.ask((case, 0)) for form, worker in workers.items()}
    seconds: dict[str, Seconds] = {form: [] for form in workers}
    for _ in range(args.turns):
        for form, worker in workers.items():
            seconds[form] += worker.ask((case, args.runs))
    return {form: (launches[form], seconds[form]) for form in workers}


def row_of(what: str, form: str, launches: int, seconds: Seconds, columns: dict[str, Any]) -> HostTimeRow:
    passes = list(zip(*seconds, strict=True))
    least = [min(times) * 1e6 for times in passes]
    medians = [statistics.median(times) * 1e6 for times in passes]
    return HostTimeRow(**columns, what=what, form=form, launches=launches, forward_us=least[0], backward_us=least[1],
               forward_median_us=medians[0], backward_median_us=medians[1], runs=len(seconds))  # fmt: skip


def one_more(few: HostTimeRow, many: HostTimeRow, what: str) -> HostTimeRow:
    """The time of one more call of an op, from the rows of graphs with CALLS[0] and CALLS[1] calls."""
    more = CALLS[1] - CALLS[0]
    columns = ("forward_us", "backward_us", "forward_median_us", "backward_median_us")
    each = {name: (getattr(many, name) - getattr(few, name)) / more for name in columns}
    return dataclasses.replace(many, what=what, launches=(many.launches - few.launches) // more, **each)


def show(rows: Sequence[HostTimeRow], console: Console) -> None:
    table = Table(title="host time of compiled code, microseconds, kernels that do nothing")
    for column in ("what", "form", "launches", "forward", "backward", "both", "operator / launch"):
        table.add_column(column, justify="left" if column in ("what", "form") else "right")
    whole = {row.what: row.both_us for row in rows if row.form == "operator"}
    for row in rows:
        numbers = (f"{us:,.1f}" for us in (row.forward_us, row.backward_us, row.both_us))
        ratio = f"{whole[row.what] / row.both_us:.2f}" if row.form == "launch" else ""
        table.add_row(row.what, row.form, str(row.launches), *numbers, ratio)
    console.print(table)


def main(args: Args) -> list[dict[str, Any]]:
    check_choices("preset", args.preset, PRESETS)
    check_choices("op", args.op, OPS)
    check_at_least(1, runs=args.runs, turns=args.turns)
    console = Console(stderr=True)
    columns = stamp(torch.device("cpu"), "torch", "triton") | {"arch": args.arch}
    table = results_folder(args.out, columns["device"]) / "host_time.csv"
    check_columns(table, HostTimeRow)
    rows: list[HostTimeRow] = []
    workers = {form: Worker(start, visible, args.arch) for form, visible in FORMS.items()}
    try:
        for case in (*args.preset, *args.op):
            console.print(f"{case}: compiling, then timing", highlight=False)
            new = _rows(case, args, workers, columns)
            append(table, new)
            rows += new
    except ImplementationError as problem:
        raise ValueError(f"{case}: {problem}") from None
    finally:
        for worker in workers.values():
            worker.close()
    show(rows, table_console())
    return as_dicts(rows)


def _rows(case: str, args: Args, workers: dict[str, Worker], columns: dict[str, Any]) -> list[HostTimeRow]:
    """A row for each form of a preset or an op."""
    if case in PRESETS:
        times = time_forms(case, args, workers)
        return [row_of(case, form, *times[form], columns) for form in workers]
    few, many = (time_forms(f"{case} {args.preset[0]} {calls}", args, workers) for calls in CALLS)
    pairs = [[row_of(case, form, *times[form], columns) for times in (few, many)] for form in workers]
    return [one_more(first, last, f"{case}, one more call") for first, last in pairs]


if __name__ == "__main__":
    run(main, Args, __doc__)
