"""What surrounds a command: its arguments as the shell left them, standard output and error whatever they lead to."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence
from typing import TypeVar

Flags = TypeVar("Flags")

_TEXT = ("--prompt", "--system")  # flags that no path follows


def prepare_output() -> None:
    """Standard output and error write what their encoding lacks as \\uXXXX: a sample in Chinese ends no training in
    a Latin-1 terminal. What is closed leads nowhere."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def command_line(flags: type[Flags], description: str | None) -> Flags:
    """The dataclass `flags` as the command line of a script fills it; every path of it may begin with ~."""
    try:
        arguments = with_home(sys.argv[1:])
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    import tyro  # not by `minimind` alone, which answers at once

    return tyro.cli(flags, description=description, args=arguments)


def with_home(arguments: Sequence[str]) -> list[str]:
    """The arguments with ~/ and ~user/ expanded where a path begins with it: a shell does so at the beginning of a word
    alone, not in --out=~/run. ValueError for a user that is not there."""
    expanded: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, path = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        begins = re.match(r"~[^/\s]*(/|$)" if equals else r"~[^/\s]*/", path)
        if flag not in _TEXT and begins:
            found = os.path.expanduser(path)
            if found == path and not os.path.exists(begins[0]):
                raise ValueError(f"{flag} {path}: there is no such user; write ./~ for a name that begins so".lstrip())
            argument = f"{flag}=" * bool(equals) + found
        expanded.append(argument)
    return expanded
