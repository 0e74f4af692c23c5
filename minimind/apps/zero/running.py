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
    """The time that is left. own: projected seconds of the running stage; later: of the stages after it."""

    own: float
    later: float
    began: float = field(default_factory=time.monotonic)
    first: tuple[int, float] | None = None

    def left(self, step: int, steps: int) -> float:
        """Seconds until all stages end, from the speed of this start. Later stages are assumed to differ from their
        projection by the same factor as this one."""
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
    """Shows a stage's output: steps as a progress bar in a terminal and as lines elsewhere, both with the time left;
    other lines as they are."""

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
        match = _STEP.fullmatch(text)
        if match is None:
            say(self.console, text)
            return
        step, steps = (int(number.replace(",", "")) for number in match.group(1, 2))
        text = f"{match[3]}; all stages {duration(self.clock.left(step, steps))}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, total=steps, description=f"{step:,}/{steps:,}  {text}")
        else:
            say(self.console, f"{self.title}: step {step:,}/{steps:,}  {text}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def run_stage(
    command: Sequence[str], out: Path, log: Path, view: StageView, console: Console, spend: Callable[[float], None]
) -> int:
    """Run a stage's script and return its exit status. Its lines go to `view` and to the file `log`; spend(seconds) is
    called as time passes. SIGINT and SIGTERM are passed on to the script, which then saves."""
    await_free(out, console)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    arguments = interpreter(["-m", "minimind.apps.zero.running", *command])
    own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if sys.platform == "win32" else {}  # type: ignore[attr-defined]
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,  # closed when this process ends, which stops the script
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        encoding="utf-8",
        errors="replace",
        start_new_session=os.name == "posix",  # so that Ctrl-C reaches it only through this process
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
    """Wait until the stage of an earlier start, which was killed, has finished its step and saved."""
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
    """Pass SIGINT and SIGTERM on to `process` as SIGTERM instead of ending this process."""

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
    """Whether an exit status means that the script was stopped, rather than failed."""
    return status in (_STOPPED, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM)


def stop_with_parent() -> None:
    """Send SIGTERM to this process once standard input ends. It reads the file descriptor, since a thread that waits
    in sys.stdin holds its lock, which the interpreter needs to exit."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    threading.Thread(target=stop_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
