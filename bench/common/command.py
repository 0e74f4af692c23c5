"""The command line of every benchmark: checks of flags, error messages, exit status, output."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from rich.console import Console

from minimind.utils.startup import command_line


def run(
    main: Callable[[Any], Any],
    flags: type[Any],
    description: str | None,
    failure: Callable[[Any], str] = lambda result: "",
) -> NoReturn:
    """Call `main` with the command line's flags, and exit.

    If `main` returns a number, that is the exit status; a dict or a list is printed as one line of JSON. An error, or
    failure(result) unless that is empty, is printed as one line on stderr, with status 1. Ctrl-C gives status 130.
    """
    try:
        result = main(command_line(flags, description))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if isinstance(result, int):
        raise SystemExit(result)
    if result is not None:
        print(json.dumps(result), flush=True)
        if problem := failure(result):
            raise SystemExit(f"error: {problem}")
    raise SystemExit(0)


def check_choices(flag: str, values: Iterable[Any], choices: Iterable[Any]) -> None:
    """Raise ValueError, which names the value, if a value is not one of the choices."""
    choices = tuple(choices)
    for value in values:
        if value not in choices:
            raise ValueError(f"--{flag} {value}: unknown; choose from {', '.join(map(str, choices))}")


def check_at_least(least: int, **flags: Any) -> None:
    """Raise ValueError, which names the flag, if a flag is below `least`. A flag is a number, a tuple of numbers or
    None."""
    for flag, value in flags.items():
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < least:
                raise ValueError(f"--{flag.replace('_', '-')} {number}: must be at least {least}")
        if value == ():
            raise ValueError(f"--{flag.replace('_', '-')}: needs a value")


def table_console(width: int = 120) -> Console:
    """Standard output for tables: as wide as the terminal, or `width` characters if it is a file."""
    return Console(width=None if sys.stdout.isatty() else width)
