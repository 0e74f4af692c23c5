"""Ctrl-C while a script imports what it needs ends it with 130, as later on, and without a traceback.

An exception would not do: what imports C extensions may turn KeyboardInterrupt into an error of its own.
"""

from __future__ import annotations

import os
import signal
import types


def leave_on_interrupt() -> None:
    """First in a script: until `started` Ctrl-C ends the process at once."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as under nohup
        signal.signal(signal.SIGINT, _leave)


def started() -> None:
    """From here on Ctrl-C is KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: types.FrameType | None) -> None:
    os._exit(128 + number)
