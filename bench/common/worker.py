"""A separate process for each implementation that is compared, so that they share neither memory nor threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from bench.common.timing import first_line, rotated

Handler = Callable[[Any], Any]  # request -> reply, both pickled


class ImplementationError(Exception):
    """An implementation failed or its process died; the message is one line."""


class Worker:
    """A process that calls `make(*arguments)` once, and then the function that this returns for every request.

    `make` and `arguments` are pickled. A failed worker raises ImplementationError from every method but `close`.
    """

    def __init__(self, make: Callable[..., Handler], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, childs = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, arguments, childs), daemon=True)
        start_without_sigint(self.process)
        childs.close()  # so that this process sees an end of file when the child dies
        self.is_ready = False

    def wait_until_ready(self) -> None:
        """Wait until `make` has returned."""
        if not self.is_ready:
            self._receive()
            self.is_ready = True

    def ask(self, request: Any) -> Any:
        """Send one request and return the reply."""
        self.wait_until_ready()
        try:
            self.pipe.send(request)
        except OSError:  # it died between two requests
            raise ImplementationError(self._cause_of_death()) from None
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(timeout=10)
        self.process.kill()
        self.process.join()

    def _receive(self) -> Any:
        try:
            reply = self.pipe.recv()
        except (EOFError, OSError):
            raise ImplementationError(self._cause_of_death()) from None
        if isinstance(reply, ImplementationError):
            raise reply
        return reply

    def _cause_of_death(self) -> str:
        self.process.join(10)
        status = self.process.exitcode or 0
        names = {number.value: number.name for number in signal.Signals}
        cause = f"died by {names.get(-status, f'signal {-status}')}" if status < 0 else "its process died"
        is_memory = status >= 0 or cause.endswith("SIGKILL")  # the kernel kills the process that takes too much
        return f"{cause}; if memory ran out, make the batch smaller" if is_memory else cause


def _serve(make: Callable[..., Handler], arguments: tuple[Any, ...], pipe: Connection) -> None:
    """The child's loop; it ends when the parent closes the pipe."""
    try:
        answer = make(*arguments)
        pipe.send("ready")
        while True:
            pipe.send(answer(pipe.recv()))
    except (EOFError, BrokenPipeError):
        return
    except Exception as problem:  # an implementation that fails is a result, not the end of the benchmark
        with contextlib.suppress(OSError):
            pipe.send(ImplementationError(first_line(problem)))


def take_turn(
    workers: Mapping[str, Any], turn: int, step: Callable[[str], None], drop: Callable[[str, str], None]
) -> None:
    """Call step(name) for every worker in the order of this turn, which rotates, so that a drift of the machine's speed
    affects all of them alike. If a worker fails, drop(name, reason) is called, which must remove it from `workers`."""
    for name in rotated(list(workers), turn):
        try:
            step(name)
        except ImplementationError as problem:
            drop(name, str(problem))


def start_without_sigint(process: BaseProcess) -> None:
    """Start a process that ignores Ctrl-C, so that only this process reports it.

    The child inherits a blocked SIGINT. If Ctrl-C arrives during the start, it is raised here afterwards: other threads
    do not block the signal, and ignoring it would lose it.
    """
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    late: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: late.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if late:
        signal.raise_signal(signal.SIGINT)
