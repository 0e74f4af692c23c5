"""The decode step as CUDA graphs: one for batch 1, 2, 4, ..., replayed with the batch padded to the next of them.

Captured largest first into one memory pool, so that the smaller ones find room in what the largest took. Rows beyond
the batch have slot -1 and length 0: they write nothing and attend to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def graph_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and max_batch itself, largest first."""
    powers = [1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch]
    return [max_batch, *reversed(powers)]


class DecodeGraphs:
    """decode(rows) -> logits [rows, V] reads and writes only tensors that stay where they are."""

    def __init__(self, decode: Callable[[int], Tensor], max_batch: int) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in graph_sizes(max_batch):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles and loads kernels, which a capture must not
                decode(size)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = decode(size)
            self._graphs[size] = graph, logits
        self._sizes = sorted(self._graphs)

    def __call__(self, rows: int) -> Tensor:
        """Logits [rows, V], valid until the next call."""
        graph, logits = self._graphs[next(size for size in self._sizes if size >= rows)]
        graph.replay()
        return logits[:rows]
