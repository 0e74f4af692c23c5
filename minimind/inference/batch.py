"""The decode batch: the state of every running sequence on the host and the device, and the copies between them.

A sequence keeps its row while it runs; when one leaves, the last row moves into its place. So a step changes a few
numbers in place instead of building tensors, and addresses never change, as CUDA graphs require.

On a CPU the host's arrays are the tensors of the computation. On a GPU the host is one step late: it launches step
t + 1 before it reads the tokens of step t, so the GPU never waits for it. The device then has a mirror of the arrays,
which every step advances by itself; the host's arrays predict its content, and are copied over it when a sequence
joins, leaves or gets a page. Sampled tokens stay on the device, where the next step uses them, and are copied to pinned
memory; an event tells when the copy is complete. On a CPU, being late would gain nothing and cost an extra forward for
every sequence that ends with a stop token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimind.inference.requests import SamplingParams, TopLogProbs
from minimind.inference.scheduler import SequenceState

_DTYPES: dict[str, type[np.generic]] = {
    "slot": np.int64, "offset": np.int64, "seed": np.int64,
    "position": np.int32, "length": np.int32, "active": np.int32, "top_k": np.int32, "page_table": np.int32,
    "temperature": np.float32, "top_p": np.float32, "min_p": np.float32,
    "repetition_penalty": np.float32, "presence_penalty": np.float32,
}  # fmt: skip
_COUNTERS = ("slot", "position")  # the first of two adjacent arrays above that grow by one with every token
_SAMPLE_BYTES = 8 + 4  # of a row: its token and its log-probability


def host_is_late(device: torch.device) -> bool:
    """Whether an engine on `device` reads sampled tokens one step late."""
    return device.type == "cuda"


class DecodeBatch:
    """max_batch rows, of which the first `len(batch)` are in use; `sequences` are their sequences, in order.

    Tensors: token, slot, seed, offset int64 [max_batch]; position, length, top_k, active int32 [max_batch]; page_table
    int32 [max_batch, max_pages]; temperature, top_p, min_p, repetition_penalty, presence_penalty, log_prob float32
    [max_batch]; history int32 [max_batch, vocab_size], how often each token occurred, kept up to date only for
    sequences with a penalty. active: 1 in rows in use; the other rows have slot -1 and length 0.

    Between steps a row is ready for the next one: token and log_prob are of the last sampled token, which has index
    `position` in the sequence and belongs in row `slot` of the cache, if the sequence has that page; length counts it.

    late: whether the tensors are a mirror of the host's arrays, also on a CPU.
    """

    def __init__(
        self, max_batch: int, max_pages: int, page_size: int, vocab_size: int, device: torch.device, late: bool = False
    ) -> None:
        self.sequences: list[SequenceState] = []
        self.max_batch = max_batch
        self._page_size, self._rows = page_size, np.arange(max_batch)
        shapes = {name: (max_batch, max_pages) if name == "page_table" else (max_batch,) for name in _DTYPES}
        sizes = [int(np.prod(shapes[name])) * np.dtype(kind).itemsize for name, kind in _DTYPES.items()]
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8)
        self._mirror = torch.zeros_like(self._host, device=device) if late else None
        self._array: dict[str, np.ndarray] = {}
        self.tensor: dict[str, Tensor] = {}
        source = self._host if self._mirror is None else self._mirror
        for name, host, memory in zip(_DTYPES, self._host.split(sizes), source.split(sizes), strict=True):
            self._array[name] = host.numpy().view(_DTYPES[name]).reshape(shapes[name])
            dtype = torch.from_numpy(self._array[name]).dtype
            self.tensor[name] = memory.view(dtype).view(shapes[name])
        self._counters = [self.tensor[name].as_strided((2, max_batch), (max_batch, 1)) for name in _COUNTERS]
        self._array["slot"].fill(-1)
        self._changed = True  # the arrays differ from the mirror
        self._sampled = SampleBuffer(max_batch, device, late)
        self.tensor |= {"token": self._sampled.token, "log_prob": self._sampled.log_prob}
        self.tensor["history"] = torch.zeros(max_batch, vocab_size, dtype=torch.int32, device=device)
        if self._mirror is None:
            self._history_array = self.tensor["history"].numpy()
        self._penalised = np.zeros(max_batch, dtype=bool)
        self._needs_host = np.zeros(max_batch, dtype=bool)
        self._limit = np.zeros(max_batch, dtype=np.int32)
        self._order: list[int] | None = None
        self._views: dict[tuple[int, int], dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.sequences)

    def join(
        self,
        sequence: SequenceState,
        params: SamplingParams,
        seed: int,
        limit: int = 2**31 - 1,
        needs_host: bool = False,
    ) -> None:
        """Add a sequence whose tokens are all computed; its next token is about to be sampled.

        limit: of its tokens, including the prompt. needs_host: whether the host takes part in sampling every token.
        """
        row = sequence.row = len(self.sequences)
        self.sequences.append(sequence)
        values, last = self._array, sequence.computed - 1
        values["length"][row], values["position"][row], values["active"][row] = sequence.computed, last, 1
        values["slot"][row] = sequence.pages[last // self._page_size] * self._page_size + last % self._page_size
        values["seed"][row] = seed
        values["offset"][row] = len(sequence.tokens) - sequence.prompt_length
        values["page_table"][row, : len(sequence.pages)] = sequence.pages
        values["temperature"][row], values["top_k"][row] = params.temperature, params.top_k
        values["top_p"][row], values["min_p"][row] = params.top_p, params.min_p
        values["repetition_penalty"][row] = params.repetition_penalty
        values["presence_penalty"][row] = params.presence_penalty
        self._limit[row], self._needs_host[row] = limit, needs_host
        self._penalised[row] = params.repetition_penalty != 1 or params.presence_penalty != 0
        if self._penalised[row]:
            history = self.tensor["history"]
            counts = np.bincount(sequence.tokens, minlength=history.shape[1]).astype(np.int32)
            copy_over(torch.from_numpy(counts), history[row])
        self._order, self._changed = None, True

    def leave(self, sequence: SequenceState) -> None:
        """Remove a sequence."""
        row, last = sequence.row, len(self.sequences) - 1
        if row != last:
            for array in (*self._array.values(), self._penalised, self._needs_host, self._limit):
                array[row] = array[last]
            moved = ("token", "log_prob", "history") if self._penalised[row] else ("token", "log_prob")
            for name in moved:
                self.tensor[name][row].copy_(self.tensor[name][last])
            self.sequences[row] = self.sequences[last]
            self.sequences[row].row = row
        self._array["slot"][last], self._array["length"][last], self._array["active"][last] = -1, 0, 0
        self.sequences.pop()
        sequence.row = -1
        self._order, self._changed = None, True

    def clear(self) -> None:
        """Remove all sequences."""
        for sequence in self.sequences:
            sequence.row = -1
        self.sequences.clear()
        self._array["slot"].fill(-1)
        self._array["length"].fill(0)
        self._array["active"].fill(0)
        self._order, self._changed = None, True

    def set_last_page(self, sequence: SequenceState) -> None:
        """Enter a sequence's new last page, into which its next token goes."""
        row, page, offset = sequence.row, sequence.pages[-1], sequence.computed % self._page_size
        self._array["page_table"][row, len(sequence.pages) - 1] = page
        self._array["slot"][row] = page * self._page_size + offset
        self._changed = True

    def needs_host(self, first: int = 0) -> bool:
        """Whether the host takes part in sampling for one of the rows from `first` on."""
        return bool(self._needs_host[first : len(self.sequences)].any())

    def at_limit(self) -> list[SequenceState]:
        """The sequences that have reached their limit and so end with their last sampled token."""
        rows = len(self.sequences)
        full = np.flatnonzero(self._array["length"][:rows] >= self._limit[:rows])
        return [self.sequences[row] for row in full]

    def views(self, rows: int, first: int = 0) -> dict[str, Tensor]:
        """Rows first..first + rows of every tensor; the views are made once and kept."""
        if (first, rows) not in self._views:
            self._views[first, rows] = {name: t[first : first + rows] for name, t in self.tensor.items()}
        return self._views[first, rows]

    def upload(self) -> None:
        """Update the mirror with one copy, if anything but tokens has changed since the last one."""
        if self._mirror is not None and self._changed:
            copy_over(self._host, self._mirror)
        self._changed = False

    def append(self, first: int, tokens: Tensor, log_probs: Tensor) -> None:
        """Append the tokens sampled for the rows from `first` on: int64 [n], float32 [n]. Does not wait for the
        device."""
        last = first + len(tokens)
        if self._mirror is None:
            ids = tokens.numpy()
            self._sampled.host_token[first:last] = ids
            self._sampled.host_log_prob[first:last] = log_probs.numpy()
            if self._penalised[first:last].any():  # NumPy takes a third of the time of the tensor operation
                self._history_array[self._rows[first:last], ids] += 1
            return
        b = self.views(len(tokens), first)
        b["token"].copy_(tokens)
        b["log_prob"].copy_(log_probs)
        b["history"].scatter_add_(1, tokens[:, None], b["active"][:, None])
        for pair in self._counters:
            pair[:, first:last].add_(b["active"])

    def advance(self, first: int = 0) -> None:
        """Advance the host's rows from `first` on by one token, as `append` does with the mirror."""
        rows = len(self.sequences)
        for name in ("slot", "offset", "position", "length"):
            self._array[name][first:rows] += 1

    def start_reading(self, decoded: int, in_step: bool) -> SampledStep:
        """Start to copy the tokens of all rows to the host; the first `decoded` rows were decoded in this step."""
        if self._order is None:
            sequences = self.sequences
            self._order = sorted(range(len(sequences)), key=lambda row: (sequences[row].arrival, sequences[row].index))
        return SampledStep(self.sequences.copy(), self._order, decoded, in_step, *self._sampled.fetch())

    @contextlib.contextmanager
    def blank(self) -> Iterator[None]:
        """A context in which no row of the mirror is in use, for warm-up steps; afterwards the mirror is restored."""
        assert self._mirror is not None
        before = self._sampled.device.clone()
        self._mirror.zero_()
        self.tensor["slot"].fill_(-1)
        try:
            yield
        finally:
            self._sampled.device.copy_(before)
            self._changed = True
            self.upload()


