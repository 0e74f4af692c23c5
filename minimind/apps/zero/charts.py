"""The look of the report: line charts as HTML and SVG without a script, and one style sheet.

Lines stretch with the page while text keeps its size; the page fits wide and narrow, light and dark screens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from minimind.apps.zero.results import Curve

_WIDE, _HIGH = 1000, 400  # units of the drawing, which the page stretches to the width that it has


def line_chart(title: str, unit: str, x_unit: str, curves: Sequence[Curve], top: float | None = None) -> str:
    """A chart as an HTML figure, "" without points. top: the upper end of the y axis, if it is known; 1 stands for
    shares, which are shown in percent."""
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
    if style == "dots" or len(places) == 1:  # a line of length 0 is a dot that keeps its shape
        drawn += f'<path class="dot c{colour}" d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)}"/>'
    return drawn


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis. It begins at 0 or at the lowest negative value, and leaves out the few highest values of a
    noisy start."""
    ordered = sorted(values)
    high = ordered[-1] if len(ordered) < 50 else max(ordered[int(0.995 * len(ordered))], ordered[-1] * 0.5)
    low = min(0.0, ordered[0])
    return low, high * 1.05 if high > low else low + 1.0


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Format a number with three digits and k, M or G for thousands, millions and billions."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


STYLE = """
:root{--bg:#fbfbfa;--card:#fff;--text:#1c1d1f;--soft:#63666b;--rule:#e3e4e6;--grid:#ebecee;--good:#1a7f4b;
--code:#f3f4f5;--c0:#2468c4;--c1:#c8561b;--c2:#1f8a6d;--c3:#8b4fc0;--c4:#b0831a;--c5:#c23c6e}
@media(prefers-color-scheme:dark){:root{--bg:#131416;--card:#1b1d20;--text:#e7e8ea;--soft:#a0a4aa;--rule:#303338;
--grid:#272a2e;--good:#5cc490;--code:#232629;--c0:#74a9f2;--c1:#f0905a;--c2:#5cc4a4;--c3:#c197ea;--c4:#dcb457;
--c5:#ee86ab}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI","Noto Sans",
"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.25rem;margin:44px 0 12px;padding-top:20px;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:24px 0 8px}
p{margin:8px 0}
small,.soft{color:var(--soft);font-size:.875rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:24px 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:1.4rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.875rem}
.bar{display:flex;height:14px;border-radius:7px;overflow:hidden;gap:2px;margin:8px 0}
.bar i{display:block;min-width:3px}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 6px;padding:0;font-size:.8125rem;
color:var(--soft)}
ul.legend b{color:var(--text);font-weight:600;font-variant-numeric:tabular-nums}
ul.legend i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px}
.scroll{overflow-x:auto;margin:12px 0}
.scroll th:first-child,.scroll td:first-child{position:sticky;left:0;background:var(--bg)}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);text-align:left;font-size:.8125rem}
th,td{padding:7px 12px 7px 0;border-bottom:1px solid var(--rule);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}
.short table{width:auto}
.short td.n,.short th.n{padding-left:28px}
.facts th{width:7.5em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px;margin:12px 0}
.chart:first-child:nth-last-child(odd){grid-column:1/-1}
figure.chart{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px 8px;
min-width:0;display:flex;flex-direction:column}
figcaption{font-weight:600;font-size:.9375rem;margin-bottom:4px}
figcaption small{font-weight:400}
.plot{margin-top:auto;padding-top:8px;display:grid;grid-template:200px 22px/46px 1fr}
.plot svg{width:100%;height:100%;overflow:visible;display:block}
.plot .y,.plot .x{position:relative;font-size:.75rem;color:var(--soft);font-variant-numeric:tabular-nums}
.plot .y span{position:absolute;right:8px;transform:translateY(50%)}
.plot .x{grid-column:2}
.plot .x span{position:absolute;top:4px;transform:translateX(-50%)}
.unit{margin:0;text-align:right;font-size:.75rem;color:var(--soft)}
svg path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
path.grid{stroke:var(--grid);stroke-width:1}
path.line{stroke-width:2}
path.faint{stroke-width:1;opacity:.35}
path.dot{stroke-width:7}
path.c0{stroke:var(--c0)}path.c1{stroke:var(--c1)}path.c2{stroke:var(--c2)}
path.c3{stroke:var(--c3)}path.c4{stroke:var(--c4)}path.c5{stroke:var(--c5)}
i.c0{background:var(--c0)}i.c1{background:var(--c1)}i.c2{background:var(--c2)}
i.c3{background:var(--c3)}i.c4{background:var(--c4)}i.c5{background:var(--c5)}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:12px;
align-items:start}
.sample:last-child:nth-child(odd){grid-column:1/-1}
.sample{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px;min-width:0}
.sample .prompt{font-weight:600;margin:0 0 8px}
.sample .earlier{font-size:.8125rem;color:var(--soft);margin:0 0 8px}
.sample dl{display:grid;grid-template-columns:6.4rem 1fr;gap:4px 10px;margin:0}
.sample dt{color:var(--soft);font-size:.8125rem;padding-top:2px}
.sample dd{margin:0;min-width:0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:7.5em;overflow-y:auto}
.right{color:var(--good);font-weight:600}
pre{background:var(--code);border-radius:6px;padding:10px 12px;margin:6px 0;white-space:pre-wrap;
overflow-wrap:anywhere;font:.8125rem/1.5
ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media(max-width:520px){main{padding:20px 14px 40px}h1{font-size:1.4rem}.plot{grid-template-rows:170px 22px}
.tiles{grid-template-columns:1fr 1fr}.facts th{width:6em}
.sample dl{grid-template-columns:1fr}.sample dt{margin-top:4px}}
"""
