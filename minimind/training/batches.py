"""A loader's batches on the training device: copied while the step before runs, and all of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minimind.data import Batch, PackedLoader
from minimind.objectives.next_token import TokenBatch

_MULTIPLE = 64  # of the number of boundaries


@dataclass(frozen=True)
class _Ahead:
    """A batch on its way to the device, and as the loader gave it."""

    host: Batch
    batch: Any


class DeviceBatches:
    """The batches of `loader`, in its order. `fetch` starts the copy of the next one: called while the device still
    computes, it makes `next_batch` wait for nothing.

    cu_seqlens is padded with empty documents to one length for all batches, so that a compiled step fits each of them
    and nothing is compiled twice. Each is a block of FlashAttention's and 128 rows of its scratch (memory.py), so there
    are a quarter more than batches of the loader's first window need; where a later one needs still more, the length
    grows by half, and a compiled step is compiled once more.

    place(batch, device, boundaries) -> what the loss takes, for batches that `to_device` does not know.
    """

    def __init__(self, loader: PackedLoader, device: torch.device, place: Callable[..., Any] | None = None) -> None:
        self.loader, self.device, self.place = loader, device, place or to_device
        self.boundaries = _round_up(loader.max_segments + 1)
        self._ahead: _Ahead | None = None
        self._place = loader.state()
        self.host: Batch | None = None  # what the newest batch was on the host

    def next_batch(self) -> Any:
        self.fetch()
        assert self._ahead is not None
        ahead, self._ahead = self._ahead, None
        self._place, self.host = self.loader.state(), ahead.host
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
        """The loader's place behind the newest batch that was handed out."""
        return self._place

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state(state)
        self._ahead, self._place = None, self.loader.state()


def to_device(batch: Batch, device: torch.device, boundaries: int | None = None) -> TokenBatch:
    """The packed rows as tensors; boundaries: the length that cu_seqlens is padded to."""
    more = [] if batch.loss_weights is None else [batch.loss_weights]
    input_ids, targets, bounds, *weights = move(batch, device, boundaries, more)
    counts = batch.num_targets, batch.global_num_targets
    if not weights:
        return TokenBatch(input_ids, targets, bounds, *counts)
    return TokenBatch(input_ids, targets, bounds, *counts, weights[0], batch.global_weight)


def move(
    batch: Batch, device: torch.device, boundaries: int | None, more: Sequence[np.ndarray] = ()
) -> list[torch.Tensor]:
    """input_ids, targets, cu_seqlens and `more` as tensors; the copy to a GPU is not waited for."""
    cu_seqlens = batch.cu_seqlens
    if boundaries is not None:
        cu_seqlens = np.pad(cu_seqlens, (0, boundaries - len(cu_seqlens)), mode="edge")
    parts = [torch.from_numpy(array) for array in (batch.input_ids, batch.targets, cu_seqlens, *more)]
    if device.type == "cuda":
        parts = [part.pin_memory().to(device, non_blocking=True) for part in parts]
    return parts


def _round_up(n: int) -> int:
    return -(-n // _MULTIPLE) * _MULTIPLE
