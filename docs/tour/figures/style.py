"""One look for all figures of the tour: the colours of Okabe and Ito, which colour-blind readers can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, YELLOW = "#56B4E9", "#CC79A7", "#F0E442"
INK, GREY, PALE = "#222222", "#8a8a8a", "#e6e6e6"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.prop_cycle": plt.cycler(color=CYCLE),
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "legend.frameon": False,
        "figure.dpi": 120,
        "hatch.linewidth": 0.6,
        "mathtext.fontset": "cm",
    }
)


def panels(*widths: float, height: float = 3.6, width: float = 9.5) -> tuple[Figure, Any]:
    """A figure with panels side by side, of these relative widths."""
    return plt.subplots(
        1, len(widths), figsize=(width, height), layout="constrained", gridspec_kw={"width_ratios": widths}
    )


def plain(axes: Any) -> None:
    """A panel that is a drawing: no axes."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def box(axes: Any, x: float, y: float, w: float, h: float, text: str = "", colour: str = PALE, **style: Any) -> None:
    """A rectangle with a text in its middle; style: the text's."""
    edge = style.pop("edge", "white")
    axes.add_patch(plt.Rectangle((x, y), w, h, facecolor=colour, edgecolor=edge, linewidth=0.8))
    if text:
        axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", **{"fontsize": 8, **style})


def stacked(axes: Any, names: list[str], parts: dict[str, list[float]], unit: str, colours: Any = CYCLE) -> None:
    """Horizontal bars, the first on top, of parts one behind the other, each with its number where there is room."""
    left = [0.0] * len(names)
    longest = max(map(sum, zip(*parts.values(), strict=True)))
    for (label, values), colour in zip(parts.items(), colours, strict=False):
        axes.barh(names, values, 0.62, left=left, label=label, color=colour)
        for i, value in enumerate(values):
            if value > 0.06 * longest:
                axes.text(left[i] + value / 2, i, f"{value:,.3g}", ha="center", va="center", fontsize=8, color="white")
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(unit)


def save(figure: Figure, path: Path) -> None:
    """As a PNG of few colours, which is small."""
    from io import BytesIO

    from PIL import Image

    raw = BytesIO()
    figure.savefig(raw, format="png")
    plt.close(figure)
    picture = Image.open(raw).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
