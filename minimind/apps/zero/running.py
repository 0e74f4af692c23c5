"""Run one stage of `minimind zero`: its script in a process of its own, its lines passed on, progress over all stages.

    python -m minimind.apps.zero.running SCRIPT FLAGS

is that process. It runs the script as `python SCRIPT FLAGS` does, and stops when its parent ends, however that happens:
its standard input is a pipe that the parent holds, and the end of the pipe stops the stage as SIGTERM does. The stage
then finishes its step and saves.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from minimind.apps.zero.stages import interpreter
from minimind.utils.display import duration, say

_STEP = re.compile(r"step ([\d,]+)/([\d,]+)  (.*)")  # as minimind.utils.display.Display writes it
_STOPPED = 130


@dataclass
class Clock:
    """What is left of all stages. later: seconds of those after this one, projected; own: of this one."""

    own: float
    later: float
    began: float = field(default_factory=time.monotonic)
    first: tuple[int, float] | None = None

    def left(self, step: int, steps: int) -> float:
        """Seconds, from the steps of this start; the stages after this one are taken to be as fast or slow beside
        their projection."""
        now = time.monotonic()
        if self.first is None:
            self.first = step, now
        done, since = self.first
        if step == done:
            return self.own * (1 - step / steps) + self.later
        here = (now - since) / (step - done) * (steps - step)
        pace = min(10.0, max(0.1, (now - since) / (step - done) * steps / self.own)) if self.own else 1.0
        return here + self.later * pace


class StageView:
    """Passes a stage's lines on: its steps as a bar in a terminal, elsewhere as lines with the time that is left."""

    def __init__(self, console: Console, title: str, clock: Clock) -> None:
        self.console, self.title, self.clock = console, title, clock
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = TextColumn("{task.fields[title]}", markup=False), BarColumn(bar_width=20)
            self.bar = Progress(*columns, TextColumn("{task.description}", markup=False), console=console,
                                transient=True)  # fmt: skip
            self.task = self.bar.add_task("starts", total=None, title=title)
            self.bar.start()

    def line(self, text: str) -> None:
        found = _STEP.fullmatch(text)
        if found is None:
            say(self.console, text)
            return
        step, steps = (int(number.replace(",", "")) for number in found.group(1, 2))
        told = f"{found[3]}; all stages {duration(self.clock.left(step, steps))}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, total=steps, description=f"{step:,}/{steps:,}  {told}")
        else:
            say(self.console, f"{self.title}: step {step:,}/{steps:,}  {told}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def run_stage(
    command: Sequence[str], out: Path, log: Path, view: StageView, console: Console, spend: Callable[[float], None]
) -> int:
    """The exit status of the script. Its lines go to `view` and to the file `log`; spend(seconds) is called with the
    time it takes. SIGINT and SIGTERM are passed on to it, and it saves."""
    await_free(out, console)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    arguments = interpreter(["-m", "minimind.apps.zero.running", *command])
    own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if sys.platform == "win32" else {}  # type: ignore[attr-defined]
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,  # its end tells the child of ours
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        encoding="utf-8",
        errors="replace",
        start_new_session=os.name == "posix",  # Ctrl-C reaches it by us alone
        **own_group,
    )
    assert process.stdout is not None
    since = time.monotonic()
    with log.open("a", encoding="utf-8") as kept, passed_on(process), process:
        try:
            for line in process.stdout:
                kept.write(line)
                kept.flush()
                view.line(line.rstrip("\r\n"))
                now = time.monotonic()
                spend(now - since)
                since = now
        finally:
            view.close()
            if process.stdin is not None:
                process.stdin.close()
    spend(time.monotonic() - since)
    return process.returncode


def await_free(out: Path, console: Console) -> None:
    """Wait for the process of an earlier start that was killed: its stage ends its step and saves."""
    if not (out / ".lock").exists():
        return
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(console, f"{out}: the stage of an earlier start still saves; waiting for it")
        lock.acquire()
    lock.release()


@contextmanager
def passed_on(process: subprocess.Popen[str]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `process` as SIGTERM, and end us when it has ended."""

    def pass_on(number: int, _frame: object) -> None:
        if process.poll() is None:
            process.terminate()

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def was_stopped(status: int) -> bool:
    """Whether the script ended because it was told to, rather than by an error of its own."""
    return status in (_STOPPED, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM)


def stop_with_parent() -> None:
    """Ends when the pipe does. Not by sys.stdin, whose lock a waiting thread would hold to the very end."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    threading.Thread(target=stop_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
