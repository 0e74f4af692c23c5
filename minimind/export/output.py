"""What is written appears whole under its name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


def check_free(path: Path) -> None:
    """ValueError where `path` holds something already: nothing is overwritten."""
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"--out {path}: exists and is not empty; name another, or remove it")
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path}: exists; name another, or remove it")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write, a file or a folder that does not exist yet; it takes the name at the end.

    Raises ValueError where it cannot be written; the neighbour is gone then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if path.is_dir():
            path.rmdir()  # empty: check_free
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk becomes on its way here
        raise ValueError(f"--out {path}: cannot be written ({str(error).splitlines()[0]})") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            with suppress(NotADirectoryError):  # a file on the way there
                partial.unlink(missing_ok=True)
