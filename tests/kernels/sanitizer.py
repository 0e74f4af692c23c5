"""Checks launches in Triton's interpreter for addresses outside the launch's tensors and for races between programs, as
compute-sanitizer does on a GPU.

A program must not store where another one stores, nor load where another one stores, since the order of programs is
undefined. Atomic additions may share an address.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from minimind.kernels import triton_support

_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
_atomic = InterpreterBuilder.create_atomic_rmw
_launch = triton_support._launch


class Sanitizer:
    """The byte addresses that one launch loads from and stores to."""

    def __init__(self, kernel: str, tensors: list[Tensor]) -> None:
        self.kernel = kernel
        self.extents = [_extent(t) for t in tensors if t.numel()]
        self.loads: dict[tuple, list[np.ndarray]] = defaultdict(list)
        self.stores: dict[tuple, list[np.ndarray]] = defaultdict(list)

    def touch(self, pointers, mask, program: tuple, seen: dict[tuple, list[np.ndarray]] | None) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.broadcast_to(pointers.data, np.broadcast(pointers.data, mask.data).shape)[mask.data]
        inside = np.zeros(addresses.shape, bool)
        for first, end in self.extents:
            inside |= (addresses >= first) & (addresses + np.uint64(size) <= end)
        if not inside.all():
            raise AssertionError(f"{self.kernel}, program {program}: an address outside all tensors")
        if seen is not None:
            seen[program].append(addresses.ravel())

    def finish(self) -> None:
        """AssertionError if two programs conflict."""
        stored, by = _together(self.stores)
        if (stored[1:] == stored[:-1]).any():
            raise AssertionError(f"{self.kernel}: two programs store to one address")
        loaded, program = _together(self.loads)
        place = np.searchsorted(stored, loaded)
        found = place < len(stored)
        found[found] = stored[place[found]] == loaded[found]
        if (by[place[found]] != program[found]).any():
            raise AssertionError(f"{self.kernel}: a program loads what another one stores")


def _extent(tensor: Tensor) -> tuple[np.uint64, np.uint64]:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return np.uint64(first), np.uint64(first + (last + 1) * tensor.element_size())


def _together(seen: dict[tuple, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(sorted addresses, the program of each), with each address once per program."""
    parts = [np.unique(np.concatenate(arrays)) for arrays in seen.values()]
    addresses = np.concatenate([*parts, np.empty(0, np.uint64)])
    program = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.argsort(addresses, kind="stable")
    return addresses[order], program[order]


_now: list[Sanitizer] = []  # the sanitizer of the running launch


def _checked_load(self, pointers, mask, *rest):
    if _now:
        _now[-1].touch(pointers, mask, self.grid_idx, _now[-1].loads)
    return _load(self, pointers, mask, *rest)


def _checked_store(self, pointers, value, mask, *rest):
    if _now:
        _now[-1].touch(pointers, mask, self.grid_idx, _now[-1].stores)
    return _store(self, pointers, value, mask, *rest)


def _checked_atomic(self, operation, pointers, value, mask, *rest):
    if _now:
        _now[-1].touch(pointers, mask, self.grid_idx, None)
    return _atomic(self, operation, pointers, value, mask, *rest)


def run(kernel, grid, args, constants, num_warps, num_stages) -> None:
    """Replaces triton_support._run."""
    with _watching(kernel.__name__, args) as sanitizer:
        _launch(kernel, grid, args, constants, num_warps, num_stages)
    sanitizer.finish()


@contextlib.contextmanager
def _watching(kernel: str, args: tuple) -> Iterator[Sanitizer]:
    _now.append(Sanitizer(kernel, [a for a in args if isinstance(a, Tensor)]))
    try:
        yield _now[-1]
    finally:
        _now.pop()


def install() -> None:
    InterpreterBuilder.create_masked_load = _checked_load
    InterpreterBuilder.create_masked_store = _checked_store
    InterpreterBuilder.create_atomic_rmw = _checked_atomic
