"""The decode batch: what every running sample needs in a step, in arrays that live as long as the engine.

A sample keeps its row while it runs; when one leaves, the last row moves into its place. So a step changes a few
numbers in place instead of building tensors, and addresses never change, as CUDA graphs want.

Where the host stays in step, which a CPU does, the arrays are the tensors that are computed with. Where it is late, the
device has a twin of them, which every step moves on by itself: the host's arrays only foretell what the twin holds, and
are copied over it when a sample joined, left or got a page. Drawn tokens are the device's alone until they are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from minimind.inference.drawn import SampleBuffer, SampledStep
from minimind.inference.requests import SamplingParams
from minimind.inference.scheduler import SequenceState
from minimind.inference.transfer import copy_over

_DTYPES: dict[str, type[np.generic]] = {
    "slot": np.int64, "offset": np.int64, "seed": np.int64,
    "position": np.int32, "length": np.int32, "active": np.int32, "top_k": np.int32, "table": np.int32,
    "temperature": np.float32, "top_p": np.float32, "min_p": np.float32,
    "repetition_penalty": np.float32, "presence_penalty": np.float32,
}  # fmt: skip
_COUNTERS = ("slot", "position")  # each begins two neighbours above that go up by one with every token


class DecodeBatch:
    """max_batch rows, of which the first `len(batch)` are in use; `samples` are theirs, in order.

    Tensors: token, slot, seed, offset int64 [max_batch]; position, length, top_k, active int32 [max_batch]; table int32
    [max_batch, max_pages]; temperature, top_p, min_p, repetition_penalty, presence_penalty, log_prob float32
    [max_batch]; history int32 [max_batch, vocab_size], how often a token occurred in the sample: kept up for samples
    with a penalty, anything in the others. active: 1 in rows in use; the others have 0, slot -1 and length 0.

    Between steps a row is ready for the next one: token and log_prob are those of the last draw, which has index
    `position` in the sample and belongs into row `slot` of the cache, if that is in a page that the sample has; length
    counts it.

    late: whether the tensors are a twin of the host's arrays, also on a CPU.
    """

    def __init__(
        self, max_batch: int, max_pages: int, page_size: int, vocab_size: int, device: torch.device, late: bool = False
    ) -> None:
        self.samples: list[SequenceState] = []
        self.max_batch = max_batch
        self._page_size, self._rows = page_size, np.arange(max_batch)
        shapes = {name: (max_batch, max_pages) if name == "table" else (max_batch,) for name in _DTYPES}
        sizes = [int(np.prod(shapes[name])) * np.dtype(kind).itemsize for name, kind in _DTYPES.items()]
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8)
        self._twin = torch.zeros_like(self._host, device=device) if late else None
        self._array: dict[str, np.ndarray] = {}
        self.tensor: dict[str, Tensor] = {}
        seen = self._host if self._twin is None else self._twin
        for name, host, on_device in zip(_DTYPES, self._host.split(sizes), seen.split(sizes), strict=True):
            self._array[name] = host.numpy().view(_DTYPES[name]).reshape(shapes[name])
            dtype = torch.from_numpy(self._array[name]).dtype
            self.tensor[name] = on_device.view(dtype).view(shapes[name])
        self._counters = [self.tensor[name].as_strided((2, max_batch), (max_batch, 1)) for name in _COUNTERS]
        self._array["slot"].fill(-1)
        self._changed = True  # the arrays hold what the twin does not
        self._landing = SampleBuffer(max_batch, device, late)
        self.tensor |= {"token": self._landing.token, "log_prob": self._landing.log_prob}
        self.tensor["history"] = torch.zeros(max_batch, vocab_size, dtype=torch.int32, device=device)
        if self._twin is None:
            self._history_array = self.tensor["history"].numpy()
        self._penalised = np.zeros(max_batch, dtype=bool)
        self._needs_host = np.zeros(max_batch, dtype=bool)
        self._limit = np.zeros(max_batch, dtype=np.int32)
        self._order: list[int] | None = None
        self._views: dict[tuple[int, int], dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def join(
        self, sample: SequenceState, params: SamplingParams, seed: int, limit: int = 2**31 - 1, needs_host: bool = False
    ) -> None:
        """A sample whose tokens are all computed; its next token is about to be drawn.

        limit: of its tokens, prompt included. needs_host: whether the host has a say in every draw.
        """
        row = sample.row = len(self.samples)
        self.samples.append(sample)
        values, last = self._array, sample.computed - 1
        values["length"][row], values["position"][row], values["active"][row] = sample.computed, last, 1
        values["slot"][row] = sample.pages[last // self._page_size] * self._page_size + last % self._page_size
        values["seed"][row] = seed
        values["offset"][row] = len(sample.tokens) - sample.prompt_length
        values["table"][row, : len(sample.pages)] = sample.pages
        values["temperature"][row], values["top_k"][row] = params.temperature, params.top_k
        values["top_p"][row], values["min_p"][row] = params.top_p, params.min_p
        values["repetition_penalty"][row] = params.repetition_penalty
        values["presence_penalty"][row] = params.presence_penalty
        self._limit[row], self._needs_host[row] = limit, needs_host
        self._penalised[row] = params.repetition_penalty != 1 or params.presence_penalty != 0
        if self._penalised[row]:
            history = self.tensor["history"]
            counts = np.bincount(sample.tokens, minlength=history.shape[1]).astype(np.int32)
            copy_over(torch.from_numpy(counts), history[row])
        self._order, self._changed = None, True

    def leave(self, sample: SequenceState) -> None:
        """Take a sample out."""
        row, last = sample.row, len(self.samples) - 1
        if row != last:
            for array in (*self._array.values(), self._penalised, self._needs_host, self._limit):
                array[row] = array[last]
            moved = ("token", "log_prob", "history") if self._penalised[row] else ("token", "log_prob")
            for name in moved:
                self.tensor[name][row].copy_(self.tensor[name][last])
            self.samples[row] = self.samples[last]
            self.samples[row].row = row
        self._array["slot"][last], self._array["length"][last], self._array["active"][last] = -1, 0, 0
        self.samples.pop()
        sample.row = -1
        self._order, self._changed = None, True

    def clear(self) -> None:
        """Take all samples out."""
        for sample in self.samples:
            sample.row = -1
        self.samples.clear()
        self._array["slot"].fill(-1)
        self._array["length"].fill(0)
        self._array["active"].fill(0)
        self._order, self._changed = None, True

    def set_last_page(self, sample: SequenceState) -> None:
        """The sample's last page is new, and its next token goes there."""
        row, page, place = sample.row, sample.pages[-1], sample.computed % self._page_size
        self._array["table"][row, len(sample.pages) - 1] = page
        self._array["slot"][row] = page * self._page_size + place
        self._changed = True

    def needs_host(self, first: int = 0) -> bool:
        """Whether the host has a say in the next token of one of the rows from `first` on."""
        return bool(self._needs_host[first : len(self.samples)].any())

    def at_limit(self) -> list[SequenceState]:
        """The samples that end with their last draw, whatever it was."""
        rows = len(self.samples)
        full = np.flatnonzero(self._array["length"][:rows] >= self._limit[:rows])
        return [self.samples[row] for row in full]

    def views(self, rows: int, first: int = 0) -> dict[str, Tensor]:
        """Rows first..first + rows of every tensor. Made once for each such part of the batch."""
        if (first, rows) not in self._views:
            self._views[first, rows] = {name: t[first : first + rows] for name, t in self.tensor.items()}
        return self._views[first, rows]

    def upload(self) -> None:
        """Bring the twin up to date: one copy, and none where nothing but tokens came since the last."""
        if self._twin is not None and self._changed:
            copy_over(self._host, self._twin)
        self._changed = False

    def take(self, first: int, tokens: Tensor, log_probs: Tensor) -> None:
        """Take up what was drawn for the rows from `first` on: int64 [n], float32 [n]. Nothing waits for the device."""
        last = first + len(tokens)
        if self._twin is None:
            ids = tokens.numpy()
            self._landing.host_token[first:last] = ids
            self._landing.host_log_prob[first:last] = log_probs.numpy()
            if self._penalised[first:last].any():  # in NumPy: a third of the time of the tensor operation
                self._history_array[self._rows[first:last], ids] += 1
            return
        b = self.views(len(tokens), first)
        b["token"].copy_(tokens)
        b["log_prob"].copy_(log_probs)
        b["history"].scatter_add_(1, tokens[:, None], b["active"][:, None])
        for two in self._counters:
            two[:, first:last].add_(b["active"])

    def advance(self, first: int = 0) -> None:
        """What `take` did to the twin's rows from `first` on, here: they have another token."""
        rows = len(self.samples)
        for name in ("slot", "offset", "position", "length"):
            self._array[name][first:rows] += 1

    def drawn(self, decoded: int, in_step: bool) -> SampledStep:
        """The tokens of all rows on their way to the host; those of the first `decoded` rows came from decoding."""
        if self._order is None:
            samples = self.samples
            self._order = sorted(range(len(samples)), key=lambda row: (samples[row].arrival, samples[row].index))
        return SampledStep(self.samples.copy(), self._order, decoded, in_step, *self._landing.fetch())

    @contextlib.contextmanager
    def blank(self) -> Iterator[None]:
        """Inside, no row of the twin is in use, and steps can be run on it for practice; afterwards it is as before."""
        assert self._twin is not None
        before = self._landing.device.clone()
        self._twin.zero_()
        self.tensor["slot"].fill_(-1)
        try:
            yield
        finally:
            self._landing.device.copy_(before)
            self._changed = True
            self.upload()
