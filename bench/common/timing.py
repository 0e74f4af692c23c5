"""Time and memory of functions that take turns, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]
Pass = Literal["forward", "backward", "both"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "both")


@dataclass(frozen=True)
class Step:
    """`run` is timed, on what `prepare`, which is not timed, gives it."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds: the median and what 20 and 80 of a hundred runs stay below; runs counted, and bytes taken at the peak
    beyond what was there before `prepare` (None on a CPU)."""

    median: float
    p20: float
    p80: float
    runs: int
    peak_bytes: int | None


def step_of(which: Pass, function: Function, leaves: Sequence[Tensor]) -> Step:
    """One pass of `function`. The forward is that of training: it builds the graph. Every backward has a forward of its
    own, since not every contender bears a second one."""
    seeds: list[Tensor] = []

    def forward(_: Any = None) -> list[Tensor]:
        result = function(*leaves)
        return [result] if isinstance(result, Tensor) else list(result)

    def backward(outputs: list[Tensor]) -> Any:
        return torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)

    def ready() -> list[Tensor]:
        outputs = forward()
        if not seeds:  # made once, and not shared: some contenders write into the gradient they are given
            seeds.extend(torch.ones_like(out) if out.ndim == 0 else torch.randn_like(out) for out in outputs)
        return outputs

    if which == "forward":
        return Step(lambda: None, forward)
    if which == "backward":
        return Step(ready, backward)
    return Step(lambda: seeds or ready(), lambda _: backward(forward()))


def first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}".strip()


def measure(steps: dict[str, Step], device: torch.device, runs: int) -> dict[str, Timing | str]:
    """Every step's Timing, or the first line of what it died of. Steps take turns, each round in another order."""
    warmup = 10 if device.type == "cuda" else 1
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    for turn in range(warmup + runs):
        names = [name for name in steps if name not in failed]
        pending = {}
        for name in names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]:
            try:
                pending[name] = clock.start(steps[name])
            except Exception as problem:  # a contender that dies is a result, not the end of the run
                failed[name] = first_line(problem)
        try:
            taken = {name: finish() for name, finish in pending.items()}
        except RuntimeError as problem:
            raise RuntimeError(f"the device failed in a round of {', '.join(pending)}: {problem}") from problem
        if turn >= warmup:
            for name, value in taken.items():
                seconds[name].append(value)
    return {
        name: failed[name]
        if name in failed
        else _summary(seconds[name], _peak(steps[name], device) if device.type == "cuda" else None)
        for name in steps
    }


class _CpuClock:
    def start(self, step: Step) -> Callable[[], float]:
        state = step.prepare()
        start = time.perf_counter()
        step.run(state)
        taken = time.perf_counter() - start
        return lambda: taken


class _CudaClock:
    """Events around each run, which begins with a cold L2 cache. The host runs ahead within a round, as it does in
    training: what a launch costs it shows only where the device has to wait."""

    def __init__(self, device: torch.device) -> None:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(size, 64 * 2**20), dtype=torch.int8, device=device)

    def start(self, step: Step) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        state = step.prepare()
        self.flush.zero_()
        begin.record()
        step.run(state)
        end.record()

        def finish() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return finish


def _peak(step: Step, device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = step.run(step.prepare())
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def _summary(seconds: list[float], peak: int | None) -> Timing:
    quintiles = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
    return Timing(statistics.median(seconds), quintiles[0], quintiles[-1], len(seconds), peak)


def peak_mib(device: torch.device) -> float | None:
    """The most memory so far, MiB: of a GPU what this process had allocated; on a CPU the peak of its resident set,
    compilation included (VmHWM, which begins anew with the program); None where the system does not tell.

    Not ru_maxrss: that is handed on from a process to the program it starts, and tells of the larger of the two.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this GPU reaches: GB/s of one large copy (bytes read and written), TFLOP/s of one large product."""
    source = torch.ones(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
    steps = {
        "copy": Step(lambda: None, lambda _: target.copy_(source)),
        "product": Step(lambda: None, lambda _: torch.mm(a, b)),
    }
    found = measure(steps, device, runs=20)
    copy, product = found["copy"], found["product"]
    if isinstance(copy, str) or isinstance(product, str):
        raise ValueError(f"{device} cannot copy and multiply: {copy}, {product}")
    return {"GB/s": 2 * source.numel() / copy.median / 1e9, "TFLOP/s": 2 * 8192**3 / product.median / 1e12}


def start_deaf(process: BaseProcess) -> None:
    """Start a worker that Ctrl-C does not reach: it ends with this process, which says what there is to say.

    The worker inherits that SIGINT is blocked. Here a Ctrl-C during the start comes after it: other threads do not
    block it, and ignoring it would lose it.
    """
    resource_tracker.ensure_running()  # its own start unblocks
    late: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: late.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if late:
        signal.raise_signal(signal.SIGINT)
