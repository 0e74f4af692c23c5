"""What a run shows: a live progress line in a terminal, a plain line now and then elsewhere; and pictures."""

from __future__ import annotations

import functools
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from minimind.utils.progress import say

P = ParamSpec("P")

_PLAIN_SECONDS = 10.0
# Fonts with Chinese characters, of Linux, macOS and Windows: runs are named after their data.
_CHINESE = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC",
            "Microsoft YaHei", "SimHei")  # fmt: skip
_IDEOGRAPH = re.compile(r"[\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
_WIDEST = 90  # characters of a title


class Display:
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
        """line: loss, rate and so on. Every call redraws in a terminal; elsewhere one line per 10 seconds."""
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
    """matplotlib.pyplot, which needs no display, and draws Chinese titles where the system has a font for them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.font_manager import get_font_names

    known = set(get_font_names())
    plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _CHINESE if name in known)]
    warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)  # boxes then, and no pages of lines
    return plt


def decoration(draw: Callable[P, None]) -> Callable[P, None]:
    """Keep a function that draws a picture from failing a run: what goes wrong becomes a line on standard error."""

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
    """`text` as matplotlib writes it, in one line that fits: a $ begins no formula, bytes that are no UTF-8 become
    U+FFFD, and a run of characters that no font here has becomes an ellipsis, as does the middle of what is long."""
    from matplotlib.font_manager import findfont, get_font, get_font_names

    known = set(get_font(findfont("DejaVu Sans")).get_charmap())
    chinese = bool(set(get_font_names()) & set(_CHINESE))
    text = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    drawn = (c if ord(c) in known or (chinese and _IDEOGRAPH.fullmatch(c)) else "\0" for c in text)
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
