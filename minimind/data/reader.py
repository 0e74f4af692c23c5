"""Read rows and documents from .jsonl and .txt files, plain, gzipped (.gz) or Zstandard-compressed (.zst).

Memory holds one line of a .jsonl file or one 8 KiB piece of a .txt file. Every error is one line that names file:line.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from minimind.data.fields import kind_of
from minimind.data.formats import AUTO, RowFormat

MOST_BYTES = 1 << 26  # largest row; a row takes up to 20 times its size in memory until it is tokenized
PIECE_BYTES = 1 << 13  # several training contexts; a 1 MB book has 130 pieces, so that 5% of it can be held out
BOM = b"\xef\xbb\xbf"
_FIRST_BAD_ROWS = 5
_COMPRESSED_CHUNK = 1 << 14  # small, because 4 bytes of Zstandard can hold 128 KiB
_SKIP_CHUNK = 1 << 20

Report = Callable[[int, str], None]  # called with (line from 1, reason); raises or counts the row


@dataclass(frozen=True)
class Position:
    """A place in a file, after `offset` decompressed bytes and `line` lines."""

    offset: int = 0
    line: int = 0


START = Position()


@dataclass(frozen=True)
class Document:
    """One text. `num_bytes` is its UTF-8 length, `line` (from 1) its first line, `end` the position after it."""

    text: str
    num_bytes: int
    line: int
    end: Position

    @property
    def size(self) -> int:
        """Approximate memory, in characters."""
        return len(self.text)


@dataclass
class BadRows:
    """The rows that `on_bad_row="skip"` left out: their number, and the line and reason of the first few."""

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


def read_documents(
    path: Path | str,
    on_bad_row: str = "error",
    start: Position = START,
    bad: BadRows | None = None,
    row_format: RowFormat = AUTO,
) -> Iterator[Document]:
    """Yield the documents of `path`, from `start` on (the `end` of an earlier document).

    Each line of a .jsonl file is a document, {"text": str}; blank lines are skipped. A .txt file is cut at line ends
    into pieces of at most 8 KiB; a longer line is cut between characters. Joined, the pieces are the file without its
    byte order mark. A bad row raises ValueError naming file:line; if `on_bad_row` is "skip", it is added to `bad`
    instead. An empty file has no documents.
    """
    report = reporter(path, on_bad_row, bad)
    if _is_text(path):
        yield from _text_pieces(Path(path), start, report)
        return
    for line, end, row in iter_rows(Path(path), start, report):
        try:
            text = row_format.text(row)
            num_bytes = len(text.encode())
        except ValueError as error:
            report(line, reason_of(error))
            continue
        yield Document(text, num_bytes, line, end)


def iter_texts(
    path: Path | str, on_bad_row: str = "error", bad: BadRows | None = None, row_format: RowFormat = AUTO
) -> Iterator[str]:
    """Yield every non-empty text in a file of any training stage, to train a tokenizer on.

    Rows: {"text"}, {"conversations": [message]} or {"chosen": [message], "rejected": [message]}. The texts are the
    content, reasoning_content, tools and tool_calls of each message, and the row's system and tools. A .txt file yields
    its pieces. Errors as in `read_documents`.
    """
    report = reporter(path, on_bad_row, bad)
    if _is_text(path):
        yield from (document.text for document in _text_pieces(Path(path), START, report))
        return
    for line, _, row in iter_rows(Path(path), START, report):
        try:
            values = [
                v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in row_format.texts(row) if v
            ]
            texts = [text for text in values if text.strip()]
            for text in texts:
                text.encode()
        except ValueError as error:
            report(line, reason_of(error))
            continue
        yield from texts


def iter_rows(path: Path, start: Position, report: Report) -> Iterator[tuple[int, Position, dict[str, Any]]]:
    """Yield (line from 1, position after it, object) for every usable line of a .jsonl file."""
    line, offset = start.line, start.offset
    with open_stream(path, offset) as stream:
        while True:
            try:
                chunk, size = _line(stream)
            except StreamError as error:
                report(line + 1, str(error))
                return
            if not chunk:
                return
            line, offset = line + 1, offset + size
            if size > len(chunk):
                report(line, f"the row has more than {MOST_BYTES >> 20} MiB; divide it into several rows")
                continue
            body = chunk.removeprefix(BOM) if offset == len(chunk) else chunk
            if body.isspace() or not body:
                continue
            try:
                row = _parse(body)
            except ValueError as error:
                report(line, reason_of(error))
                continue
            yield line, Position(offset, line), row


def bad_row_error(path: Path | str, line: int, reason: str) -> ValueError:
    """The error for a bad row, in one line that says how to go on."""
    return ValueError(f"{path}:{line}: {reason}; fix the row or pass --on-bad-row skip")


def reporter(path: Path | str, on_bad_row: str, bad: BadRows | None) -> Report:
    """The function to call on a bad row. Raises ValueError unless `on_bad_row` is "error" or "skip"."""
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"--on-bad-row must be error or skip, not {on_bad_row!r}")

    def report(line: int, reason: str) -> None:
        if on_bad_row == "error":
            raise bad_row_error(path, line, reason)
        if bad is not None:
            bad.add(line, reason)

    return report


def reason_of(error: ValueError) -> str:
    """Why a row is bad, from the exception that it raised."""
    if isinstance(error, UnicodeEncodeError):
        unit = ord(error.object[error.start])
        return f"the text holds a lone surrogate (\\u{unit:04x}), which is not a character"
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 (byte 0x{error.object[error.start]:02x})"
    return str(error)


def _is_text(path: Path | str) -> bool:
    return str(path).endswith((".txt", ".txt.gz", ".txt.zst"))


def _line(stream: IO[bytes]) -> tuple[bytes, int]:
    """(the next line, cut to MOST_BYTES; its full length in bytes)."""
    line = stream.readline(MOST_BYTES)
    size, part = len(line), line
    while part and not part.endswith(b"\n"):
        part = stream.readline(_SKIP_CHUNK)
        size += len(part)
    return line, size


def _parse(body: bytes) -> dict[str, Any]:
    text = body.rstrip().decode()
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("malformed JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ValueError(f'the row is {kind_of(row)}, not an object such as {{"text": "..."}}')
    return row


def _text_pieces(path: Path, start: Position, report: Report) -> Iterator[Document]:
    """Yield pieces of at most 8 KiB from `start`, the file's beginning or the end of an earlier piece.

    A longer line is cut between characters. A line that is not UTF-8 is reported and left out.
    """
    parts: list[str] = []
    size, first_line, piece_end = 0, start.line + 1, start
    for text, num_bytes, line, end in _parts_of_lines(path, start, report):
        if parts and size + num_bytes > PIECE_BYTES:
            yield Document("".join(parts), size, first_line, piece_end)
            parts, size = [], 0
        if text:
            first_line = first_line if parts else line
            parts.append(text)
            size += num_bytes
        piece_end = end
    if parts:
        yield Document("".join(parts), size, first_line, piece_end)


def _parts_of_lines(path: Path, start: Position, report: Report) -> Iterator[tuple[str, int, int, Position]]:
    """Yield (text, its size in bytes, line from 1, position after it); the text of a reported part is empty."""
    line, offset = start.line, start.offset
    with open_stream(path, start.offset) as stream:
        for body in _raw_parts(stream, line, report):
            number = line + 1
            line, offset = line + body.endswith(b"\n"), offset + len(body)
            if offset == len(body):
                body = body.removeprefix(BOM)
            try:
                text = body.decode()
            except UnicodeDecodeError as error:
                report(number, reason_of(error))
                text, body = "", b""
            yield text, len(body), number, Position(offset, line)


def _raw_parts(stream: IO[bytes], line: int, report: Report) -> Iterator[bytes]:
    """Yield lines, longer ones in parts of at most 8 KiB. Where a part ends depends only on where it starts."""
    carry = b""
    while True:
        try:
            chunk = stream.readline(PIECE_BYTES - len(carry))
        except StreamError as error:
            report(line + 1, str(error))
            return
        if not chunk:
            break
        body, carry = carry + chunk, b""
        if not body.endswith(b"\n"):
            body, carry = _cut_between_characters(body)
        line += body.endswith(b"\n")
        if body:
            yield body
    if carry:
        report(line + 1, "the file ends inside a UTF-8 character")


def _cut_between_characters(body: bytes) -> tuple[bytes, bytes]:
    """Split off an incomplete UTF-8 character at the end (at most 3 bytes)."""
    for back in range(1, min(3, len(body)) + 1):
        byte = body[-back]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4 bytes
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return (body[:-back], body[-back:]) if back < size else (body, b"")
        if byte < 0x80:
            break
    return body, b""


class StreamError(ValueError):
    """The compressed stream ends early or is corrupt."""


def open_stream(path: Path, offset: int = 0) -> IO[bytes]:
    """Open `path` at `offset` decompressed bytes. Opening raises OSError, reading StreamError."""
    name = str(path)
    if name.endswith(".gz"):
        stream: IO[bytes] = io.BufferedReader(_Gzip(path), _SKIP_CHUNK)
    elif name.endswith(".zst"):
        stream = io.BufferedReader(_Zstandard(path), _SKIP_CHUNK)
    else:
        stream = open(path, "rb", buffering=_SKIP_CHUNK)  # noqa: SIM115 - the caller closes it
        stream.seek(offset)
        return stream
    while offset > 0:
        skipped = len(stream.read(min(offset, _SKIP_CHUNK)))
        if not skipped:
            break
        offset -= skipped
    return stream


class _Raw(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        raise NotImplementedError


class _Gzip(_Raw):
    def __init__(self, path: Path) -> None:
        self._file = gzip.open(path, "rb")  # noqa: SIM115 - close() does

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read1(size)
        except EOFError:
            raise StreamError("the gzip stream is truncated") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise StreamError(f"the gzip stream is corrupt ({error})") from None

    def close(self) -> None:
        self._file.close()
        super().close()


class _Zstandard(_Raw):
    """Decompresses frame by frame: zstandard's own stream_reader takes a truncated frame for the end of the file."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - close() does
        self._context = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # what `zstd --long=31` writes
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def _read(self, size: int) -> bytes:
        while not self._output:
            if not self._input:
                self._input = self._file.read(_COMPRESSED_CHUNK)
                if not self._input:
                    if self._frame is not None:
                        raise StreamError("the Zstandard stream is truncated")
                    return b""
            self._output = memoryview(self._decompress())
        data, self._output = bytes(self._output[:size]), self._output[size:]
        return data

    def _decompress(self) -> bytes:
        if self._frame is None:
            self._frame = self._context.decompressobj()
        try:
            data = self._frame.decompress(self._input)
        except zstandard.ZstdError as error:
            raise StreamError(f"the Zstandard stream is corrupt ({error})") from None
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def decompressed_size(path: Path) -> int | None:
    """Size of `path` in decompressed bytes, if it is a single frame; None if its header or trailer does not give it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if path.name.endswith(".gz"):
            file.seek(max(size - 4, 0))
            total = int.from_bytes(file.read(4), "little")
            return total if total >= size else None  # stored modulo 2**32
        if path.name.endswith(".zst"):
            try:
                total = zstandard.frame_content_size(file.read(18))
            except zstandard.ZstdError:
                return None
            return total if total > 0 else None
    return size
