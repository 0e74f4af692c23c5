"""Rows from all over a file that is too large to read, for figures about all of it.

A file is read in stretches, one at a random place of each of equal parts. Of a stretch the rows are taken whose first
byte lies in it, so that every row is as likely as any other, long or short. A compressed file can be read from its
beginning alone.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard

_STRETCHES = 64
_LEAST = 1 << 14  # bytes of a stretch
_AHEAD = 1 << 14  # compressed bytes read at once: more would count as used


@dataclass(frozen=True)
class FileSample:
    """total: bytes of the whole text, of a compressed file an estimate; sizes: int64 [rows], bytes of each row taken,
    in their order; whole: whether these are all rows."""

    total: float
    sizes: np.ndarray
    whole: bool


def sample_rows(path: Path, out: Path, limit: int, seed: int = 0) -> FileSample:
    """Write about `limit` bytes of the rows of `path` into `out`, uncompressed; all of them where there are no more."""
    packed = path.name.endswith((".gz", ".zst"))
    with open(path, "rb") as file, open(out, "wb") as target:
        size = path.stat().st_size
        rows = _first(file, path, limit) if packed else _stretches(file, size, limit, seed)
        sizes = []
        for row in rows:
            target.write(row if row.endswith(b"\n") else row + b"\n")
            sizes.append(len(row))
        taken = sum(sizes)
        if not packed:
            return FileSample(size, np.array(sizes, np.int64), taken >= size)
        whole = taken < limit
        total = taken if whole else taken * size / max(1, file.tell())
        return FileSample(total, np.array(sizes, np.int64), whole)


def _first(file: IO[bytes], path: Path, limit: int) -> Iterator[bytes]:
    """The first rows of a compressed file."""
    if path.name.endswith(".gz"):
        raw: Any = gzip.GzipFile(fileobj=file)
    else:
        unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        raw = unpacker.stream_reader(file, _AHEAD, read_across_frames=True, closefd=False)
    stream = io.BufferedReader(raw)
    taken = 0
    while taken < limit and (row := stream.readline()):
        taken += len(row)
        yield row
    stream.detach()


def _stretches(file: IO[bytes], size: int, limit: int, seed: int) -> Iterator[bytes]:
    if size <= limit:
        yield from file
        return
    count = max(1, min(_STRETCHES, limit // _LEAST))
    length, part = limit // count, size / count
    places = np.random.default_rng(seed).random(count)
    found = False
    for i, place in enumerate(places.tolist()):
        begin = int(i * part + place * (part - length))
        file.seek(max(0, begin - 1))
        if begin:
            file.readline()
        while file.tell() < begin + length and (row := file.readline()):
            found = True
            yield row
    if not found:  # rows longer than the parts
        file.seek(0)
        yield file.readline()
