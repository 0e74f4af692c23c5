"""Memory in huge pages, for weights that every decoded token reads from the first to the last.

In pages of 4 KiB an address is translated anew for every 64 lines read. In pages of 2 MiB a step of minimind2-small in
bfloat16 took 2.65 instead of 3.0 ms on one core (Zen 4, in a virtual machine).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2 << 20
_ALIGNMENT = 64


def empty(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tensors of these shapes, uninitialised: on Linux's CPUs side by side in huge pages where the system gives them
    (it is asked, not told), elsewhere each as torch.empty makes it."""
    sizes = [-(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape in shapes]
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or not sum(sizes):
        return [torch.empty(tuple(shape), dtype=dtype, device=device) for shape in shapes]
    length = (-(-sum(sizes) // _PAGE) + 1) * _PAGE  # a page more: the mapping begins where the system likes
    mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE
    parts = memory[start : start + sum(sizes)].split(sizes)
    return [
        part[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
        for part, shape in zip(parts, shapes, strict=True)
    ]
