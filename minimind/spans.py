"""Named spans within a step: data, forward, block N, loss, backward, optimizer, communication.

They are off unless a StepProfiler (training/profiling.py) is recording or MINIMIND_NVTX=1 is set, which turns them on
for `nsys profile` and `ncu` without PyTorch's own profiler.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType

import torch
from torch.profiler import record_function


@dataclass
class _State:
    recording: bool = False
    nvtx: bool = os.environ.get("MINIMIND_NVTX") == "1"


_state = _State()
_OFF = nullcontext()


def nvtx_mode() -> bool:
    """Whether MINIMIND_NVTX=1 turned the spans on for the whole process."""
    return _state.nvtx


def record(on: bool) -> None:
    """Turn the spans on while PyTorch's profiler runs."""
    _state.recording = on


def span(name: str) -> AbstractContextManager[None]:
    """Context: what runs in it is `name` in the trace, and an NVTX range in a process that uses CUDA. When off, one
    shared object that does nothing. Not for code that torch.compile traces: see profiling.mark_blocks."""
    return _Span(name) if _state.recording or _state.nvtx else _OFF


class _Span(AbstractContextManager[None]):
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.record = record_function(self.name)
        self.record.__enter__()
        self.nvtx = torch.cuda.is_initialized()
        if self.nvtx:
            torch.cuda.nvtx.range_push(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.nvtx:
            torch.cuda.nvtx.range_pop()
        self.record.__exit__(kind, error, trace)
