"""Report registers, spills, shared memory and occupancy of every kernel, for GPUs that this machine need not have.

    python bench/resources.py [--arch 80 86 89 90 120] [--dtype bf16 fp32] [--only moe rope]
                              [--json FILE] [--jobs N] [--native also|only|none]

Every public op is called forward and backward at the presets' widths, and parts of whole runs are executed. Their
launches are captured (bench/compilation/capture.py) and compiled for each architecture as Triton's JIT would compile
them (bench/compilation/compiling.py). The cases of runs, whose names begin with "run, ", also show how many variants of
a kernel a run compiles (bench/compilation/run_cases.py). If nvcc is on PATH, the kernels of csrc/cuda are compiled too
(bench/compilation/native_resources.py). Nothing is launched and no GPU is needed. The exit status is 1 if a kernel
spills, needs more shared memory than the GPU has, multiplies 16-bit matrices without tensor cores, or does not compile.

For GPUs before sm_80 (--arch 70 75 --dtype fp16 fp32) the ops are compiled one by one, without the products of experts
and csrc/cuda, since PyTorch takes their place there (docs/kernels.md).
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find
    os.environ.pop("TRITON_INTERPRET", None)  # the kernels are to be compiled

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.common.command import check_choices, run, table_console
from bench.compilation import native_resources
from bench.compilation.capture import Compilation, capture
from bench.compilation.compiling import Resources, compile_one
from bench.compilation.occupancy import CARDS
from bench.compilation.op_cases import Cases, cases
from bench.compilation.run_cases import variants

NEW = tuple(arch for arch in CARDS if arch >= 80)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Args:
    """Compile every kernel for every GPU and report its resources."""

    arch: tuple[int, ...] = NEW
    """Compute capabilities, such as 86 for 8.6."""
    dtype: tuple[str, ...] = ("bf16", "fp32")
    """Types of the activations: bf16, fp16, fp32. Weights are float32."""
    only: tuple[str, ...] = ("",)
    """Only the cases whose name in the table contains one of these."""
    json: str | None = None
    """Also write the rows to this file."""
    jobs: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Compilations at a time."""
    native: Literal["also", "only", "none"] = "also"
    """Whether to compile the kernels of csrc/cuda; --dtype and --only do not select among them."""


def check(args: Args) -> None:
    check_choices("arch", args.arch, CARDS)
    check_choices("dtype", args.dtype, DTYPES)


def capture_all(args: Args) -> list[Compilation]:
    """Every different compilation that the cases need."""
    check(args)
    selected = {dtype: cases(DTYPES[dtype], args.only) for dtype in args.dtype}
    if not any(selected.values()):
        raise ValueError(f"--only {' '.join(args.only)}: no case has this in its name")
    compilations: dict[str, Compilation] = {}
    for arch in args.arch:
        for dtype in args.dtype:
            own = selected[dtype] if arch in NEW else _before_sm_80(selected[dtype])
            for compilation in capture(own, arch, dtype):
                compilations.setdefault(compilation.key, compilation)
    return list(compilations.values())


def _before_sm_80(cases: Cases) -> Cases:
    return {name: call for name, call in cases.items() if not name.startswith(("moe_experts", "run, "))}


def compile_all(compilations: Sequence[Compilation], jobs: int) -> list[Resources | str]:
    """The resources of each, or why it did not compile, in the same order."""
    results: dict[int, Resources | str] = {}
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(compilations))
        if jobs <= 1:
            for i, compilation in enumerate(compilations):
                results[i] = compile_one(compilation)
                progress.advance(task)
        else:
            context = multiprocessing.get_context("spawn")  # a fork would break PyTorch's threads
            with ProcessPoolExecutor(min(jobs, len(compilations)), mp_context=context) as pool:
                futures = {pool.submit(compile_one, c): i for i, c in enumerate(compilations)}
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    progress.advance(task)
    return [results[i] for i in range(len(compilations))]


