"""Start a command: Ctrl-C during imports, output streams, the command line, and the Python objects that it names."""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import re
import signal
import sys
import types
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

Flags = TypeVar("Flags")

_TEXT_FLAGS = ("--prompt", "--system")  # these take a text, not a path


def leave_on_interrupt() -> None:
    """Let Ctrl-C end the process at once, with status 130, until `started` is called.

    Call this first in a script. KeyboardInterrupt cannot be relied on during imports: C extensions may turn it into an
    error of their own.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # SIGINT may be ignored, as under nohup
        signal.signal(signal.SIGINT, _leave)


def started() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: types.FrameType | None) -> None:
    os._exit(128 + number)


def prepare_output() -> None:
    """Make standard output and error write characters that their encoding lacks as \\uXXXX, so that a Chinese sample
    does not end a training run in a Latin-1 terminal. A closed stream is replaced by the null device."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def command_line(flags: type[Flags], description: str | None) -> Flags:
    """Parse the command line of a script into the dataclass `flags`. Paths may begin with ~."""
    try:
        arguments = with_home(sys.argv[1:])
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    import tyro  # slow to import, and `minimind` without arguments does not need it

    reflow_help(flags)
    try:
        return tyro.cli(flags, description=description, args=arguments)
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter reports an error at exit
        sys.exit(0)


def reflow_help(flags: type) -> None:
    """Join the lines of each flag's docstring in the dataclass `flags` into one paragraph. tyro does so only for lines
    without indentation."""
    import tyro
    from docstring_parser import parse_from_object

    for owner in flags.__mro__:
        if not dataclasses.is_dataclass(owner) or "_reflowed" in owner.__dict__:
            continue
        annotations = owner.__annotations__
        for field in parse_from_object(owner).params:
            if field.arg_name in annotations and field.description:
                paragraphs = re.split(r"\n\s*\n", field.description)
                text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
                annotations[field.arg_name] = Annotated[annotations[field.arg_name], tyro.conf.arg(help=text)]
        owner._reflowed = True  # type: ignore[attr-defined]


def with_home(arguments: Sequence[str]) -> list[str]:
    """Expand ~/ and ~user/ at the beginning of paths. A shell does so only at the beginning of a word, not in
    --out=~/run. Raises ValueError for an unknown user."""
    expanded: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, path = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        begins = re.match(r"~[^/\s]*(/|$)" if equals else r"~[^/\s]*/", path)
        if flag not in _TEXT_FLAGS and begins:
            full = os.path.expanduser(path)
            if full == path and not os.path.exists(begins[0]):
                raise ValueError(f"{flag} {path}: there is no such user; write ./~ for such a name".lstrip())
            argument = f"{flag}=" * bool(equals) + full
        expanded.append(argument)
    return expanded


def named_object(path: str, kind: str, word: str = "") -> Any:
    """The object at `path`, "package.module:name", imported from the working directory or from Python's search path.
    Raises ValueError, one line, if there is none; the message calls the object a `kind`, and the path `word` + path."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{word}{path}: write {word}package.module:{kind}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: it may fail in any way
        raise ValueError(f"{word}{path}: cannot import {module_name} ({type(error).__name__}: {error})") from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"{word}{path}: {module_name} has no {kind} {name!r}") from None
