"""Run tools: built-in ones at once in this process, the user's in worker processes, each call with a time limit.

Built-in tools need no time limit, since they reject inputs that would take long. A call of a user's tool goes to the
first free worker. Several calls run at a time, and conversations that wait for no tool go on meanwhile.
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

from minimind.environments.mcp import PREFIX
from minimind.environments.tools import ToolFunction, by_name
from minimind.environments.turns import ParsedCall, Problem
from minimind.environments.worker import described

_START = 60.0  # seconds that a worker may take to import the user's modules


@dataclass(frozen=True)
class ToolLimits:
    """seconds: the time of one call; characters: the length of one result; workers: processes for the user's tools."""

    seconds: float = 5.0
    characters: int = 2048
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("seconds", "characters", "workers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True)
class ToolResult:
    """text: the result or the error, as the model reads it. problem: the kind of failure, None if the tool returned.
    cut: whether the text was cut to its limit. seconds: how long the tool ran."""

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
    """Runs calls of `tools`. Close it, or use it in a `with` statement, to end its workers.

    Raises ValueError, one line, if two tools have one name or a user's tool cannot be imported.
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
        """Whether a call is unfinished, or has a result that `poll` has not returned yet."""
        return bool(self._done or self._waiting or any(worker.task for worker in self._workers))

    def submit(self, ticket: Hashable, call: ParsedCall, state: dict[str, Any]) -> None:
        """Start a call; `poll` returns its result with `ticket`. state: the conversation's memory, which the tool may
        change until then. The result of a call that cannot be run is its error."""
        if call.problem is not None:
            self._done.append((ticket, ToolResult(call.error, call.problem)))
        elif self.tools[call.name].path is None:
            self._done.append((ticket, self._here(call, state)))
        else:
            self._waiting.append(_Task(ticket, call, state))
            self._hand_out()

    def poll(self, seconds: float = 0.0) -> list[tuple[Hashable, ToolResult]]:
        """(ticket, result) of each call that has ended since the last poll; waits up to `seconds` for the first."""
        until = time.monotonic() + seconds
        while not self._done and self.busy:
            self._wait(max(0.0, until - time.monotonic()))
            if time.monotonic() >= until:
                break
        done, self._done = self._done, []
        return done

    def stop(self) -> None:
        """Kill running calls, and forget all results that `poll` has not returned."""
        self._done.clear()
        self._waiting.clear()
        for worker in self._workers:
            if worker.task is not None:
                worker.task = None
                worker.restart()

    def run(self, call: ParsedCall, state: dict[str, Any]) -> ToolResult:
        """Run one call to its end. No other call may be running."""
        self.submit(None, call, state)
        while True:
            for _, result in self.poll(1.0):
                return result

    def _here(self, call: ParsedCall, state: dict[str, Any]) -> ToolResult:
        start = time.perf_counter()
        try:
            text, problem = self.tools[call.name](call.arguments, state), None
        except Exception as error:  # a data row may describe the tool's arguments wrongly
            text, problem = described(error), "raised"
        most = self.limits.characters
        return ToolResult(text[:most], problem, len(text) > most, time.perf_counter() - start)  # type: ignore[arg-type]

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._waiting and worker.free:
                worker.take(self._waiting.popleft())

    def _wait(self, seconds: float) -> None:
        """Wait until a worker answers, a worker's time is over, or `seconds` have passed."""
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
    """A worker process and the call that it runs. ready: whether it has imported its tools."""

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
        command = [sys.executable, "-m", "minimind.environments.worker"]
        command += [str(self.limits.characters), str(self.limits.seconds), *self.paths]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # in a session of its own, so that Ctrl-C does not reach it
        self.process = subprocess.Popen(command, start_new_session=True, env=_environment(), **pipes)
        self.ready, self._heard, self.deadline = False, b"", time.monotonic() + _START

    @property
    def _grace(self) -> float:
        """Seconds after its limit in which a call of an MCP server is cancelled there, which spares a new start."""
        return 2.0 if any(path.startswith(PREFIX) for path in self.paths) else 0.0

    def take(self, task: _Task) -> None:
        self.task, self.began = task, time.monotonic()
        self.deadline = self.began + self.limits.seconds + self._grace
        call = {"name": task.call.name, "arguments": dict(task.call.arguments), "state": task.state}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(call).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process died; `hear` will notice

    def hear(self) -> ToolResult | None:
        """Read the process's output. Returns the result of its call once that is complete."""
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
        """Kill the process and start another. Returns the result of the call that it ran, if any."""
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
                with suppress(BrokenPipeError):  # the process did not read all of its input
                    pipe.close()


_ENDS = {"timeout": f"took more than {_START:g} s", "died": "died; its output above says why"}


def _environment() -> dict[str, str]:
    """This process's environment. PYTHONPATH gets all folders of sys.path, so that a worker finds the same modules."""
    folders = [os.getcwd(), *(folder for folder in sys.path if folder)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders)), "OMP_NUM_THREADS": "1"}
