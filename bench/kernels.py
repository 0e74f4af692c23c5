"""Compare every kernel with eager PyTorch, torch.compile, PyTorch's own fused functions and Liger-Kernel.

    python bench/kernels.py [--ops rms_norm moe] [--presets minimind2] [--tokens 16384 65536] [--out DIR] [--tune OP]

The implementations take turns on the presets' own shapes (bench/operators/cases.py). One whose error is larger than the
numerics contract allows (bench/operators/parity.py) is refused and not timed. Without a GPU, the PyTorch forms that
minimind.ops uses on a CPU are compared with plain PyTorch instead, on fewer tokens.

Rows are added to kernels.csv in --out, and kernels-COMMIT.png is drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch

from bench.common.command import check_at_least, check_choices, run, table_console
from bench.common.record import append, as_dicts, check_columns, package_version, results_folder, stamp
from bench.common.timing import PASSES, Timing, first_line, limits, pass_step, time_in_turns
from bench.operators import tuning
from bench.operators.cases import BUILDERS, Case, applies, build
from bench.operators.parity import ALLOWED, PARITY_TOKENS, worst_ratio
from bench.operators.report import KernelRow, plot, show
from minimind.config import PRESETS
from minimind.kernels.triton_support import why_no_triton
from minimind.utils.device import choose_device, choose_precision, describe_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Args:
    """Compare every kernel with other implementations."""

    ops: tuple[str, ...] = tuple(BUILDERS)
    """Ops to compare."""
    presets: tuple[str, ...] | None = None
    """Presets whose shapes are timed; equal shapes are timed once. None: all but nano, or minimind2-small and
    minimind3-moe on a CPU."""
    tokens: tuple[int, ...] | None = None
    """Tokens in a batch; None: 16384 and 65536, or 1024 on a CPU."""
    dtype: str = "auto"
    """Type of the activations: bf16, fp16, fp32; auto: the one in which this device trains. Weights are float32."""
    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""
    repeat: int | None = None
    """Timed runs of each implementation in each pass; None: 100, or on a CPU 3 of matrix products and 15 of others."""
    out: str | None = None
    """Folder of the rows and the picture; None: bench/results/DEVICE."""
    tune: str | None = None
    """Search faster tile sizes for this op instead, and print the best as a table entry to paste (rows: tuning.csv)."""


@dataclass(frozen=True)
class Bench:
    """The settings that all rows of a run share."""

    device: torch.device
    dtype: torch.dtype
    repeat: int | None
    limits: dict[str, float]  # rates that the device reaches, by unit; empty for a CPU, whose caches blur them
    columns: dict[str, Any]  # date, commit, device, versions

    def runs(self, case: Case) -> int:
        if self.repeat is not None or self.device.type == "cuda":
            return self.repeat or 100
        return 3 if case.work.unit == "TFLOP/s" else 15

    def rows(self, case: Case, small: Case) -> list[KernelRow]:
        """A row for every implementation in every pass. small: the same case with few tokens, for the numerics
        check."""
        checked = {name: _parity(small, name) for name in case.implementations}
        rows = []
        for which in PASSES:
            steps = {
                name: pass_step(which, case.implementations[name], case.leaves)
                for name, error in checked.items()
                if isinstance(error, float) and error <= ALLOWED
            }
            timed = time_in_turns(steps, self.device, self.runs(case))
            ours = timed.get("minimind")
            for name, error in checked.items():
                blank = self._row(case, which, name, error)
                rows.append(self._timed(blank, case, timed[name], ours) if name in timed else blank)
        return rows

    def _row(self, case: Case, which: str, name: str, error: float | str) -> KernelRow:
        if isinstance(error, str):
            status, reason = "failed", error
        elif math.isinf(error):
            status, reason = "refused", "its results are not finite, or differ in shape from plain PyTorch's"
        else:
            status, reason = "refused", f"error {error:.3g} times plain PyTorch's; {ALLOWED:g} is allowed"
        return KernelRow(
            **self.columns,
            op=case.op, preset=case.preset, shape=case.shape, tokens=case.tokens,
            dtype=str(case.dtype).removeprefix("torch."), phase=which, contender=name, status=status, reason=reason,
            error_ratio=error if isinstance(error, float) and math.isfinite(error) else None,
        )  # fmt: skip

    def _timed(self, row: KernelRow, case: Case, timing: Timing | str, ours: Timing | str | None) -> KernelRow:
        if isinstance(timing, str):
            return dataclasses.replace(row, status="failed", reason=timing)
        work = case.work.of_pass(row.phase)  # type: ignore[arg-type]
        scale = {"GB/s": 1e9, "TFLOP/s": 1e12}[case.work.unit]
        rate = None if work is None else work / timing.median / scale
        limit = self.limits.get(case.work.unit)
        return dataclasses.replace(
            row,
            status="ok", reason="",
            milliseconds=timing.median * 1e3, p20=timing.p20 * 1e3, p80=timing.p80 * 1e3, runs=timing.runs,
            peak_mib=None if timing.peak_bytes is None else timing.peak_bytes / 2**20,
            rate=rate, unit=case.work.unit, share=rate / limit if rate is not None and limit is not None else None,
            ratio=timing.median / ours.median if isinstance(ours, Timing) else None,
        )  # fmt: skip


def _parity(case: Case, name: str) -> float | str:
    try:
        return worst_ratio(case.implementations[name], case.reference, case.leaves)
    except Exception as problem:  # an implementation that cannot run gets a row that says so
        return first_line(problem)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return choose_precision(device).compute_dtype
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: unknown; choose from auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def open_bench(args: Args) -> Bench:
    """Check the arguments, then measure the rates that the device reaches."""
    check_choices("ops", args.ops, BUILDERS)
    check_choices("presets", args.presets or (), PRESETS)
    check_at_least(1, tokens=args.tokens, repeat=args.repeat)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    reason = why_no_triton(device)
    if device.type == "cuda" and reason is not None:
        raise ValueError(f"--device {device}: {reason}; use --device cpu to time the PyTorch forms")
    if device.index is not None:
        torch.cuda.set_device(device)  # events are recorded there
    columns = stamp(device, "torch", "triton") | {"liger": package_version("liger-kernel")}
    return Bench(device, dtype, args.repeat, limits(device, dtype) if device.type == "cuda" else {}, columns)


def presets_of(args: Args, device: torch.device) -> tuple[str, ...]:
    if args.presets is not None:
        return args.presets
    if device.type == "cpu":
        return "minimind2-small", "minimind3-moe"
    return tuple(name for name in PRESETS if name != "nano")


def cases(args: Args, bench: Bench) -> Iterator[tuple[Case, Case]]:
    """Every different case, and the same with few tokens."""
    cuda = bench.device.type == "cuda"
    for op in args.ops:
        seen = set()
        for preset in presets_of(args, bench.device):
            for tokens in args.tokens or ((16384, 65536) if cuda else (1024,)):
                if not applies(op, PRESETS[preset]):
                    continue
                torch.compiler.reset()  # after eight shapes of a function it would silently run uncompiled
                case = build(op, preset, tokens, bench.dtype, bench.device, compiled=cuda)
                if (case.shape, tokens) not in seen:
                    seen.add((case.shape, tokens))
                    yield case, build(op, preset, PARITY_TOKENS, bench.dtype, bench.device, compiled=cuda)


def main(args: Args) -> dict[str, Any]:
    console = table_console()
    if args.tune is not None:
        device = choose_device(args.device)
        dtype = choose_dtype(args.dtype, device)
        presets, folder = presets_of(args, device), results_folder(args.out, describe_device(device))
        return tuning.main(args.tune, presets, args.tokens, dtype, device, folder, console)
    bench = open_bench(args)
    folder = results_folder(args.out, bench.columns["device"])
    suffix = f"-{args.ops[0]}" if len(args.ops) == 1 else ""
    table, picture = (folder / "kernels.csv", folder / f"kernels{suffix}-{bench.columns['commit'] or 'unknown'}.png")
    check_columns(table, KernelRow)
    if bench.device.type == "cpu":
        console.print("no GPU: timing the PyTorch forms that minimind.ops uses on a CPU, not the Triton kernels")
    else:
        reached = ", ".join(f"{value:,.4g} {unit}" for unit, value in bench.limits.items())
        console.print(f"{bench.columns['device']}: a large copy and a large product reach {reached}")
    rows: list[KernelRow] = []
    for case, small in cases(args, bench):
        new = bench.rows(case, small)
        append(table, new)
        show(new, console)
        rows += new
    if not rows:
        raise ValueError(f"--ops {' '.join(args.ops)}: no model among --presets uses them")
    plot(rows, picture)
    return {"csv": str(table), "png": str(picture), "limits": bench.limits, "rows": as_dicts(rows)}


if __name__ == "__main__":
    run(main, Args, __doc__)
