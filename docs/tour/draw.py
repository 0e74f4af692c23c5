"""Draws every figure of the tour, or those named: python docs/tour/draw.py [tokens packing ...]

figures/NAME.py has a function `draw` that makes figures/NAME.png of the library's own objects: the built-in text, which
is collected at the first call, the models' shapes, rows of bench/results. Nothing is typed in by hand.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / "figures"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "style")


def main(names: list[str], into: Path = FOLDER) -> None:
    """ValueError for a name without a script."""
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    from figures import style

    for name in names or NAMES:
        if name not in NAMES:
            raise ValueError(f"no figure {name!r}; choose from {', '.join(NAMES)}")
        style.save(importlib.import_module(f"figures.{name}").draw(), into / f"{name}.png")
        print(into / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
