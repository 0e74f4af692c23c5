"""A decode step as graphs: one for batch 1, 2, 4, ..., replayed with the batch padded to the next of them.

On a GPU they are CUDA graphs, captured largest first into one memory pool, so that the smaller ones find room in what
the largest took. On a CPU, where tests run them, a graph is the call itself. Rows beyond the batch have slot -1 and
length 0: they write nothing and attend to nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


def graph_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and max_batch itself, largest first."""
    powers = [1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch]
    return [max_batch, *reversed(powers)]


class DecodeGraphs(Generic[T]):
    """step(rows) reads and writes only tensors that stay where they are. It runs once for each size before its graph
    is captured, to compile and load kernels, which a capture must not."""

    def __init__(self, step: Callable[[int], T], max_batch: int, device: torch.device) -> None:
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._replays: dict[int, Callable[[], T]] = {}
        for size in graph_sizes(max_batch):
            run = functools.partial(step, size)
            self._replays[size] = _plain(run) if pool is None else _captured(run, pool)
        self._sizes = sorted(self._replays)

    def __call__(self, rows: int) -> T:
        """What the step for at least so many rows returned, valid until the next call."""
        return self._replays[next(size for size in self._sizes if size >= rows)]()


def _plain(run: Callable[[], T]) -> Callable[[], T]:
    run()
    return run


def _captured(run: Callable[[], T], pool: Any) -> Callable[[], T]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    def replay() -> T:
        graph.replay()
        return result

    return replay
