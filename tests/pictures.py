"""The pictures of training runs are not rendered in tests: that would be a fifth of the suite's processor time.

The plotting code runs, then a picture of one pixel is written. Tests that look at pictures use the fixture `rendered`;
the heavy tier renders all (MINIMIND_TEST_PICTURES=1).
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
DRAWN_BY = ("minimind.training.metrics", "minimind.training.rl")
render = Figure.savefig


def _save(figure: Figure, path: Any, **options: Any) -> None:
    if sys._getframe(1).f_globals["__name__"].startswith(DRAWN_BY) and isinstance(path, Path):
        path.write_bytes(PIXEL)
    else:
        render(figure, path, **options)


def skip_rendering() -> None:
    if os.environ.get("MINIMIND_TEST_PICTURES") != "1":
        Figure.savefig = _save  # type: ignore[method-assign]
