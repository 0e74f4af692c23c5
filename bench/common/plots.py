"""Drawing that several benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind.utils.display import pyplot

plt = pyplot()


def save(figure: Any, path: Path, title: str = "", dpi: int = 120) -> None:
    """Write the figure, with a line of text above it, and free its memory."""
    if title:
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def hide_frame(axis: Any) -> None:
    """Hide the upper and the right line of the frame."""
    axis.spines[["top", "right"]].set_visible(False)


def bars(axis: Any, title: str, values: Sequence[float], names: Sequence[str], colours: str | Sequence[str]) -> None:
    """Horizontal bars, each with its value and its ratio to the last one's."""
    axis.barh(range(len(values)), values, 0.7, color=colours)
    largest = max(*values, 1e-9)
    for y, value in enumerate(values):
        ratio = f", {value / values[-1]:.2f}x" if values[-1] else ""
        axis.text(value + 0.01 * largest, y, f"{value:,.0f}{ratio}", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_xlim(0, 1.35 * largest)
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=7)
    hide_frame(axis)
