"""Search for faster tile sizes on this GPU. The result is a table entry for a person to paste."""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from bench.common.record import Row, append, as_dicts, check_columns, stamp
from bench.common.timing import first_line, pass_step, time_in_turns
from bench.operators.cases import Case, applies, build
from bench.operators.parity import ALLOWED, PARITY_TOKENS, worst_ratio
from minimind.config import PRESETS
from minimind.kernels.triton_support import architecture

TABLES = {  # op -> the tables its kernels read, as (module of minimind.kernels, name)
    "rms_norm": [("rms_norm", "CONFIGS")],
    "add_rms_norm": [("rms_norm", "CONFIGS")],
    "rope": [("rope", "CONFIGS")],
    "rope_qk_norm": [("rope", "CONFIGS")],
    "swiglu": [("swiglu", "CONFIGS")],
    "linear_cross_entropy": [("chunked_linear", "CONFIGS")],
    "linear_log_probs": [("chunked_linear", "CONFIGS")],
    "linear_distillation": [("chunked_linear", "CONFIGS")],
    "moe": [("grouped_gemm", "HALF_CONFIGS"), ("moe_routing", "CONFIGS")],
}
FLOAT_TABLES = TABLES | {"moe": [("grouped_gemm", "FLOAT_CONFIGS"), ("moe_routing", "CONFIGS")]}
GAIN = 0.98  # a candidate is taken from 2% on; less is noise
RUNS = 30
LONGEST = 180.0  # seconds of a table's search, in which every candidate is compiled


@dataclass(frozen=True)
class TuningRow(Row):
    """The best entry found for one table. ratio: its time divided by that of the current entry."""

    torch: str | None
    triton: str | None
    op: str
    dtype: str
    table: str
    entry: str
    ratio: float


def places(config: Any) -> list[tuple[str, ...]]:
    """The paths of all numbers in a frozen dataclass, including nested ones."""
    paths = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        inner = places(value) if dataclasses.is_dataclass(value) else [()]
        paths += [(item.name, *rest) for rest in inner]
    return paths


def replaced(config: Any, place: tuple[str, ...], change: Callable[[int], int]) -> Any:
    """A copy of `config` with one number changed."""
    value = getattr(config, place[0])
    new = change(value) if len(place) == 1 else replaced(value, place[1:], change)
    return dataclasses.replace(config, **{place[0]: new})


def changes(place: tuple[str, ...]) -> list[Callable[[int], int]]:
    """Functions that halve and double the number; for stages, take one fewer and one more. At least 1, at most 16
    warps."""
    if place[-1] == "num_stages":
        return [lambda n: max(1, n - 1), lambda n: n + 1]
    most = 16 if place[-1] == "num_warps" else 2**30
    return [lambda n: max(1, n // 2), lambda n: min(most, 2 * n)]


def main(
    op: str, presets: Sequence[str], tokens: Sequence[int] | None, dtype: torch.dtype, device: torch.device,
    folder: Path, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Change the numbers of each table's entry one after another, and keep those that are faster. A row for every table
    is added to tuning.csv in `folder`."""
    if op not in TABLES:
        raise ValueError(f"--tune {op}: unknown; choose from {', '.join(TABLES)}")
    if device.type != "cuda":
        raise ValueError(f"--tune {op}: needs a CUDA GPU; the device is {device}")
    wanted = [p for p in presets if applies(op, PRESETS[p])]
    if not wanted:
        raise ValueError(f"--tune {op}: no model among --presets uses it")
    arch = architecture(device)
    search = _Search(
        [build(op, p, n, dtype, device, compiled=False) for p in wanted for n in tokens or (16384,)],
        [build(op, p, PARITY_TOKENS, dtype, device, compiled=False) for p in wanted],
        arch,
        device,
        console,
    )
    columns = stamp(device, "torch", "triton")
    check_columns(folder / "tuning.csv", TuningRow)
    rows = []
    for module, attribute in (FLOAT_TABLES if dtype == torch.float32 else TABLES)[op]:
        table = getattr(importlib.import_module(f"minimind.kernels.{module}"), attribute)
        best, ratio = search.run(table)
        name, entry = f"kernels/{module}.py {attribute}", f"{arch}: {best},"
        rows.append(
            TuningRow(**columns, op=op, dtype=str(dtype).removeprefix("torch."), table=name, entry=entry, ratio=ratio)
        )
        append(folder / "tuning.csv", rows[-1:])
        console.print(f"{name}, {ratio:.3f} of the time before:", highlight=False)
        console.print(f"    {entry}", highlight=False, soft_wrap=True)
    return {"csv": str(folder / "tuning.csv"), "rows": as_dicts(rows)}


@dataclass(frozen=True)
class _Search:
    """cases: timed. checked: the same with few tokens, held to the numerics contract first."""

    cases: Sequence[Case]
    checked: Sequence[Case]
    arch: int
    device: torch.device
    console: Console

    def run(self, table: dict[int, Any]) -> tuple[Any, float]:
        """(the best entry found within LONGEST, its time divided by the current entry's)"""
        end = time.monotonic() + LONGEST
        best = table[max(a for a in table if a <= self.arch)]
        first = self.seconds(table, best)
        if isinstance(first, str):
            raise ValueError(f"--tune: the current entry {best} does not run here: {first}")
        taken = first
        for place in places(best):
            for change in changes(place):
                candidate = replaced(best, place, change)
                if candidate == best:
                    continue
                if time.monotonic() > end:
                    self.console.print(f"stopped after {LONGEST:g} s, before {'.'.join(place)}", highlight=False)
                    return best, taken / first
                seconds = self.seconds(table, candidate)
                if isinstance(seconds, str):
                    answer = seconds
                else:
                    answer = f"{seconds / first:.3f} of the time before"
                    if seconds < GAIN * taken:
                        best, taken = candidate, seconds
                self.console.print(f"{'.'.join(place)} {candidate}: {answer}", highlight=False, soft_wrap=True)
        return best, taken / first

    def seconds(self, table: dict[int, Any], config: Any) -> float | str:
        """Geometric mean over the cases of the seconds of forward and backward with this entry, or why it fails."""
        logs = []
        with mock.patch.dict(table, {self.arch: config}):
            try:
                for case in self.checked:
                    if worst_ratio(case.implementations["minimind"], case.reference, case.leaves) > ALLOWED:
                        return "its error is too large"
                for case in self.cases:
                    step = pass_step("both", case.implementations["minimind"], case.leaves)
                    timing = time_in_turns({"minimind": step}, self.device, RUNS)["minimind"]
                    if isinstance(timing, str):
                        return timing
                    logs.append(math.log(timing.median))
            except Exception as problem:  # most likely too large for the GPU, which is a result
                return first_line(problem)
        return math.exp(sum(logs) / len(logs))