@dataclass
class SampledStep:
    """The tokens that a step sampled, for each row of the batch at that time.

    order: rows by the arrival of their sequences. decoded: number of rows, from the first, that were decoded; the rest
    are new. in_step: whether the host must read them before the next step. top: by row, the likeliest tokens of
    sequences that report them.
    """

    sequences: list[SequenceState]
    order: Sequence[int]
    decoded: int
    in_step: bool
    _token: np.ndarray
    _log_prob: np.ndarray
    _copied: torch.cuda.Event | None
    top: dict[int, tuple[TopLogProbs, ...]] = field(default_factory=dict)

    def read(self) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities of all rows; waits until they are copied."""
        if self._copied is not None:
            self._copied.synchronize()
        rows = len(self.sequences)
        return self._token[:rows].tolist(), self._log_prob[:rows].tolist()


class SampleBuffer:
    """The last sampled tokens: token int64 [rows] and log_prob float32 [rows], adjacent in `device`, uint8.

    late: the host reads copies, of which there are two, since one is still unread when the next is made. Otherwise
    host_token and host_log_prob are the tensors themselves.
    """

    def __init__(self, rows: int, device: torch.device, late: bool) -> None:
        self.device = torch.zeros(rows * _SAMPLE_BYTES, dtype=torch.uint8, device=device)
        self.token, self.log_prob = _parts(self.device, rows)
        self._copies = [_HostCopy.allocate(rows, device) for _ in range(2 * late)]
        if not late:
            self.host_token, self.host_log_prob = self.token.numpy(), self.log_prob.numpy()

    def fetch(self) -> tuple[np.ndarray, np.ndarray, torch.cuda.Event | None]:
        """Start a copy to the host; returns its token and log_prob, and the event after which they are valid."""
        if not self._copies:
            return self.host_token, self.host_log_prob, None
        copy = self._copies[0]
        self._copies.reverse()
        copy.memory.copy_(self.device, non_blocking=True)
        if copy.copied is not None:
            copy.copied.record()
        return copy.token, copy.log_prob, copy.copied


class _HostCopy(NamedTuple):
    """The host's copy of the sampled tokens, and the event after which it is valid."""

    memory: Tensor
    token: np.ndarray
    log_prob: np.ndarray
    copied: torch.cuda.Event | None

    @staticmethod
    def allocate(rows: int, device: torch.device) -> _HostCopy:
        cuda = device.type == "cuda"
        memory = torch.zeros(rows * _SAMPLE_BYTES, dtype=torch.uint8, pin_memory=cuda)
        token, log_prob = _parts(memory, rows)
        return _HostCopy(memory, token.numpy(), log_prob.numpy(), torch.cuda.Event() if cuda else None)


