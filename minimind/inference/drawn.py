"""Drawn tokens on their way to the host.

On a GPU the host is one step late: it launches step t + 1 before it reads the tokens of step t, so the GPU never waits
for it. What a step drew stays on the device, where the next step takes it up; a copy goes to pinned memory behind the
step, and an event tells when it is there. On a CPU the host would gain nothing, for it is the device, and a sample that
ends by a stop token would cost a forward more: it stays in step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimind.inference.requests import TopLogProbs
from minimind.inference.scheduler import SequenceState

_BYTES = 8 + 4  # of a row: its token and its log-probability


def host_is_late(device: torch.device) -> bool:
    """Whether an engine on `device` reads its tokens one step late."""
    return device.type == "cuda"


@dataclass
class SampledStep:
    """What a step drew for each row of the batch as it was.

    order: rows by the arrival of their samples. decoded: so many first rows were decoded, the others are new.
    in_step: the next step cannot begin without the host. top: by row, the likeliest tokens where they were asked for.
    """

    samples: list[SequenceState]
    order: Sequence[int]
    decoded: int
    in_step: bool
    _token: np.ndarray
    _log_prob: np.ndarray
    _there: torch.cuda.Event | None
    top: dict[int, tuple[TopLogProbs, ...]] = field(default_factory=dict)

    def read(self) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities of all rows, when they are there."""
        if self._there is not None:
            self._there.synchronize()
        rows = len(self.samples)
        return self._token[:rows].tolist(), self._log_prob[:rows].tolist()


class SampleBuffer:
    """token int64, log_prob float32 [rows]: of the last draws, side by side in `device`, uint8.

    late: the host reads copies, two in turn, since one is still to be read when the next is made; else the tensors
    themselves, host_token and host_log_prob.
    """

    def __init__(self, rows: int, device: torch.device, late: bool) -> None:
        self.device = torch.zeros(rows * _BYTES, dtype=torch.uint8, device=device)
        self.token, self.log_prob = _parts(self.device, rows)
        self._copies = [_Copy.of(rows, device) for _ in range(2 * late)]
        if not late:
            self.host_token, self.host_log_prob = self.token.numpy(), self.log_prob.numpy()

    def fetch(self) -> tuple[np.ndarray, np.ndarray, torch.cuda.Event | None]:
        """Begin a copy of what was drawn: the host's token and log_prob, and the event after which they are right."""
        if not self._copies:
            return self.host_token, self.host_log_prob, None
        copy = self._copies[0]
        self._copies.reverse()
        copy.memory.copy_(self.device, non_blocking=True)
        if copy.there is not None:
            copy.there.record()
        return copy.token, copy.log_prob, copy.there


class _Copy(NamedTuple):
    """The host's memory for what was drawn, and the event that says when it is there."""

    memory: Tensor
    token: np.ndarray
    log_prob: np.ndarray
    there: torch.cuda.Event | None

    @staticmethod
    def of(rows: int, device: torch.device) -> _Copy:
        cuda = device.type == "cuda"
        memory = torch.zeros(rows * _BYTES, dtype=torch.uint8, pin_memory=cuda)
        token, log_prob = _parts(memory, rows)
        return _Copy(memory, token.numpy(), log_prob.numpy(), torch.cuda.Event() if cuda else None)


def _parts(memory: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return memory[: 8 * rows].view(torch.int64), memory[8 * rows :].view(torch.float32)
