"""Every kernel against eager PyTorch, torch.compile, Liger-Kernel and PyTorch's own fused forms, side by side.

    python bench/kernels.py [--ops rms_norm moe] [--presets minimind2] [--tokens 16384 65536] [--out DIR] [--tune OP]

Contenders take turns on the presets' own shapes (bench/operators/cases.py); one whose numbers break the contract that our
kernels are held to (bench/operators/parity.py) is refused, not timed. On a machine without a GPU the PyTorch forms that ops
takes on a CPU are timed against plain PyTorch instead, on fewer tokens.

Rows are added to kernels.csv in --out, and kernels-COMMIT.png is drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console

from bench.common.timing import PASSES, Timing, first_line, limits, measure, step_of
from bench.operators import tuning
from bench.operators.cases import BUILDERS, Case, applies, build
from bench.operators.parity import ALLOWED, PARITY_TOKENS, worst_ratio
from bench.operators.report import KernelRow, append, check_columns, plot, show, slug
from minimind.config import PRESETS
from minimind.kernels.triton_support import why_no_triton
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, choose_precision, describe_device
from minimind.utils.stdio import command_line

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Args:
    """Time every kernel against its peers."""

    ops: tuple[str, ...] = tuple(BUILDERS)
    """Which ops."""
    presets: tuple[str, ...] | None = None
    """Whose shapes; one that an earlier preset has too is timed once. None for all but nano, or for
    minimind2-small and minimind3-moe on a CPU."""
    tokens: tuple[int, ...] | None = None
    """Tokens in a batch; None for 16384 and 65536, or 1024 on a CPU."""
    dtype: str = "auto"
    """Of activations: bf16, fp16, fp32; auto takes what this device trains in. Weights are float32."""
    device: str = "auto"
    """auto, cpu, cuda."""
    repeat: int | None = None
    """Timed runs of each contender in each pass; None for 100; on a CPU for 3 of a matrix product, 15 of others."""
    out: str | None = None
    """Folder for the rows and the picture; None for bench/results/DEVICE."""
    tune: str | None = None
    """Search tile sizes for this op instead, and print the best as a table entry to paste (rows: tuning.csv)."""


@dataclass(frozen=True)
class Bench:
    """What all rows of a run share."""

    device: torch.device
    dtype: torch.dtype
    repeat: int | None
    limits: dict[str, float]  # what the device reaches, by unit; of a CPU, whose caches blur it, nothing
    stamp: dict[str, Any]  # date, commit, device, versions

    def runs(self, case: Case) -> int:
        if self.repeat is not None or self.device.type == "cuda":
            return self.repeat or 100
        return 3 if case.work.unit == "TFLOP/s" else 15

    def rows(self, case: Case, small: Case) -> list[KernelRow]:
        """Every contender in every pass. small: the same case with few tokens, where the contract is checked."""
        checked = {name: _parity(small, name) for name in case.contenders}
        rows = []
        for which in PASSES:
            steps = {
                name: step_of(which, case.contenders[name], case.leaves)
                for name, error in checked.items()
                if isinstance(error, float) and error <= ALLOWED
            }
            timed = measure(steps, self.device, self.runs(case))
            ours = timed.get("minimind")
            for name, error in checked.items():
                blank = self._row(case, which, name, error)
                rows.append(self._timed(blank, case, timed[name], ours) if name in timed else blank)
        return rows

    def _row(self, case: Case, which: str, name: str, error: float | str) -> KernelRow:
        if isinstance(error, str):
            status, reason = "failed", error
        elif math.isinf(error):
            status, reason = "refused", "numbers that are not finite, or another shape than plain PyTorch's"
        else:
            status, reason = "refused", f"error {error:.3g} times plain PyTorch's; {ALLOWED:g} is allowed"
        return KernelRow(
            **self.stamp,
            op=case.op, preset=case.preset, shape=case.shape, tokens=case.tokens,
            dtype=str(case.dtype).removeprefix("torch."), phase=which, contender=name, status=status, reason=reason,
            error_ratio=error if isinstance(error, float) and math.isfinite(error) else None,
        )  # fmt: skip

    def _timed(self, row: KernelRow, case: Case, timing: Timing | str, ours: Timing | str | None) -> KernelRow:
        if isinstance(timing, str):
            return dataclasses.replace(row, status="failed", reason=timing)
        work = case.work.of(row.phase)  # type: ignore[arg-type]
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
        return worst_ratio(case.contenders[name], case.reference, case.leaves)
    except Exception as problem:  # a peer that cannot run is a row that says so
        return first_line(problem)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return choose_precision(device).compute_dtype
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: unknown; choose from auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def open_bench(args: Args) -> Bench:
    """Check the arguments, then measure what the device can do."""
    for flag, given, known in (("ops", args.ops, BUILDERS), ("presets", args.presets or (), PRESETS)):
        for value in given:
            if value not in known:
                raise ValueError(f"--{flag} {value}: unknown; choose from {', '.join(known)}")
    if min((*(args.tokens or (1,)), 1 if args.repeat is None else args.repeat)) < 1:
        raise ValueError("--tokens and --repeat count from 1")
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    reason = why_no_triton(device)
    if device.type == "cuda" and reason is not None:
        raise ValueError(f"--device {device}: {reason}; use --device cpu to time PyTorch's forms")
    if device.index is not None:
        torch.cuda.set_device(device)  # events are recorded there
    found = versions(describe_device(device))
    stamp = {name: found[name] for name in ("device", "commit", "torch", "triton")}
    stamp["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    try:
        stamp["liger"] = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        stamp["liger"] = None
    return Bench(device, dtype, args.repeat, limits(device, dtype) if device.type == "cuda" else {}, stamp)


def presets_of(args: Args, device: torch.device) -> tuple[str, ...]:
    if args.presets is not None:
        return args.presets
    if device.type == "cpu":
        return "minimind2-small", "minimind3-moe"
    return tuple(name for name in PRESETS if name != "nano")


def cases(args: Args, bench: Bench) -> Iterator[tuple[Case, Case]]:
    """Every different (case, the same with few tokens)."""
    cuda = bench.device.type == "cuda"
    for op in args.ops:
        seen = set()
        for preset in presets_of(args, bench.device):
            for tokens in args.tokens or ((16384, 65536) if cuda else (1024,)):
                if not applies(op, PRESETS[preset]):
                    continue
                torch.compiler.reset()  # past eight shapes of one function it would run uncompiled, unsaid
                case = build(op, preset, tokens, bench.dtype, bench.device, compiled=cuda)
                if (case.shape, tokens) not in seen:
                    seen.add((case.shape, tokens))
                    yield case, build(op, preset, PARITY_TOKENS, bench.dtype, bench.device, compiled=cuda)


def folder_of(args: Args, device: str) -> Path:
    return Path(args.out) if args.out else Path(__file__).parent / "results" / slug(device)


def main(args: Args) -> dict[str, Any]:
    console = Console(width=None if sys.stdout.isatty() else 120)
    if args.tune is not None:
        device = choose_device(args.device)
        dtype = choose_dtype(args.dtype, device)
        presets, folder = presets_of(args, device), folder_of(args, describe_device(device))
        return tuning.main(args.tune, presets, args.tokens, dtype, device, folder, console)
    bench = open_bench(args)
    folder = folder_of(args, bench.stamp["device"])
    what = f"-{args.ops[0]}" if len(args.ops) == 1 else ""
    table, picture = (folder / "kernels.csv", folder / f"kernels{what}-{bench.stamp['commit'] or 'unknown'}.png")
    check_columns(table)
    if bench.device.type == "cpu":
        console.print("no GPU: timing the PyTorch forms that ops takes on a CPU, not the Triton kernels")
    else:
        reached = ", ".join(f"{value:,.4g} {unit}" for unit, value in bench.limits.items())
        console.print(f"{bench.stamp['device']}: one large copy and one large product reach {reached}")
    rows: list[KernelRow] = []
    for case, small in cases(args, bench):
        found = bench.rows(case, small)
        append(table, found)
        show(found, console)
        rows += found
    if not rows:
        raise ValueError(f"--ops {' '.join(args.ops)}: no model among --presets calls them")
    plot(rows, picture)
    return {
        "csv": str(table),
        "png": str(picture),
        "limits": bench.limits,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


if __name__ == "__main__":
    try:
        outcome = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(outcome))
