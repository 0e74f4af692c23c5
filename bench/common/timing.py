"""Times of functions that run alternately, peak memory, and a device's rates of copying, multiplying and reading."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]
Pass = Literal["forward", "backward", "both"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "both")


@dataclass(frozen=True)
class Step:
    """Something to time: run(prepare()), of which only `run` is timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of `runs` runs: the median and the 20th and 80th percentiles. peak_bytes: peak memory minus the memory
    allocated before `prepare`; None on a CPU."""

    median: float
    p20: float
    p80: float
    runs: int
    peak_bytes: int | None


def pass_step(which: Pass, function: Function, leaves: Sequence[Tensor]) -> Step:
    """A Step of one pass of `function`. The forward pass builds the graph, as in training. Every backward pass has its
    own forward pass, since some implementations cannot run backward twice."""
    seeds: list[Tensor] = []

    def forward(_: Any = None) -> list[Tensor]:
        result = function(*leaves)
        return [result] if isinstance(result, Tensor) else list(result)

    def backward(outputs: list[Tensor]) -> Any:
        return torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)

    def ready() -> list[Tensor]:
        outputs = forward()
        if not seeds:  # made once; not shared, since some implementations write into the gradient
            seeds.extend(torch.ones_like(out) if out.ndim == 0 else torch.randn_like(out) for out in outputs)
        return outputs

    if which == "forward":
        return Step(lambda: None, forward)
    if which == "backward":
        return Step(ready, backward)
    return Step(lambda: seeds or ready(), lambda _: backward(forward()))


def first_line(problem: BaseException) -> str:
    """The exception's type and the first line of its message."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}".strip()


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """(median, 20th percentile, 80th percentile)"""
    quintiles = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else list(seconds) * 4
    return statistics.median(seconds), quintiles[0], quintiles[-1]


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names in the order of this turn, which begins one name later at each turn."""
    first = turn % max(1, len(names))
    return [*names[first:], *names[:first]]


def time_in_turns(steps: dict[str, Step], device: torch.device, runs: int) -> dict[str, Timing | str]:
    """The Timing of every step, or the first line of its exception. The steps alternate in rotating order, so that a
    drift of the machine's speed affects all of them alike."""
    warmup = 10 if device.type == "cuda" else 1
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    for turn in range(warmup + runs):
        pending = {}
        for name in rotated([name for name in steps if name not in failed], turn):
            try:
                pending[name] = clock.start(steps[name])
            except Exception as problem:  # an implementation that fails is a result, not the end of the run
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
    """Times each run by events, from a cold L2 cache. The host runs ahead within a round, as in training, so the time
    of a launch counts only if the device waits for it."""

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
    return Timing(*spread(seconds), len(seconds), peak)


def peak_mib(device: torch.device) -> float | None:
    """This process's peak memory so far in MiB: allocated on a GPU, resident on a CPU (VmHWM, compilation included).
    None if the system does not report it.

    Not ru_maxrss: a child inherits it from its parent.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The rates that this GPU reaches: GB/s of one large copy (reads plus writes), TFLOP/s of one large product."""
    source = torch.ones(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
    steps = {
        "copy": Step(lambda: None, lambda _: target.copy_(source)),
        "product": Step(lambda: None, lambda _: torch.mm(a, b)),
    }
    copy, product = time_in_turns(steps, device, runs=20).values()
    if isinstance(copy, str) or isinstance(product, str):
        raise ValueError(f"{device} cannot copy and multiply: {copy}, {product}")
    return {"GB/s": 2 * source.numel() / copy.median / 1e9, "TFLOP/s": 2 * 8192**3 / product.median / 1e12}


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Run so many endless loops meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def read_bandwidth(num_bytes: int, device: torch.device, seconds: float = 1.0) -> float:
    """Bytes per second at which torch's threads read a buffer of `num_bytes` repeatedly: the rate of the fastest of
    several reductions, each timed for `seconds`. It limits decoding, which reads every weight for every token. A buffer
    that fits into a cache is read from it, as a small model's weights are."""
    words = max(num_bytes // 4, 1)
    x = torch.ones(words, dtype=torch.float32, device=device)
    matrix, vector = x[: words // 512 * 512].view(-1, 512), torch.ones(512, device=device)
    readers: list[Callable[[], Any]] = [
        lambda: x.sum(),
        lambda: x.amax(),
        lambda: x.view(torch.int32).sum(dtype=torch.int32),
    ]
    if matrix.numel():
        readers.append(lambda: matrix @ vector)
    return words * 4 / min(_fastest(read, device, seconds) for read in readers)


def _fastest(read: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The 20th percentile of the times; the minimum could be one lucky run."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        synchronize(device)
        start = time.perf_counter()
        read()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 5]


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
