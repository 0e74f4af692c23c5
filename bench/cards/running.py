"""A command in a process of its own: within a time limit, its whole output in a file, nothing of it left running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def execute(
    command: Sequence[str], folder: Path, log: Path, limit: float, environment: dict[str, str],
    tick: Callable[[], object] | None = None, every: float = 20.0,
) -> int | None:  # fmt: skip
    """The exit status, None if it was cut off: it and all that it started end within `limit` seconds. tick: called
    every so many seconds while it runs."""
    end_by = time.monotonic() + limit
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while (left := end_by - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=left if tick is None else min(left, every))
                if tick is not None:
                    tick()
            return None
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """The process, and what it left running: its session is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last that is not empty, its first 200 characters."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
