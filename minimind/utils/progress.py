"""Progress by bytes: a bar on a terminal, a line every few seconds elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LINE_SECONDS = 5.0


def say(console: Console, text: str) -> None:
    """Print one line as it is."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


class ByteProgress:
    """Context manager; call `update(done)` with the bytes done so far. `total` None means unknown.

    `start` bytes were done earlier (a resumed job) and do not count towards the speed.
    """

    def __init__(self, console: Console, title: str, total: int | None, start: int = 0) -> None:
        self._console, self._title, self._total, self._start = console, title, total, start
        self._began = self._printed = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            title_column = TextColumn("{task.description}", markup=False)
            self._bar = Progress(title_column, *columns, console=console, transient=True)
            self._task = self._bar.add_task(title, total=total, completed=start)

    def __enter__(self) -> "ByteProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Show that `done` bytes are done."""
        if self._total is not None and done > self._total:
            self._total = None
        if self._bar:
            self._bar.update(self._task, completed=done, total=self._total)
            return
        now = time.monotonic()
        if now - self._printed >= _LINE_SECONDS:
            self._printed = now
            say(self._console, self._line(done, now - self._began))

    def _line(self, done: int, seconds: float) -> str:
        speed = (done - self._start) / seconds
        if self._total is None or speed <= 0:
            return f"{self._title}: {done / 1e6:,.1f} MB, {speed / 1e6:,.2f} MB/s"
        left = (self._total - done) / speed
        sizes = f"{done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB"
        return f"{self._title}: {sizes}, {speed / 1e6:,.2f} MB/s, {left:,.0f} s left"