def _parts(memory: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return memory[: 8 * rows].view(torch.int64), memory[8 * rows :].view(torch.float32)


def copy_over(source: Tensor, target: Tensor) -> None:
    """Copy source, on the host, into target without waiting. The source may change as soon as this returns."""
    if target.device.type == "cuda":
        source = source.pin_memory()  # pinned memory is reused only after its copies are done
    target.copy_(source, non_blocking=True)


def on_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """One-dimensional arrays of one dtype as tensors on `device`, in one copy that nobody waits for; none on a CPU."""
    if device.type != "cuda":
        return [torch.from_numpy(array) for array in arrays]
    joined, places = concatenate_aligned(arrays)
    on_gpu = torch.from_numpy(joined).pin_memory().to(device, non_blocking=True)
    return [on_gpu[place] for place in places]


def concatenate_aligned(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, list[slice]]:
    """The arrays in one array, and the slice of each. Slices begin at multiples of 64 bytes, because kernels are
    compiled again for addresses with another alignment."""
    step = 64 // arrays[0].itemsize
    starts = np.cumsum([0, *(-(-len(array) // step) * step for array in arrays)])
    joined = np.zeros(starts[-1], arrays[0].dtype)
    places = [slice(start, start + len(array)) for start, array in zip(starts.tolist(), arrays, strict=False)]
    for place, array in zip(places, arrays, strict=True):
        joined[place] = array
    return joined, places
