"""Small copies from the host to the device that neither side waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def copy_over(source: Tensor, target: Tensor) -> None:
    """source, on the host, into target. The source may change as soon as this returns."""
    if target.device.type == "cuda":
        source = source.pin_memory()  # from a pool that waits for copies before it gives memory out again
    target.copy_(source, non_blocking=True)


def on_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """One-dimensional arrays of one dtype as tensors on `device`: one copy, none on a CPU."""
    if device.type != "cuda":
        return [torch.from_numpy(array) for array in arrays]
    whole, places = side_by_side(arrays)
    there = torch.from_numpy(whole).pin_memory().to(device, non_blocking=True)
    return [there[place] for place in places]


def side_by_side(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, list[slice]]:
    """The arrays in one, and where each is: from a multiple of 64 bytes on, because kernels are compiled anew for
    addresses of another alignment."""
    step = 64 // arrays[0].itemsize
    starts = np.cumsum([0, *(-(-len(array) // step) * step for array in arrays)])
    whole = np.zeros(starts[-1], arrays[0].dtype)
    places = [slice(start, start + len(array)) for start, array in zip(starts.tolist(), arrays, strict=False)]
    for place, array in zip(places, arrays, strict=True):
        whole[place] = array
    return whole, places