def problems(compilations: Sequence[Compilation], results: Sequence[Resources | str]) -> list[str]:
    """A line for each reason why a kernel must not ship."""
    lines = []
    for job, result in zip(compilations, results, strict=True):
        reasons = [f"does not compile: {result}"] if isinstance(result, str) else result.problems
        name = f"{job.kernel.lstrip('_')} ({job.case}, {job.dtype}) on sm_{job.arch}"
        lines += [f"{name}: {reason}" for reason in reasons]
    return lines


def show(results: Sequence[Resources | str], console: Console) -> None:
    rows = [r for r in results if isinstance(r, Resources)]
    for arch in sorted({r.arch for r in rows}):
        table = Table(title=f"sm_{arch}", caption="HMMA, HGMMA: tensor-core instructions; FFMA: float32 multiply-adds")
        for column in ("kernel", "case", "dtype"):
            table.add_column(column, overflow="fold")
        for column in (
            "warps", "stages", "registers", "spilled", "stack", "shared", "programs", "warps %", "bound by",
            "HMMA", "HGMMA", "FFMA",
        ):  # fmt: skip
            table.add_column(column, justify="right")
        for row in sorted((r for r in rows if r.arch == arch), key=lambda r: (r.module, r.kernel)):
            table.add_row(*_cells(row))
        console.print(table)


def _cells(row: Resources) -> list[str]:
    counts = (row.hmma, row.hgmma, row.ffma) if row.multiplies_matrices else ("", "", "")
    numbers = (row.num_warps, row.num_stages, row.registers, row.spilled, row.stack, row.shared, row.programs)
    cells = [row.kernel.lstrip("_"), row.case, row.dtype, *numbers, f"{row.occupancy:.0%}", row.bound, *counts]
    style = "[red]" if row.problems else ""
    return [f"{style}{cell}" for cell in cells]


def as_rows(compilations: Sequence[Compilation], results: Sequence[Resources | str]) -> list[dict[str, Any]]:
    rows = []
    for job, result in zip(compilations, results, strict=True):
        if isinstance(result, str):
            names = ("case", "dtype", "arch", "module", "kernel", "num_warps", "num_stages")
            rows.append({name: getattr(job, name) for name in names} | {"error": result})
        else:
            rows.append(dataclasses.asdict(result))
    return rows


def compile_native(args: Args, console: Console) -> list[Resources]:
    """The resources of the kernels of csrc/cuda. If they cannot be compiled, a line says so, or a ValueError with
    --native only."""
    if args.native == "none":
        return []
    check(args)
    reason = native_resources.why_not()
    if reason is None:
        return native_resources.compile_all([arch for arch in args.arch if arch in NEW], args.jobs)
    if args.native == "only":
        raise ValueError(f"--native only: {reason}")
    console.print(reason, highlight=False)
    return []


def native_problems(rows: Sequence[Resources]) -> list[str]:
    return [f"{row.kernel} ({row.case}) on sm_{row.arch}: {problem}" for row in rows for problem in row.problems]


def main(args: Args) -> int:
    """The exit status."""
    compilations = [] if args.native == "only" else capture_all(args)
    results = compile_all(compilations, args.jobs) if compilations else []
    console = table_console(160)
    native = compile_native(args, console)
    show([*results, *native], console)
    reasons = problems(compilations, results) + native_problems(native)
    counts = ", ".join(f"{name} {count}" for name, count in variants(compilations).items())
    if counts:
        console.print(f"variants that a run compiles: {counts}", highlight=False, soft_wrap=True)
    for line in reasons:
        console.print(f"[red]{line}", highlight=False, soft_wrap=True)
    console.print(f"{len(results) + len(native)} kernels compiled, {len(reasons)} problems")
    if args.json:
        rows = as_rows(compilations, results) + [dataclasses.asdict(row) for row in native]
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if reasons else 0


if __name__ == "__main__":
    run(main, Args, __doc__)
