"""The decode batch: what every running sample needs in a step, in arrays that live as long as the engine.

A sample keeps its row while it runs; when one leaves, the last row moves into its place. So a step changes a few
numbers in place instead of building tensors. On a GPU all arrays lie in one pinned buffer with a twin on the device,
and one copy a step brings it up to date; addresses never change, as CUDA graphs want.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minimind.inference.requests import SamplingParams
from minimind.inference.scheduler import Sample

_DTYPES: dict[str, type[np.generic]] = {
    "token": np.int64, "slot": np.int64, "seed": np.int64, "offset": np.int64,
    "position": np.int32, "length": np.int32, "top_k": np.int32, "table": np.int32,
    "temperature": np.float32, "top_p": np.float32, "min_p": np.float32,
    "repetition_penalty": np.float32, "presence_penalty": np.float32,
}  # fmt: skip


class DecodeBatch:
    """max_batch rows, of which the first `len(batch)` are in use; `samples` are theirs, in order.

    On the device: token, slot, seed, offset int64 [max_batch]; position, length, top_k int32 [max_batch]; table int32
    [max_batch, max_pages]; temperature, top_p, min_p, repetition_penalty, presence_penalty float32 [max_batch];
    history int32 [max_batch, vocab_size], how often a token occurred in the sample: kept up for samples with a penalty,
    anything in the others. Rows not in use have slot -1 and length 0.
    """

    def __init__(
        self, max_batch: int, max_pages: int, page_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self.samples: list[Sample] = []
        self.max_batch = max_batch
        self._page_size, self._rows = page_size, np.arange(max_batch)
        shapes = {name: (max_batch, max_pages) if name == "table" else (max_batch,) for name in _DTYPES}
        sizes = [int(np.prod(shapes[name])) * np.dtype(kind).itemsize for name, kind in _DTYPES.items()]
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros_like(self._host, device=device) if device.type == "cuda" else self._host
        self._array: dict[str, np.ndarray] = {}
        self.tensor: dict[str, Tensor] = {}
        for name, host, on_device in zip(
            _DTYPES, self._host.split(sizes), self._device.split(sizes), strict=True
        ):
            self._array[name] = host.numpy().view(_DTYPES[name]).reshape(shapes[name])
            dtype = torch.from_numpy(self._array[name]).dtype
            self.tensor[name] = on_device.view(dtype).view(shapes[name])
        self._array["slot"].fill(-1)
        self.history = torch.zeros(max_batch, vocab_size, dtype=torch.int32, device=device)
        if device.type == "cpu":
            self._history_array = self.history.numpy()
        self._penalised = np.zeros(max_batch, dtype=bool)
        self._row_ids = torch.arange(max_batch, device=device)
        self._views: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def join(self, sample: Sample, params: SamplingParams, seed: int) -> None:
        """A sample whose tokens are all computed; its next token is about to be drawn."""
        row = sample.row = len(self.samples)
        self.samples.append(sample)
        values = self._array
        values["length"][row] = sample.computed
        values["seed"][row] = seed
        values["offset"][row] = len(sample.tokens) - sample.prompt_length
        values["table"][row, : len(sample.pages)] = sample.pages
        values["temperature"][row], values["top_k"][row] = params.temperature, params.top_k
        values["top_p"][row], values["min_p"][row] = params.top_p, params.min_p
        values["repetition_penalty"][row] = params.repetition_penalty
        values["presence_penalty"][row] = params.presence_penalty
        self._penalised[row] = params.repetition_penalty != 1 or params.presence_penalty != 0
        if self._penalised[row]:
            counts = np.bincount(sample.tokens, minlength=self.history.shape[1]).astype(np.int32)
            self.history[row].copy_(torch.from_numpy(counts))

    def leave(self, sample: Sample) -> None:
        """Take a sample out."""
        row, last = sample.row, len(self.samples) - 1
        if row != last:
            for array in self._array.values():
                array[row] = array[last]
            self._penalised[row] = self._penalised[last]
            if self._penalised[row]:
                self.history[row].copy_(self.history[last])
            self.samples[row] = self.samples[last]
            self.samples[row].row = row
        self._array["slot"][last], self._array["length"][last] = -1, 0
        self.samples.pop()
        sample.row = -1

    def clear(self) -> None:
        """Take all samples out."""
        for sample in self.samples:
            sample.row = -1
        self.samples.clear()
        self._array["slot"].fill(-1)
        self._array["length"].fill(0)

    def set_last_page(self, sample: Sample) -> None:
        self._array["table"][sample.row, len(sample.pages) - 1] = sample.pages[-1]

    def views(self, rows: int) -> dict[str, Tensor]:
        """The first `rows` rows of every tensor, history among them. Made once for each number of rows."""
        if rows not in self._views:
            views = {name: tensor[:rows] for name, tensor in self.tensor.items()}
            self._views[rows] = {**views, "history": self.history[:rows]}
        return self._views[rows]

    def next_step(self) -> None:
        """Make room for the token that is computed next, in every row, and bring the device up to date."""
        rows, size = self._rows[: len(self.samples)], self._page_size
        length = self._array["length"][: len(rows)]
        position = self._array["position"][: len(rows)]
        position[:] = length
        length += 1
        slot = self._array["slot"][: len(rows)]
        slot[:] = self._array["table"][rows, position // size]
        slot *= size
        slot += position % size
        self.upload()

    def drawn(self, tokens: Tensor, ids: np.ndarray) -> None:
        """Take up the tokens that were drawn for all rows: int64 [len(batch)], on the device and here."""
        rows = len(self.samples)
        self._array["token"][:rows] = ids
        self._array["offset"][:rows] += 1
        if not self._penalised[:rows].any():
            return
        if self.history.device.type == "cpu":  # a third of the time of the tensor operation
            self._history_array[self._rows[:rows], ids] += 1
        else:
            self.history[self._row_ids[:rows], tokens] += 1

    def upload(self) -> None:
        """Bring the device up to date: one copy, none on a CPU."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
