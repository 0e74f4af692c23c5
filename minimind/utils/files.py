"""Where caches live, and how they are written: atomically, one process at a time, with plain errors."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from minimind.utils.progress import say

_ELSEWHERE = "choose another folder with --cache-dir or $MINIMIND_CACHE"


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else $MINIMIND_CACHE, else ~/.cache/minimind. ValueError where that needs a home that is not."""
    root = cache_dir or os.environ.get("MINIMIND_CACHE") or "~/.cache/minimind"
    try:
        return Path(root).expanduser()
    except RuntimeError:  # in a container, for one: no $HOME, and a user that the system does not know
        raise ValueError(f"{root}: there is no such home folder; {_ELSEWHERE}") from None


def make_folder(folder: Path) -> Path:
    """Create `folder`; ValueError when it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(folder, 1 << 20) from None
        raise ValueError(f"{folder}: cannot write here ({error.strerror}); {_ELSEWHERE}") from None
    return folder


def is_disk_full(error: OSError) -> bool:
    """Whether `error` says that the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(folder: Path, needed: int) -> ValueError:
    """The error of a full disk; `needed` is the bytes still to be written there."""
    return ValueError(
        f"{folder}: the disk or quota is full, about {max(needed, 1) / 1e6:,.1f} MB more are needed; "
        f"free some space or {_ELSEWHERE}"
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` whole and durably, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file to the disk, or, of a folder, the renames in it, which Windows can neither open nor be asked for."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None when there is none or it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` atomically. A name that is not UTF-8, as file names may be, reads back as it is."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False).encode(errors="backslashreplace"))


@contextmanager
def locked(path: Path, what: str, console: Console) -> Iterator[None]:
    """Hold the lock file `path`, saying so when another process has it; the lock of a dead one is free."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(console, f"waiting for another process {what}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
