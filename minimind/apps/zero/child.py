"""Runs a stage's script as `python SCRIPT FLAGS` does, for as long as the process that started it lives.

    python -m minimind.apps.zero.child SCRIPT FLAGS

Standard input is a pipe that its parent holds. Its end, however the parent came to its own, stops the stage as SIGTERM
does: the step is ended and saved.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from pathlib import Path


def stop_with_parent() -> None:
    """Ends when the pipe does. Not by sys.stdin, whose lock a waiting thread would hold to the very end."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    threading.Thread(target=stop_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
