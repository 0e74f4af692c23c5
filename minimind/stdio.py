"""What surrounds a command: its arguments as the shell left them, standard output and error whatever they lead to."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence

_TEXT = ("--prompt", "--system")  # flags that no path follows


def prepare_output() -> None:
    """Standard output and error write what their encoding lacks as \\uXXXX: a sample in Chinese ends no training in
    a Latin-1 terminal. What is closed leads nowhere."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def with_home(arguments: Sequence[str]) -> list[str]:
    """The arguments with ~/ and ~user/ expanded where a path begins with it: a shell does so at the beginning of a word
    alone, not in --out=~/run."""
    expanded: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, path = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        if flag not in _TEXT and re.match(r"~[^/\s]*/", path):
            argument = f"{flag}=" * bool(equals) + os.path.expanduser(path)
        expanded.append(argument)
    return expanded
