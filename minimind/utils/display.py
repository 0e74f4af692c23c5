"""The output of a run: printed lines, progress bars (in a terminal) or progress lines (elsewhere), and pictures."""

from __future__ import annotations

import functools
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

P = ParamSpec("P")

_LINE_SECONDS = 5.0  # between progress lines of bytes
_PLAIN_SECONDS = 10.0  # between progress lines of steps
# Fonts with Chinese characters on Linux, macOS and Windows: titles may have names of data files.
_CHINESE = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC",
            "Microsoft YaHei", "SimHei")  # fmt: skip
_IDEOGRAPH = re.compile(r"[\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
_WIDEST = 90  # characters of a title


def say(console: Console, text: str) -> None:
    """Print one line as it is."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


class ByteProgress:
    """A progress bar over bytes, as a context manager. total: None if unknown. start: bytes done earlier by a resumed
    job, which do not count towards the speed."""

    def __init__(self, console: Console, title: str, total: int | None, start: int = 0) -> None:
        self._console, self._title, self._total, self._start = console, title, total, start
        self._began = self._printed = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            title_column = TextColumn("{task.description}", markup=False)
            self._bar = Progress(title_column, *columns, console=console, transient=True)
            self._task = self._bar.add_task(title, total=total, completed=start)

    def __enter__(self) -> ByteProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Show that `done` bytes are done, in a terminal at each call, elsewhere every 5 seconds."""
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


class Display:
    """A progress bar over training steps."""

    def __init__(self, console: Console, steps: int, start: int) -> None:
        self.console, self.steps = console, steps
        self.plain_due = 0.0
        self.progress: Progress | None = None
        if console.is_terminal:
            self.progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=console,
                transient=False,
            )
            self.task = self.progress.add_task("", total=steps, completed=start)
            self.progress.start()

    def update(self, step: int, line: str) -> None:
        """Show the step and `line` (loss, rate and so on), in a terminal at each call, elsewhere every 10 seconds."""
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=line)
        elif time.monotonic() >= self.plain_due or step == self.steps:
            self.plain_due = time.monotonic() + _PLAIN_SECONDS
            self.say(f"step {step}/{self.steps}  {line}")

    def say(self, text: str) -> None:
        say(self.console, text)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def pyplot() -> Any:
    """matplotlib.pyplot for files, without a display, with a Chinese font if the system has one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _CHINESE if name in installed)]
    warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)  # the glyphs are drawn as boxes
    return plt


def decoration(draw: Callable[P, None]) -> Callable[P, None]:
    """Keep a function that draws a picture from failing a run: an exception becomes a line on standard error."""

    @functools.wraps(draw)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            draw(*args, **kwargs)
        except Exception as problem:
            pictures = [str(a) for a in (*args, *kwargs.values()) if isinstance(a, Path) and a.suffix == ".png"]
            reason = str(problem).partition("\n")[0] or type(problem).__name__
            print(f"{pictures[-1] if pictures else draw.__name__}: not drawn ({reason})", file=sys.stderr)

    return guarded


def caption(text: str) -> str:
    """`text` as a title for matplotlib: $ is escaped, bytes that are not UTF-8 become U+FFFD, and an ellipsis replaces
    characters that no installed font has and the middle of a long text."""
    from matplotlib.font_manager import findfont, get_font, get_font_names

    drawable = set(get_font(findfont("DejaVu Sans")).get_charmap())
    chinese = bool(set(get_font_names()) & set(_CHINESE))
    text = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    drawn = (c if ord(c) in drawable or (chinese and _IDEOGRAPH.fullmatch(c)) else "\0" for c in text)
    text = re.sub("\0+", "…", "".join(drawn))
    if len(text) > _WIDEST:
        text = f"{text[: _WIDEST // 2]}…{text[-_WIDEST // 2 :]}"
    return text.replace("$", r"\$")


def duration(seconds: float) -> str:
    """'2h05m', '3m20s' or '12s'."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
