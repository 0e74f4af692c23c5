"""Counts the bytes that operators move, without computing anything: on the meta device tensors have shapes alone.

What is counted is arithmetic, not a measurement: every operator reads each of its inputs once and writes each of its
outputs once, views cost nothing, and no cache helps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Moved:
    """Bytes read and written by the forward and by the backward, operators of each, and the most bytes that were held
    at once beside what was given."""

    forward: int
    backward: int
    forward_ops: int
    backward_ops: int
    peak: int


def traffic(function: Callable[..., Any], *tensors: Tensor) -> Moved:
    """Count the traffic of function(*tensors) and of the gradients of all its outputs. tensors: of any device; only
    their shapes, dtypes and requires_grad are used."""
    inputs = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in tensors]
    with _Counter() as forward:
        outputs = [out for out in tree_leaves(function(*inputs)) if isinstance(out, Tensor)]
    outputs = [out for out in outputs if out.requires_grad]
    given = [torch.ones_like(out) for out in outputs]
    learnt = [t for t in inputs if t.requires_grad]
    with _Counter(forward.live) as backward:
        if learnt:
            torch.autograd.grad(outputs, learnt, given, allow_unused=True)
    return Moved(forward.moved, backward.moved, forward.ops, backward.ops, max(forward.peak, backward.peak))


class _Counter(TorchDispatchMode):
    def __init__(self, live: int = 0) -> None:
        super().__init__()
        self.moved = self.ops = 0
        self.live = self.peak = live
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        for tensor in given:
            self._know(tensor)
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            self._hold(tensor)
        storages = {t.untyped_storage()._cdata for t in given}
        is_view = any(t.untyped_storage()._cdata in storages for t in made) and not func._schema.is_mutable
        if not is_view and "empty" not in func._schema.name:
            self.ops += 1
            self.moved += sum(map(_bytes, {id(t): t for t in given}.values())) + sum(map(_bytes, made))
        return out

    def _know(self, tensor: Tensor) -> None:
        """Not held by the function. The address is forgotten with the storage: another one may get it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._known.discard, storage._cdata)

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size, address = storage.nbytes(), storage._cdata
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def _bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's distinct numbers: a dimension of stride 0 repeats one number."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride or not size else 1
    return numbers * tensor.element_size()
