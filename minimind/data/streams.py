"""Decompressed bytes of plain, gzip and Zstandard files; a torn stream is an error, never an end."""

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, Any

import zstandard

_COMPRESSED_CHUNK = 1 << 14  # small, because 4 bytes of Zstandard can hold 128 KiB
_SKIP_CHUNK = 1 << 20


class StreamError(ValueError):
    """The compressed stream ends early or is corrupt; the message says which."""


def open_stream(path: Path, offset: int = 0) -> IO[bytes]:
    """Open `path` from `offset` decompressed bytes on. Opening raises OSError, reading StreamError."""
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
    """zstandard's own stream_reader ends quietly inside a frame, so frames are followed here."""

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
    """Bytes in `path` once decompressed, as its header or trailer tells (for a single frame), or None."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if path.name.endswith(".gz"):
            file.seek(max(size - 4, 0))
            told = int.from_bytes(file.read(4), "little")
            return told if told >= size else None  # kept modulo 2**32
        if path.name.endswith(".zst"):
            try:
                told = zstandard.frame_content_size(file.read(18))
            except zstandard.ZstdError:
                return None
            return told if told > 0 else None
    return size
