"""Line charts as HTML and SVG without a script: lines stretch with the page, text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from minimind.apps.zero.results import Curve

_WIDE, _HIGH = 1000, 400  # of the drawing, which the page stretches to its own


def line_chart(title: str, unit: str, x_unit: str, curves: Sequence[Curve], top: float | None = None) -> str:
    """A figure. top: the upper end of the axis where it is known, such as 1 of shares, which are then in percent."""
    points = [point for curve in curves for point in curve.points if all(map(math.isfinite, point))]
    if not points:
        return ""
    right = max(x for x, _ in points) or 1.0
    low, high = (0.0, top) if top is not None else bounds([y for _, y in points])
    assert high is not None
    x_ticks, y_ticks = ticks(0.0, right, 5), ticks(low, high, 5)
    colour = 0
    drawn, legend = [], []
    for curve in curves:
        style = "faint" if curve.faint else "dots" if curve.dots else "line"
        drawn.append(_path(curve, colour, style, right, low, high))
        if not curve.faint:
            last = curve.points[-1][1]
            value = f"{last:.1%}" if top == 1 else number(last)
            legend.append(f'<li><i class="c{colour}"></i>{escape(curve.name)} <b>{value}</b></li>')
            colour = (colour + 1) % 6
    grid = "".join(f'<path class="grid" d="M0 {_HIGH * (1 - (y - low) / (high - low)):.1f}H{_WIDE}"/>' for y in y_ticks)
    said = "; ".join(f"{c.name} from {number(c.points[0][1])} to {number(c.points[-1][1])}" for c in curves)
    y_labels = "".join(
        f'<span style="bottom:{100 * (y - low) / (high - low):.1f}%">{f"{y:.0%}" if top == 1 else number(y)}</span>'
        for y in y_ticks
    )
    x_labels = "".join(f'<span style="left:{100 * x / right:.1f}%">{number(x)}</span>' for x in x_ticks)
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <small>{escape(unit)}</small></figcaption>'
        f'<ul class="legend">{"".join(legend)}</ul>'
        f'<div class="plot"><div class="y">{y_labels}</div>'
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{title}: {said}")}">{grid}{"".join(drawn)}</svg>'
        f'<div class="x">{x_labels}</div></div><p class="unit">{escape(x_unit)}</p></figure>'
    )


def _path(curve: Curve, colour: int, style: str, right: float, low: float, high: float) -> str:
    places = [
        (_WIDE * x / right, _HIGH * (1 - (min(high, max(low, y)) - low) / (high - low)))
        for x, y in curve.points
        if math.isfinite(x) and math.isfinite(y)
    ]
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    drawn = f'<path class="{"line" if style == "dots" else style} c{colour}" d="{line}"/>'
    if style == "dots" or len(places) == 1:  # a line of no length with round ends is a dot of the same size everywhere
        drawn += f'<path class="dot c{colour}" d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)}"/>'
    return drawn


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis: from 0 where no value is below it; without the few highest values of a noisy start."""
    ordered = sorted(values)
    high = ordered[-1] if len(ordered) < 50 else max(ordered[int(0.995 * len(ordered))], ordered[-1] * 0.5)
    low = min(0.0, ordered[0])
    return low, high * 1.05 if high > low else low + 1.0


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between the two."""
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """To three digits or so, with a letter for thousands and millions."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
