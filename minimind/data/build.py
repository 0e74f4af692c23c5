"""Tokenize one file into the arrays of a `TokenizedFile`, in parts, so that a build that was killed can resume.

Data is appended and synced; then `progress.json` is replaced atomically. It says how much of the data is complete and
where in the text to continue. A resumed build first truncates the files to the complete data.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console

from minimind.data.corpus import CODES, DOCUMENTS, ENTRY_BYTES, HASH_BYTES, HASHES, META, TOKEN_BYTES, TOKENS
from minimind.data.encoding import Encoded, Recipe
from minimind.data.reader import BadRows, Document, Position, bad_row_error, decompressed_size
from minimind.data.split import hash_texts
from minimind.utils.display import ByteProgress
from minimind.utils.files import disk_full, is_disk_full, read_json, write_json

PROGRESS = "progress.json"
PART_BYTES = 32 << 20
BATCH_BYTES = 1 << 20


@dataclass
class Progress:
    """The complete data in the files, and the position in the text at which the next part begins."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    weighted: bool = False
    position: Position = Position()  # noqa: RUF009 - frozen
    bad: BadRows = field(default_factory=BadRows)

    @classmethod
    def load(cls, folder: Path, weighted: bool) -> "Progress":
        """The progress recorded in `folder`; zero if there is no record or the files are shorter than it says."""
        value = read_json(folder / PROGRESS)
        if value is None:
            return cls(weighted=weighted)
        try:
            bad = load_bad_rows(value.pop("bad"))
            progress = cls(position=Position(**value.pop("position")), bad=bad, **value)
            progress.weighted = weighted
            complete = all(os.path.getsize(folder / name) >= size for name, size in progress.sizes().items())
        except (OSError, TypeError, KeyError):
            return cls(weighted=weighted)
        return progress if complete else cls(weighted=weighted)

    def sizes(self) -> dict[str, int]:
        """Size of the complete data in each file, in bytes."""
        sizes = {TOKENS: self.tokens * TOKEN_BYTES, DOCUMENTS: (self.documents + 1) * ENTRY_BYTES}
        sizes |= {HASHES: self.documents * HASH_BYTES}
        return sizes | ({CODES: self.tokens} if self.weighted else {})


def load_bad_rows(value: dict[str, Any]) -> BadRows:
    """The inverse of `asdict(bad_rows)` through JSON."""
    return BadRows(value["count"], [(line, reason) for line, reason in value["first"]])


def build(
    folder: Path,
    path: Path,
    recipe: Recipe[Any],
    on_bad_row: str,
    console: Console,
    part_bytes: int = PART_BYTES,
    batch_bytes: int = BATCH_BYTES,
) -> None:
    """Tokenize `path` into `folder`, continuing after the last complete part. The caller holds the folder's lock.

    Raises ValueError on a bad row (unless skipped), a file without documents, and a full disk.
    """
    progress = Progress.load(folder, recipe.weighted)
    if on_bad_row == "error" and progress.bad.count:
        raise bad_row_error(path, *progress.bad.first[0])
    total = decompressed_size(path)
    try:
        with _Files(folder, progress) as files:
            title = f"tokenizing {path.name}"
            with ByteProgress(console, title, total, progress.position.offset) as progress_bar:
                documents = recipe.read(path, on_bad_row, progress.position, progress.bad)
                uncommitted = 0
                for batch in _batches(documents, batch_bytes):
                    files.append(batch, _encoded(recipe, batch, path))
                    progress_bar.update(progress.position.offset)
                    uncommitted += sum(document.size for document in batch)
                    if uncommitted >= part_bytes:
                        files.commit()
                        uncommitted = 0
            files.commit()
        if not progress.documents:
            raise ValueError(f"{path}: no document in this file{_all_bad(progress.bad)}")
        sizes = {name: size for name, size in progress.sizes().items() if name != HASHES}  # hashes can be rebuilt
        meta = asdict(progress) | {"sizes": sizes, "source": path.name}
        write_json(folder / META, meta)
    except OSError as error:
        if is_disk_full(error):
            _cut_back(folder, recipe.weighted)
            raise disk_full(folder, _bytes_needed(progress, total or os.path.getsize(path))) from None
        raise
    (folder / PROGRESS).unlink(missing_ok=True)


def _encoded(recipe: Recipe[Any], batch: list[Document], path: Path) -> Encoded:
    try:
        return recipe.encode(batch)
    except ValueError as error:  # a text too long for this tokenizer
        line = max(batch, key=lambda document: document.size).line
        raise ValueError(f"{path}:{line}: {error}") from None


def _all_bad(bad: BadRows) -> str:
    if not bad.count:
        return "; give a file with text in it"
    line, reason = bad.first[0]
    return f", as all {bad.count} rows are bad (line {line}: {reason}); fix the rows or leave the file out"


class _Files:
    """The growing files: `append` writes a batch, `commit` records all batches written so far as complete."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder, self._progress = folder, progress
        self._files: dict[str, BinaryIO] = {}
        try:
            for name, size in progress.sizes().items():
                self._files[name] = _open_at(folder / name, size if progress.documents else 0)
            if not progress.documents:
                _write(self._files[DOCUMENTS], np.zeros(2, "<i8"))
        except OSError:
            self.close()
            raise

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def append(self, batch: list[Document], encoded: Encoded) -> None:
        progress = self._progress
        sizes = np.array([document.num_bytes for document in batch])
        ends = encoded.lengths.cumsum() + progress.tokens
        entries = np.stack([ends, sizes.cumsum() + progress.bytes], axis=1)
        _write(self._files[TOKENS], encoded.tokens.astype("<u2", copy=False))
        if encoded.codes is not None:
            _write(self._files[CODES], encoded.codes)
        _write(self._files[DOCUMENTS], entries.astype("<i8"))
        _write(self._files[HASHES], hash_texts([document.text for document in batch]))
        progress.documents += len(batch)
        progress.tokens, progress.bytes = int(entries[-1, 0]), int(entries[-1, 1])
        progress.position = batch[-1].end

    def commit(self) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())
        if self._progress.documents:
            write_json(self._folder / PROGRESS, asdict(self._progress))


def _write(file: BinaryIO, array: np.ndarray) -> None:
    """Write all of `array`; one unbuffered write may write only a part, such as when the disk fills up."""
    data = memoryview(array.tobytes())
    while data:
        data = data[file.write(data) :]


def _open_at(path: Path, size: int) -> BinaryIO:
    if size == 0:
        path.unlink(missing_ok=True)  # not truncated: another process may have the old file mapped
    file = open(path, "r+b" if size else "w+b", buffering=0)  # noqa: SIM115 - the caller closes it
    file.truncate(size)
    file.seek(size)
    return file


def _batches(documents: Iterator[Document], batch_bytes: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut_back(folder: Path, weighted: bool) -> None:
    """Truncate the files to the complete data, to free disk space."""
    progress = Progress.load(folder, weighted)
    for name, size in progress.sizes().items():
        if progress.documents and (folder / name).exists():
            os.truncate(folder / name, size)
        elif not progress.documents:
            (folder / name).unlink(missing_ok=True)


def _bytes_needed(progress: Progress, total: int) -> int:
    """Estimated bytes still to be written: remaining text x output bytes per byte of text so far (1 at the start)."""
    done = progress.position.offset
    rate = sum(progress.sizes().values()) / done if done else 1.0
    return int(rate * max(total - done, 0)) + BATCH_BYTES
