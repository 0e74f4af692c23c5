"""Record a few training steps with torch.profiler, marking the blocks of the model; trace.py reads and draws them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.hooks import RemovableHandle

from minimind.training.profiling.trace import draw, read_trace, show
from minimind.utils.display import say
from minimind.utils.spans import nvtx_mode, record, span

TRACE, PICTURE = "trace.json.gz", "timeline.png"


def mark_blocks(model: nn.Module) -> list[RemovableHandle]:
    """Add hooks that open a span "block N" around the forward of each of `model.layers`; removing the returned handles
    undoes it.

    In a compiled model the hooks do nothing and break no graph. Its trace shows a "Torch-Compiled Region" per graph
    and, on a GPU, Inductor's fused kernels (triton_poi_..., triton_red_...) instead of blocks.
    """
    handles = []
    for number, layer in enumerate(cast(nn.ModuleList, model.layers)):
        hook = _BlockSpan(f"block {number}")
        handles.append(layer.register_forward_pre_hook(hook.enter))
        handles.append(layer.register_forward_hook(hook.leave, always_call=True))
    return handles


class _BlockSpan:
    def __init__(self, name: str) -> None:
        self.name, self.open = name, list[AbstractContextManager[None]]()

    def enter(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.open.append(span(self.name))
            self.open[-1].__enter__()

    def leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling() and self.open:
            self.open.pop().__exit__(None, None, None)


class StepProfiler:
    """Records `steps` steps of this process from number `first` on, counted from 1.

    Earlier steps are left out because they compile, allocate and warm up. Writes trace.json.gz (for chrome://tracing or
    ui.perfetto.dev) and timeline.png to `folder`, and prints the operators or kernels that took longest. Under
    MINIMIND_NVTX=1 it writes nothing, but tells nsys or ncu when to record, by cudaProfilerStart and Stop. Recording
    slows steps down: compare their times only with each other.
    """

    def __init__(self, folder: Path, console: Console, first: int = 3, steps: int = 3) -> None:
        if first < 1 or steps < 1:
            raise ValueError(f"first={first} and steps={steps} must both be at least 1")
        self.folder, self.console, self.first, self.last = folder, console, first, first + steps - 1
        self._count = 0
        self._recording = False
        self._profile: profile | None = None
        self._step: AbstractContextManager[None] = nullcontext()

    def begin(self, step: int) -> None:
        """Call it before step number `step` of the run, which becomes its name in the trace."""
        self._count += 1
        if self._count == self.first:
            self._start()
        if self._recording:
            self._step = span(f"step {step}")
            self._step.__enter__()

    def end(self) -> None:
        """Call it after the step."""
        self._leave_step()
        if self._recording and self._count == self.last:
            self._stop()

    def close(self) -> None:
        """Call it when training ends. If the recording is still running, it ends here and is shown."""
        self._leave_step()
        if self._recording:
            self._stop()
        elif self._count < self.first:
            say(self.console, f"profile: nothing recorded, this process ended before its step {self.first}")

    def _leave_step(self) -> None:
        self._step.__exit__(None, None, None)
        self._step = nullcontext()

    def _start(self) -> None:
        self._recording = True
        if nvtx_mode():
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()
        record(True)

    def _stop(self) -> None:
        self._recording = False
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the last step's kernels belong to it
        if self._profile is None:
            if torch.cuda.is_initialized():
                torch.cuda.profiler.stop()
            return
        record(False)
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.folder / TRACE))
        self._profile = None
        trace = read_trace(self.folder / TRACE)
        show(trace, self.console)
        draw(trace, self.folder / PICTURE)
        say(self.console, f"profile: {self.folder / PICTURE}, {self.folder / TRACE} (ui.perfetto.dev opens it)")
