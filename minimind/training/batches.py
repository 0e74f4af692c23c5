"""Batches on the training device: copied while the previous step runs, and all of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from minimind.data import Batch, PackedLoader
from minimind.objectives.next_token import TokenBatch

_MULTIPLE = 64  # the number of boundaries is a multiple of it


class Loader(Protocol):
    """This rank's share of the micro-batches, on the device. A batch has num_targets, and over all ranks
    global_num_targets and global_weight; the loss is divided by the latter."""

    @property
    def host(self) -> Any:
        """The newest batch, on the host."""

    def next_batch(self) -> Any: ...

    def fetch(self) -> None:
        """Start preparing the next batch."""

    def state(self) -> dict[str, Any]:
        """The position and everything else that is needed to continue, as plain values and tensors."""

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class _Ahead:
    """A batch that was fetched ahead: as the loader made it, and on the device."""

    host: Batch
    batch: Any


class DeviceBatches:
    """The batches of `loader`, in its order. `fetch` starts the copy of the next one, so that `next_batch` need not
    wait if it is called while the device computes.

    cu_seqlens is padded with empty documents to the same length in all batches, so that a compiled step fits them all.
    An empty document costs FlashAttention a block and 128 rows of scratch (batch_size.py), so the length is only a
    quarter above that of the loader's first window; where a later batch needs more, it grows by half, and a compiled
    step is compiled again.

    place(batch, device, boundaries): makes the loss's input from a loader's batch; `to_device` by default.
    """

    def __init__(self, loader: PackedLoader, device: torch.device, place: Callable[..., Any] | None = None) -> None:
        self.loader, self.device, self.place = loader, device, place or to_device
        self.boundaries = _round_up(loader.max_segments + 1)
        self._ahead: _Ahead | None = None
        self._position = loader.state()
        self.host: Batch | None = None  # the newest batch on the host

    def next_batch(self) -> Any:
        self.fetch()
        assert self._ahead is not None
        ahead, self._ahead = self._ahead, None
        self._position, self.host = self.loader.state(), ahead.host
        return ahead.batch

    def fetch(self) -> None:
        if self._ahead is None:
            host = self.loader.next_batch()
            self._ahead = _Ahead(host, self.to_device(host))

    def to_device(self, batch: Batch) -> Any:
        if len(batch.cu_seqlens) > self.boundaries:
            self.boundaries = _round_up(max(len(batch.cu_seqlens), self.boundaries * 3 // 2))
        return self.place(batch, self.device, self.boundaries)

    def state(self) -> dict[str, int]:
        """The loader's position after the newest batch that was returned."""
        return self._position

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state(state)
        self._ahead, self._position = None, self.loader.state()


def to_device(batch: Batch, device: torch.device, boundaries: int | None = None) -> TokenBatch:
    """The packed rows as tensors. boundaries: the padded length of cu_seqlens."""
    more = [] if batch.loss_weights is None else [batch.loss_weights]
    input_ids, targets, bounds, *weights = move(batch, device, boundaries, more)
    counts = batch.num_targets, batch.global_num_targets
    if not weights:
        return TokenBatch(input_ids, targets, bounds, *counts)
    return TokenBatch(input_ids, targets, bounds, *counts, weights[0], batch.global_weight)


def move(
    batch: Batch, device: torch.device, boundaries: int | None, more: Sequence[np.ndarray] = ()
) -> list[torch.Tensor]:
    """input_ids, targets, cu_seqlens and `more` as tensors; the copy to a GPU is asynchronous."""
    cu_seqlens = batch.cu_seqlens
    if boundaries is not None:
        cu_seqlens = np.pad(cu_seqlens, (0, boundaries - len(cu_seqlens)), mode="edge")
    parts = [torch.from_numpy(array) for array in (batch.input_ids, batch.targets, cu_seqlens, *more)]
    if device.type == "cuda":
        parts = [part.pin_memory().to(device, non_blocking=True) for part in parts]
    return parts


def _round_up(n: int) -> int:
    return -(-n // _MULTIPLE) * _MULTIPLE
