"""Name spans of a step (data, forward, block N, loss, backward, optimizer, communication) for profilers.

Spans are off unless a StepProfiler (training/profiling.py) records or MINIMIND_NVTX=1 is set, for `nsys profile` and
`ncu` without PyTorch's profiler. The nvtx package gives their NVTX ranges the domain "minimind" and a category for each
phase, also before CUDA starts. If it is not installed, the ranges are those of torch.cuda.nvtx.
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch.profiler import record_function

DOMAIN = "minimind"
_PHASE = {"block": "forward", "loss": "forward", "plan": "decode", "sample": "decode"}  # by a name's first word


@dataclass
class _State:
    recording: bool = False
    nvtx: bool = os.environ.get("MINIMIND_NVTX") == "1"


_state = _State()
_OFF = nullcontext()


def nvtx_mode() -> bool:
    """Whether MINIMIND_NVTX=1 turns the spans on for the whole process."""
    return _state.nvtx


def record(on: bool) -> None:
    """Turn the spans on or off with PyTorch's profiler."""
    _state.recording = on


def span(name: str) -> AbstractContextManager[None]:
    """A context manager that marks a span `name` in the trace and an NVTX range. If spans are off, it is one shared
    object that does nothing. For code that torch.compile traces, see profiling.mark_blocks."""
    return _Span(name) if _state.recording or _state.nvtx else _OFF


def category(name: str) -> str:
    """The NVTX category of a span, which is its phase: "forward" for "block 3"."""
    word = name.partition(" ")[0]
    return _PHASE.get(word, word)


class _Span(AbstractContextManager[None]):
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.record = record_function(self.name)
        self.record.__enter__()
        self.range = _nvtx_range(self.name)
        self.range.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.range.__exit__(None, None, None)
        self.record.__exit__(kind, error, trace)


def _nvtx_range(name: str) -> AbstractContextManager[Any]:
    nvtx = _nvtx_package()
    if nvtx is not None:
        return nvtx.annotate(name, domain=DOMAIN, category=category(name))
    return torch.cuda.nvtx.range(name) if torch.cuda.is_initialized() else _OFF


@functools.cache
def _nvtx_package() -> ModuleType | None:
    """The nvtx package or None; imported with the first span, so that spans cost nothing while they are off."""
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx
