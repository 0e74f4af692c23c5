"""A .txt file as documents: cut at line ends into pieces that, joined, are the file."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from minimind.data.records import BOM, Document, Position, Report, reason_of
from minimind.data.streams import StreamError, open_stream

PIECE_BYTES = 1 << 13  # several training contexts; a 1 MB book is 130 pieces, so that 5% of it can be held out


def text_pieces(path: Path, start: Position, report: Report) -> Iterator[Document]:
    """Pieces of at most 8 KiB from `start` on, which is the beginning or the end of an earlier piece.

    A line longer than that is cut between characters. A line that is not UTF-8 is reported and left out.
    """
    held: list[str] = []
    held_bytes, first_line, place = 0, start.line + 1, start
    for text, num_bytes, line, end in _parts_of_lines(path, start, report):
        if held and held_bytes + num_bytes > PIECE_BYTES:
            yield Document("".join(held), held_bytes, first_line, place)
            held, held_bytes = [], 0
        if text:
            first_line = first_line if held else line
            held.append(text)
            held_bytes += num_bytes
        place = end
    if held:
        yield Document("".join(held), held_bytes, first_line, place)


def _parts_of_lines(path: Path, start: Position, report: Report) -> Iterator[tuple[str, int, int, Position]]:
    """(text, its bytes, line from 1, place after it); the text of a reported part is empty."""
    line, offset = start.line, start.offset
    with open_stream(path, start.offset) as stream:
        for body in _raw_parts(stream, line, report):
            here = line + 1
            line, offset = line + body.endswith(b"\n"), offset + len(body)
            if offset == len(body):
                body = body.removeprefix(BOM)
            try:
                text = body.decode()
            except UnicodeDecodeError as error:
                report(here, reason_of(error))
                text, body = "", b""
            yield text, len(body), here, Position(offset, line)


def _raw_parts(stream: IO[bytes], line: int, report: Report) -> Iterator[bytes]:
    """Lines, those beyond 8 KiB in parts; where a part ends depends only on where it starts."""
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
    """Split off a UTF-8 character left incomplete at the end (at most 3 bytes)."""
    for back in range(1, min(3, len(body)) + 1):
        byte = body[-back]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4 bytes
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return (body[:-back], body[-back:]) if back < size else (body, b"")
        if byte < 0x80:
            break
    return body, b""
