"""A contender of bench/throughput.py in a process of its own: its memory is its own, and so are its threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.common.timing import peak_mib, start_deaf
from bench.training.implementations import MAKERS, ThroughputSetting


@dataclass(frozen=True)
class WorkerStep:
    """seconds of the wall clock; busy and kernel: processor seconds of all threads, and those of them in the kernel;
    faults: pages that the kernel had to give; real: positions that were no padding."""

    seconds: float
    busy: float
    kernel: float
    faults: int
    real: int


def work(name: str, setting: ThroughputSetting, pipe: Connection) -> None:
    """Told a number of steps and whether they count, answers with the Steps; told None, with what else it knows."""
    contender = MAKERS[name](setting)
    pipe.send("ready")
    while (told := pipe.recv()) is not None:
        count, counts = told
        with _turn(contender, setting.device):
            loading = contender.loading
            steps = [_timed(contender.step, setting.device) for _ in range(count)]
            if not counts:
                contender.loading = loading
        pipe.send(steps)
    pipe.send(_rest(contender, setting.device))


@contextlib.contextmanager
def _turn(contender: Any, device: torch.device) -> Iterator[None]:
    """A turn on a GPU that all contenders share: what the allocator holds in reserve goes back at its end, for the next
    one's activations, and an uncounted step fetches it again at the next beginning."""
    if device.type == "cuda":
        loading = contender.loading
        contender.step()
        contender.loading = loading
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(step: Any, device: torch.device) -> WorkerStep:
    _wait(device)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    real = step()
    _wait(device)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    kernel = after.ru_stime - before.ru_stime
    busy = after.ru_utime - before.ru_utime + kernel
    return WorkerStep(seconds, busy, kernel, after.ru_minflt - before.ru_minflt, real)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rest(contender: Any, device: torch.device) -> dict[str, Any]:
    rest = {
        "loading": contender.loading,
        "once": contender.once,
        "peak_mib": peak_mib(device),
        "attention": contender.attention,
    }
    if device.type == "cuda":
        rest["reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20
        rest["host_syncs"] = _count_syncs(contender.step)
    if contender.compiled:
        counters = torch._dynamo.utils.counters
        rest["graph_breaks"] = sum(counters["graph_break"].values())
        rest["graphs"] = counters["stats"]["unique_graphs"]
    return rest


def _count_syncs(step: Any) -> int:
    """How often the host waits for the device in one step."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


class ThroughputWorker:
    """That process, as this one sees it. Raises ValueError where it died."""

    def __init__(self, name: str, setting: ThroughputSetting) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, setting, theirs), daemon=True)
        start_deaf(self.process)
        theirs.close()  # so that a dead worker is an end of file here
        self.steps: list[WorkerStep] = []
        self._recv()

    def run(self, steps: int, counts: bool) -> None:
        self.pipe.send((steps, counts))
        taken = self._recv()
        if counts:
            self.steps += taken

    def finish(self) -> dict[str, Any]:
        self.pipe.send(None)
        rest = self._recv()
        self.process.join()
        return rest

    def _recv(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise ValueError(
                f"--peer {self.name}: its process died (see above); if memory ran out, use fewer --rows or peers"
            ) from None
