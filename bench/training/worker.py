"""The process of one implementation that bench/throughput.py measures."""

from __future__ import annotations

import contextlib
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.common.timing import peak_mib, synchronize
from bench.common.worker import Handler
from bench.training.implementations import IMPLEMENTATIONS, Implementation, ThroughputSetting


@dataclass(frozen=True)
class StepCost:
    """What a training step took. seconds: wall clock; busy, kernel: processor seconds of all threads, and of them those
    inside the operating system; faults: page faults; real: positions without padding."""

    seconds: float
    busy: float
    kernel: float
    faults: int
    real: int


def start(name: str, setting: ThroughputSetting) -> Handler:
    """(steps, whether they count) -> a StepCost for each; None -> the other columns of the row."""
    implementation = IMPLEMENTATIONS[name](setting)

    def answer(request: tuple[int, bool] | None) -> Any:
        if request is None:
            return _totals(implementation, setting.device)
        steps, counts = request
        with _turn(implementation, setting.device):
            loading = implementation.loading
            costs = [_timed(implementation.step, setting.device) for _ in range(steps)]
            if not counts:
                implementation.loading = loading
        return costs

    return answer


@contextlib.contextmanager
def _turn(implementation: Implementation, device: torch.device) -> Iterator[None]:
    """One turn on a GPU that all implementations share: afterwards the allocator's reserve is freed for the next one,
    and an uncounted step at the beginning allocates it again."""
    if device.type == "cuda":
        loading = implementation.loading
        implementation.step()
        implementation.loading = loading
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(step: Callable[[], int], device: torch.device) -> StepCost:
    synchronize(device)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    real = step()
    synchronize(device)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    kernel = after.ru_stime - before.ru_stime
    busy = after.ru_utime - before.ru_utime + kernel
    return StepCost(seconds, busy, kernel, after.ru_minflt - before.ru_minflt, real)


def _totals(implementation: Implementation, device: torch.device) -> dict[str, Any]:
    totals = {
        "loading": implementation.loading,
        "once": implementation.once,
        "peak_mib": peak_mib(device),
        "attention": implementation.attention,
    }
    if device.type == "cuda":
        totals["reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20
        totals["host_syncs"] = _count_syncs(implementation.step)
    if implementation.compiled:
        counters = torch._dynamo.utils.counters
        totals["graph_breaks"] = sum(counters["graph_break"].values())
        totals["graphs"] = counters["stats"]["unique_graphs"]
    return totals


def _count_syncs(step: Callable[[], int]) -> int:
    """How often the host waits for the device in one step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)
