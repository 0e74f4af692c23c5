"""Text files to documents, streaming and with one-line errors that name file:line.

Formats: `.jsonl` with one `{"text": str}` object per line (upstream MiniMind's pretraining format) and
`.txt`, either of them plain, gzipped (`.gz`) or Zstandard-compressed (`.zst`). Memory is one line (jsonl) or
one 8 KiB piece (txt), whatever the file's size.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from minimind.data.forms import AUTO, Form
from minimind.data.pieces import text_pieces
from minimind.data.records import BOM, START, BadRows, Document, Position, Report, kind_of, reason_of, reporter
from minimind.data.streams import StreamError, open_stream

MOST_BYTES = 1 << 26  # of a row, which takes up to twenty times its size in memory until it is tokenized
_SKIPPED = 1 << 20

__all__ = ["BadRows", "Document", "Position", "iter_texts", "read_documents"]


def read_documents(
    path: Path | str, on_bad_row: str = "error", start: Position = START, bad: BadRows | None = None, form: Form = AUTO
) -> Iterator[Document]:
    """Documents of `path` from `start` on (an earlier document's `end`), one at a time.

    A jsonl line is a document; blank lines are not. A .txt file is cut at line ends into pieces of at most
    8 KiB (a longer line inside itself, between characters), which joined give the file without its byte
    order mark. A row that cannot be used raises ValueError naming file:line, or, when `on_bad_row` is "skip",
    is added to `bad` and left out. An empty file gives no document.
    """
    report = reporter(path, on_bad_row, bad)
    if _is_text(path):
        yield from text_pieces(Path(path), start, report)
        return
    for line, end, row in iter_rows(Path(path), start, report):
        try:
            text = form.text(row)
            num_bytes = len(text.encode())
        except ValueError as error:
            report(line, reason_of(error))
            continue
        yield Document(text, num_bytes, line, end)


def iter_texts(
    path: Path | str, on_bad_row: str = "error", bad: BadRows | None = None, form: Form = AUTO
) -> Iterator[str]:
    """Every non-empty text in a file of any training stage, to train a tokenizer on.

    Rows: `{"text"}`, `{"conversations": [message]}` or `{"chosen": [message], "rejected": [message]}`; a
    message gives its content, reasoning_content, tools and tool_calls, a row its system and tools; a .txt file
    gives its pieces. Errors as in `read_documents`.
    """
    report = reporter(path, on_bad_row, bad)
    if _is_text(path):
        yield from (document.text for document in text_pieces(Path(path), START, report))
        return
    for line, _, row in iter_rows(Path(path), START, report):
        try:
            values = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in form.texts(row) if v]
            texts = [text for text in values if text.strip()]
            for text in texts:
                text.encode()
        except ValueError as error:
            report(line, reason_of(error))
            continue
        yield from texts


def _is_text(path: Path | str) -> bool:
    return str(path).endswith((".txt", ".txt.gz", ".txt.zst"))


def iter_rows(path: Path, start: Position, report: Report) -> Iterator[tuple[int, Position, dict[str, Any]]]:
    """(line from 1, place after it, object) of every usable line of a .jsonl file."""
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


def _line(stream: IO[bytes]) -> tuple[bytes, int]:
    """(the next line, or its beginning where it is too long; its length in bytes)."""
    line = stream.readline(MOST_BYTES)
    size, part = len(line), line
    while part and not part.endswith(b"\n"):
        part = stream.readline(_SKIPPED)
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
