"""What the reader hands on: documents, their places, and the rows it could not use."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"
_FIRST_BAD_ROWS = 5

Report = Callable[[int, str], None]  # (line from 1, reason): raises, or counts the row as left out


@dataclass(frozen=True)
class Position:
    """A place in a file: `offset` decompressed bytes and `line` lines lie before it."""

    offset: int = 0
    line: int = 0


START = Position()


@dataclass(frozen=True)
class Document:
    """One text. `num_bytes` is its UTF-8 length, `line` (from 1) where it begins, `end` the place after."""

    text: str
    num_bytes: int
    line: int
    end: Position

    @property
    def size(self) -> int:
        """Characters it takes in memory, about."""
        return len(self.text)


@dataclass
class BadRows:
    """Rows left out under `on_bad_row="skip"`: how many, and line and reason of the first few."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, reason: str) -> None:
        """Count the row at `line` (from 1)."""
        self.count += 1
        if len(self.first) < _FIRST_BAD_ROWS:
            self.first.append((line, reason))

    def __str__(self) -> str:
        line, reason = self.first[0]
        return f"{self.count:,} rows left out, the first in line {line}: {reason}"


def bad_row_error(path: Path | str, line: int, reason: str) -> ValueError:
    """The error of a bad row, in one line and with the way out."""
    return ValueError(f"{path}:{line}: {reason}; fix the row or pass --on-bad-row skip")


def reporter(path: Path | str, on_bad_row: str, bad: BadRows | None) -> Report:
    """What to call on a bad row. Raises ValueError unless `on_bad_row` is "error" or "skip"."""
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"--on-bad-row must be error or skip, not {on_bad_row!r}")

    def report(line: int, reason: str) -> None:
        if on_bad_row == "error":
            raise bad_row_error(path, line, reason)
        if bad is not None:
            bad.add(line, reason)

    return report


def reason_of(error: ValueError) -> str:
    """The reason of a bad row from the exception that found it."""
    if isinstance(error, UnicodeEncodeError):
        unit = ord(error.object[error.start])
        return f"the text holds a lone surrogate (\\u{unit:04x}), which is not a character"
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 (byte 0x{error.object[error.start]:02x})"
    return str(error)


def kind_of(value: Any) -> str:
    """What JSON calls `value`."""
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")
