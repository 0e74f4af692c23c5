"""Tools that run: ours here and at once, the user's in processes of their own, which are ended when they take too long.

Ours are bounded by what they accept. A call of the user's goes to the first process that is free; several run at a
time, and meanwhile others go on.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from minimind.environments.tools import ToolFunction, by_name
from minimind.environments.turns import ParsedCall, Problem
from minimind.environments.worker import described

_START = 60.0  # seconds in which a process must have imported the user's module


@dataclass(frozen=True)
class ToolLimits:
    """seconds: of one call; characters: of one result; workers: processes for the user's tools."""

    seconds: float = 5.0
    characters: int = 2048
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("seconds", "characters", "workers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True)
class ToolResult:
    """text: what the model reads. problem: why there is no true result, None where there is one. cut: whether the
    tool said more. seconds: how long it ran."""

    text: str
    problem: Problem | None = None
    cut: bool = False
    seconds: float = 0.0


@dataclass
class _Task:
    ticket: Hashable
    call: ParsedCall
    state: dict[str, Any]


class ToolRunner:
    """Runs calls of `tools`. Close it, or use it in a `with`, to end its processes.

    ValueError, one line, where two tools have one name or the user's cannot be imported.
    """

    def __init__(self, tools: Sequence[ToolFunction], limits: ToolLimits | None = None) -> None:
        self.tools, self.limits = by_name(tools), limits or ToolLimits()
        self._paths = list(dict.fromkeys(tool.path for tool in tools if tool.path is not None))
        self._done: list[tuple[Hashable, ToolResult]] = []
        self._waiting: deque[_Task] = deque()
        self._workers: list[_Worker] = []
        if self._paths:
            self._workers = [_Worker(self._paths, self.limits) for _ in range(self.limits.workers)]

    def __enter__(self) -> ToolRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to wait for or to deliver."""
        return bool(self._done or self._waiting or any(worker.task for worker in self._workers))

    def submit(self, ticket: Hashable, call: ParsedCall, state: dict[str, Any]) -> None:
        """Run a call; `poll` tells the result under its ticket. state: the conversation's, changed when it is told. One
        that cannot be run has a result all the same: the error."""
        if call.problem is not None:
            self._done.append((ticket, ToolResult(call.error, call.problem)))
        elif self.tools[call.name].path is None:
            self._done.append((ticket, self._here(call, state)))
        else:
            self._waiting.append(_Task(ticket, call, state))
            self._hand_out()

    def poll(self, seconds: float = 0.0) -> list[tuple[Hashable, ToolResult]]:
        """The calls that have ended; waits for one for at most `seconds`."""
        until = time.monotonic() + seconds
        while not self._done and self.busy:
            self._wait(max(0.0, until - time.monotonic()))
            if time.monotonic() >= until:
                break
        done, self._done = self._done, []
        return done

    def stop(self) -> None:
        """Forget the calls that have not been told; what runs is ended."""
        self._done.clear()
        self._waiting.clear()
        for worker in self._workers:
            if worker.task is not None:
                worker.task = None
                worker.restart()

    def run(self, call: ParsedCall, state: dict[str, Any]) -> ToolResult:
        """One call to its end; nothing else may be running."""
        self.submit(None, call, state)
        while True:
            for _, result in self.poll(1.0):
                return result

    def _here(self, call: ParsedCall, state: dict[str, Any]) -> ToolResult:
        start = time.perf_counter()
        try:
            text, problem = self.tools[call.name](call.arguments, state), None
        except Exception as error:  # a row may offer a tool otherwise than it is
            text, problem = described(error), "raised"
        most = self.limits.characters
        return ToolResult(text[:most], problem, len(text) > most, time.perf_counter() - start)  # type: ignore[arg-type]

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._waiting and worker.free:
                worker.take(self._waiting.popleft())

    def _wait(self, seconds: float) -> None:
        """Until a process says something, one's time is over, or `seconds` have gone."""
        now = time.monotonic()
        ends = [worker.deadline - now for worker in self._workers]
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.output, selectors.EVENT_READ, worker)
            spoken = [key.data for key, _ in selector.select(max(0.0, min([seconds, *ends])))]
        for worker in self._workers:
            if worker in spoken:
                self._take(worker, worker.hear())
            elif time.monotonic() >= worker.deadline:
                self._take(worker, worker.stop("timeout"))
        self._hand_out()

    def _take(self, worker: _Worker, result: ToolResult | None) -> None:
        if result is not None and worker.task is not None:
            self._done.append((worker.task.ticket, result))
            worker.task = None


@dataclass
class _Worker:
    """A process, and the call that it runs. ready: whether its tools are imported."""

    paths: list[str]
    limits: ToolLimits
    task: _Task | None = None
    ready: bool = False
    began: float = 0.0
    deadline: float = float("inf")
    process: subprocess.Popen[bytes] = field(init=False)
    _heard: bytes = b""

    def __post_init__(self) -> None:
        self._start()

    @property
    def output(self) -> Any:
        return self.process.stdout

    @property
    def free(self) -> bool:
        return self.ready and self.task is None

    def _start(self) -> None:
        command = [sys.executable, "-m", "minimind.environments.worker", str(self.limits.characters), *self.paths]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # a session of its own: Ctrl-C is for us
        self.process = subprocess.Popen(command, start_new_session=True, env=_environment(), **pipes)
        self.ready, self._heard, self.deadline = False, b"", time.monotonic() + _START

    def take(self, task: _Task) -> None:
        self.task, self.began = task, time.monotonic()
        self.deadline = self.began + self.limits.seconds
        call = {"name": task.call.name, "arguments": dict(task.call.arguments), "state": task.state}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(call).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: `hear` finds out

    def hear(self) -> ToolResult | None:
        """What the process said: the result of its call, if that is whole."""
        data = os.read(self.output.fileno(), 1 << 16)
        if not data:
            return self.stop("died")
        self._heard += data
        if not self._heard.endswith(b"\n"):
            return None
        said, self._heard, self.deadline = json.loads(self._heard), b"", float("inf")
        if "error" in said:
            self.end()
            raise ValueError(said["error"])
        if "ready" in said:
            self.ready = True
            return None
        assert self.task is not None
        self.task.state.clear()
        self.task.state.update(said["state"])
        return ToolResult(said["text"], said["problem"], said["cut"], time.monotonic() - self.began)

    def stop(self, problem: Problem) -> ToolResult | None:
        """End the process and begin another; what its call has come to."""
        if not self.ready:
            self.end()
            raise ValueError(f"{' '.join(self.paths)}: the process that imports these tools {_ENDS[problem]}")
        called, spent = self.task is not None, time.monotonic() - self.began
        self.restart()
        what = f"took more than {self.limits.seconds:g} s" if problem == "timeout" else "ended its process"
        return ToolResult(f"error: the tool {what}", problem, seconds=spent) if called else None

    def restart(self) -> None:
        self.end()
        self._start()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what was written last was not read
                    pipe.close()


_ENDS = {"timeout": f"took more than {_START:g} s", "died": "ended at once; its last words are above"}


def _environment() -> dict[str, str]:
    """This process's, with the folders where it finds modules: a script's own among them."""
    folders = [os.getcwd(), *(folder for folder in sys.path if folder)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders)), "OMP_NUM_THREADS": "1"}
