"""Text files to documents, streaming and with one-line errors that name file:line.

Formats: `.jsonl` with one `{"text": str}` object per line (upstream MiniMind's pretraining format) and
`.txt`, either of them plain, gzipped (`.gz`) or Zstandard-compressed (`.zst`). Memory is one line (jsonl) or
one 8 KiB piece (txt), whatever the file's size.
"""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minimind.data.forms import AUTO, Form
from minimind.data.pieces import text_pieces
from minimind.data.records import (
    BOM,
    START,
    BadRows,
    Document,
    Position,
    Report,
    kind_of,
    reason_of,
    reporter,
)
from minimind.data.streams import StreamError, open_stream

EXTENSIONS = tuple(kind + packing for kind in (".jsonl", ".txt") for packing in ("", ".gz", ".zst"))
_KNOWN = f"expected one of {' '.join(EXTENSIONS)}"

__all__ = ["EXTENSIONS", "BadRows", "Document", "Position", "expand_paths", "iter_texts", "read_documents"]


def expand_paths(patterns: Sequence[str | Path]) -> list[Path]:
    """Files named by files, folders (searched recursively, hidden names left out) and glob patterns.

    The order is that of `patterns`, sorted within each, every file once. Raises ValueError when a pattern
    matches nothing, a folder holds no file of a known extension, or a named file has an unknown one.
    """
    if isinstance(patterns, (str, Path)):
        patterns = [patterns]
    if not patterns:
        raise ValueError("no data given; name at least one file, folder or glob pattern")
    found: dict[Path, Path] = {}
    for pattern in patterns:
        for path in _expand_one(str(pattern)):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_documents(
    path: Path | str,
    on_bad_row: str = "error",
    start: Position = START,
    bad: BadRows | None = None,
    form: Form = AUTO,
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
            values = [
                v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in form.texts(row) if v
            ]
            texts = [text for text in values if text.strip()]
            for text in texts:
                text.encode()
        except ValueError as error:
            report(line, reason_of(error))
            continue
        yield from texts


def _expand_one(pattern: str) -> list[Path]:
    if not pattern:  # Path("") is the current folder: all below it would be data
        raise ValueError("an empty name among the data; give files, folders or glob patterns")
    path = Path(pattern).expanduser()
    if path.is_file():
        if not path.name.endswith(EXTENSIONS):
            raise ValueError(f"{pattern}: unknown kind of file; {_KNOWN}")
        return [path]
    if path.is_dir():
        files = [file for file in _files_under(path) if file.name.endswith(EXTENSIONS)]
        if not files:
            raise ValueError(f"{pattern}: no data file in this folder; {_KNOWN}")
        return files
    matched = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not matched:
        raise ValueError(f"{pattern}: no such file, folder or match; check the path given")
    files = []
    for match in matched:
        files += _files_under(match) if match.is_dir() else [match]
    files = [file for file in files if file.is_file() and file.name.endswith(EXTENSIONS)]
    if not files:
        raise ValueError(f"{pattern}: matches no data file, only such as {matched[0]}; {_KNOWN}")
    return files


def _files_under(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def _is_text(path: Path | str) -> bool:
    return str(path).endswith((".txt", ".txt.gz", ".txt.zst"))


def iter_rows(path: Path, start: Position, report: Report) -> Iterator[tuple[int, Position, dict[str, Any]]]:
    """(line from 1, place after it, object) of every usable line of a .jsonl file."""
    line, offset = start.line, start.offset
    with open_stream(path, offset) as stream:
        while True:
            try:
                chunk = stream.readline()
            except StreamError as error:
                report(line + 1, str(error))
                return
            if not chunk:
                return
            line, offset = line + 1, offset + len(chunk)
            body = chunk.removeprefix(BOM) if offset == len(chunk) else chunk
            if body.isspace() or not body:
                continue
            try:
                row = _parse(body)
            except ValueError as error:
                report(line, reason_of(error))
                continue
            yield line, Position(offset, line), row


def _parse(body: bytes) -> dict[str, Any]:
    text = body.decode().rstrip()
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("malformed JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ValueError(f'the row is {kind_of(row)}, not an object such as {{"text": "..."}}')
    return row
