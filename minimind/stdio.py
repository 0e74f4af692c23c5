"""Standard output and error of a command, whatever they are connected to."""

from __future__ import annotations

import io
import os
import sys


def prepare_output() -> None:
    """Standard output and error write what their encoding lacks as \\uXXXX: a sample in Chinese ends no training in
    a Latin-1 terminal. What is closed leads nowhere."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
