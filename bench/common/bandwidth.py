"""How fast this machine reads memory: the limit of decoding, where every token reads every weight once."""

from __future__ import annotations

import time

import torch


def read_bandwidth(num_bytes: int, device: torch.device, seconds: float = 1.0) -> float:
    """Bytes per second of reading a buffer of `num_bytes` again and again with torch's threads: the best of several
    reductions over `seconds` each. A buffer that fits a cache is read from there, as a small model's weights are."""
    words = max(num_bytes // 4, 1)
    x = torch.ones(words, dtype=torch.float32, device=device)
    matrix, vector = x[: words // 512 * 512].view(-1, 512), torch.ones(512, device=device)
    readers = [lambda: x.sum(), lambda: x.amax(), lambda: x.view(torch.int32).sum(dtype=torch.int32)]
    if matrix.numel():
        readers.append(lambda: matrix @ vector)
    return words * 4 / min(_fastest(read, device, seconds) for read in readers)


def _fastest(read, device: torch.device, seconds: float) -> float:
    """The fifth of the times that is shortest, of its longest: one lucky run is no limit."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        _wait(device)
        start = time.perf_counter()
        read()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 5]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
