"""The host's time in one compiled step: how long Python and the dispatcher take to launch what a card computes.

    python bench/host_time.py [--preset minimind2-small minimind2 minimind2-moe] [--runs 60] [--turns 5]

No GPU is needed and none is used: bench/compilation/host_stub.py runs the code that torch.compile generates, with kernels that do
nothing. Two forms take turns, each in a process of its own: `operator`, in which generated code calls our operators,
and `launch`, in which torch.compile looked into them and launches their kernels itself (kernels/triton_support.py,
kernel_op), as it does on a GPU. Of each the model's forward and backward, and of every op what one more call of it
adds.

Not counted: what the driver takes for a launch and CUDA's allocator for a tensor, cuBLAS for choosing a product's
kernel, and flash attention below its Python operator; all four are the same in both forms. Nor the loss, clipping and
the optimizer, which run as they are, uncompiled. So a step takes a card's host longer than is shown, and the difference
of the forms is what counts. The least of all runs is shown: what the work takes where nothing interrupts it.

Rows are added to host_time.csv in --out. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
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

from bench.compilation.host_cases import CALLS, OPS, HostWorker, workers
from bench.operators.report import append, check_columns, columns_of, slug
from minimind.config import PRESETS
from minimind.utils.device import describe_device
from minimind.utils.stdio import command_line

Seconds = list[tuple[float, float]]


@dataclass(frozen=True)
class Args:
    """Time what the host does in a compiled step."""

    preset: tuple[str, ...] = ("minimind2-small", "minimind2", "minimind2-moe")
    """Models, with an eighth of their widths; the first is the one whose ops are timed apart."""
    op: tuple[str, ...] = OPS
    """Ops that are timed apart."""
    runs: int = 60
    """Timed runs of each form in a turn."""
    turns: int = 5
    """Turns."""
    arch: int = 90
    """Compute capability of the card that is pretended, as 86 for 8.6."""
    out: str | None = None
    """Folder for the rows; None for bench/results/DEVICE."""


@dataclass(frozen=True)
class HostTimeRow:
    """what: a preset, or an op of the first. Microseconds of the host, the least of all runs and the median; launches
    of our kernels in forward and backward together."""

    date: str
    commit: str | None
    device: str
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


def measure(name: str, args: Args, forms: dict[str, HostWorker]) -> dict[str, tuple[int, Seconds]]:
    """Form -> (launches, seconds), the forms taking turns."""
    launches = {form: worker.ask(name, 0) for form, worker in forms.items()}
    seconds: dict[str, Seconds] = {form: [] for form in forms}
    for _ in range(args.turns):
        for form, worker in forms.items():
            seconds[form] += worker.ask(name, args.runs)
    return {form: (launches[form], seconds[form]) for form in forms}


def row_of(what: str, form: str, launches: int, seconds: Seconds, stamp: dict[str, Any]) -> HostTimeRow:
    passes = list(zip(*seconds, strict=True))
    least = [min(times) * 1e6 for times in passes]
    medians = [statistics.median(times) * 1e6 for times in passes]
    return HostTimeRow(**stamp, what=what, form=form, launches=launches, forward_us=least[0], backward_us=least[1],
               forward_median_us=medians[0], backward_median_us=medians[1], runs=len(seconds))  # fmt: skip


def one_more(few: HostTimeRow, many: HostTimeRow, what: str) -> HostTimeRow:
    """What one more call of an op takes, of rows with CALLS of them."""
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


def main(args: Args) -> list[HostTimeRow]:
    for name, given, known in (("preset", args.preset, tuple(PRESETS)), ("op", args.op, OPS)):
        for value in given:
            if value not in known:
                raise ValueError(f"--{name} {value}: unknown; choose from {', '.join(known)}")
    if min(args.runs, args.turns) < 1:
        raise ValueError("--runs and --turns count from 1")
    from minimind.training.run_folder import (
        versions,
    )  # imports the operators, which the workers must not at their start

    console = Console(stderr=True)
    found = versions(describe_device(torch.device("cpu")))
    stamp: dict[str, Any] = {name: found[name] for name in ("device", "commit", "torch", "triton")}
    stamp |= {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "arch": args.arch}
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(stamp["device"])
    check_columns(folder / "host_time.csv", columns_of(HostTimeRow))
    rows: list[HostTimeRow] = []

    def keep(new: list[HostTimeRow]) -> list[HostTimeRow]:
        append(folder / "host_time.csv", new)
        return new

    with workers(args.arch) as forms:
        for preset in args.preset:
            console.print(f"{preset}: compiling, then timing", highlight=False)
            taken = measure(preset, args, forms)
            rows += keep([row_of(preset, form, *taken[form], stamp) for form in forms])
        for op in args.op:
            console.print(f"{op}: compiling, then timing", highlight=False)
            few, many = (measure(f"{op} {args.preset[0]} {calls}", args, forms) for calls in CALLS)
            pairs = [[row_of(op, form, *taken[form], stamp) for taken in (few, many)] for form in forms]
            rows += keep([one_more(first, last, f"{op}, one more call") for first, last in pairs])
    show(rows, Console(width=None if sys.stdout.isatty() else 120))
    return rows


if __name__ == "__main__":
    try:
        print(json.dumps([dataclasses.asdict(row) for row in main(command_line(Args, __doc__))]))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
