"""Sample rows from all over a large file, to estimate statistics of the whole file.

The file is divided into equal parts, and one stretch is read at a random place of each. The sample has the rows whose
first byte lies in a stretch, so that every row is equally likely, long or short. A compressed file is sampled from its
beginning only.
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
    """total: bytes of the whole text, estimated if it is compressed; sizes: int64 [rows], the bytes of each sampled
    row, in order; whole: whether the sample has all rows."""

    total: float
    sizes: np.ndarray
    whole: bool


def sample_rows(path: Path, out: Path, limit: int, seed: int = 0) -> FileSample:
    """Write a sample of about `limit` bytes of the rows of `path` to `out`, uncompressed; all rows of a smaller
    file."""
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
    empty = True
    for i, place in enumerate(places.tolist()):
        begin = int(i * part + place * (part - length))
        file.seek(max(0, begin - 1))
        if begin:
            file.readline()
        while file.tell() < begin + length and (row := file.readline()):
            empty = False
            yield row
    if empty:  # rows longer than the parts
        file.seek(0)
        yield file.readline()
