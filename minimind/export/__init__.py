"""Export of models to the formats of other programs; here, writing a file or folder whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


def check_free(path: Path) -> None:
    """ValueError if `path` is a file or a folder that is not empty."""
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"--out {path}: exists and is not empty; name another, or remove it")
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path}: exists; name another, or remove it")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` at which to create a file or folder; at the end it is renamed to `path`.

    ValueError if it cannot be written; then nothing remains.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if path.is_dir():
            path.rmdir()  # empty: check_free
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # the forms in which a full disk is reported
        raise ValueError(f"--out {path}: cannot be written ({str(error).splitlines()[0]})") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            with suppress(NotADirectoryError):  # a parent of `path` is a file
                partial.unlink(missing_ok=True)
