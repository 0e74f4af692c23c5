"""Find the cache folder, and write files atomically, one process at a time, with plain errors."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from minimind.utils.display import say

_ELSEWHERE = "choose another folder with --cache-dir or $MINIMIND_CACHE"


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else $MINIMIND_CACHE, else ~/.cache/minimind. Raises ValueError if the home folder is unknown."""
    root = cache_dir or os.environ.get("MINIMIND_CACHE") or "~/.cache/minimind"
    try:
        return Path(root).expanduser()
    except RuntimeError:  # for example in a container without $HOME, whose user the system does not know
        raise ValueError(f"{root}: there is no such home folder; {_ELSEWHERE}") from None


def make_folder(folder: Path) -> Path:
    """Create `folder` and return it. Raises ValueError if it cannot be written."""
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
    """Whether the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(folder: Path, needed: int) -> ValueError:
    """The error for a full disk; `needed` counts the bytes that remain to be written."""
    return ValueError(
        f"{folder}: the disk or quota is full, about {max(needed, 1) / 1e6:,.1f} MB more are needed; "
        f"free some space or {_ELSEWHERE}"
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write the whole file durably, or leave the old one as it is."""
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
    """Sync a file, or the renames in a folder, to the disk. Windows cannot open folders; there it does nothing."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None if the file is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` atomically. File names that are not UTF-8 survive the round trip."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False).encode(errors="backslashreplace"))


@contextmanager
def locked(path: Path, activity: str, console: Console) -> Iterator[None]:
    """Hold the lock file `path`. If another process holds it, print its `activity` ("reading x") and wait. The lock of
    a dead process is free."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(console, f"waiting for another process that is {activity}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
