"""The picture of bench/transfer.py: held-out loss over the rate, and the best rates with the rule through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.plots import hide_frame, plt, save
from bench.rates.fit import REFERENCE, Optimum, Rule, by_point, fit, optima_of
from bench.rates.runs import Point, TransferRow

RATES = [1e-3 * 2**k for k in range(-6, 9)]  # of the grid: the ticks of the axes
LABELS = {"width": "width", "depth": "layers", "steps": "steps", "batch_tokens": "tokens a step"}
OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}


def plot(rows: Sequence[TransferRow], path: Path) -> None:
    """A row of panels for each optimizer: the losses of the scan over widths, and the best rates over each size. Raises
    ValueError if there are no scans."""
    usual = [
        r
        for r in rows
        if (r.point.stage, r.point.preset, r.point.embedding, r.point.warmup) == ("pretrain", "", 1.0, 0.02)
    ]
    optima = optima_of(usual)
    shown = [name for name in OPTIMIZERS if any(o.point.optimizer == name for o in optima)]
    if not shown:
        raise ValueError("no scan has a best rate; run bench/transfer.py first")
    columns = 1 + len(LABELS)
    figure, axes = plt.subplots(
        len(shown), columns, figsize=(3.1 * columns, 3.1 * len(shown)), squeeze=False, layout="constrained"
    )
    for line, name in zip(axes, shown, strict=True):
        group = [o for o in optima if o.point.optimizer == name]
        first = group[0].point.corpus
        _losses(line[0], [r for r in usual if r.point.optimizer == name and _of_widths(r.point, first)])
        line[0].set_title(f"{OPTIMIZERS[name]}: held-out loss over the peak rate", fontsize=9)
        try:
            rule = fit(group)
        except ValueError:
            rule = None
        for axis, (size, label) in zip(line[1:], LABELS.items(), strict=True):
            _best(axis, group, size, rule)
            axis.set_xlabel(label, fontsize=8)
        line[1].set_ylabel("best peak rate", fontsize=8)
        low = min(o.log_rate - o.error for o in group) - 0.3
        high = max(o.log_rate + o.error for o in group) + 0.3
        for axis in line[1:]:
            axis.set_ylim(2**low, 2**high)
            _rate_axis(axis, "y")
    for axis in axes.flat:
        hide_frame(axis)
        axis.tick_params(labelsize=7, which="both")
    save(figure, path, dpi=110)


def _of_widths(point: Point, corpus: str) -> bool:
    sizes = {name: getattr(point, name) for name in REFERENCE if name != "width"}
    return sizes == {k: v for k, v in REFERENCE.items() if k != "width"} and (point.corpus, point.seed) == (corpus, 1)


def _losses(axis: Any, rows: Sequence[TransferRow]) -> None:
    """The losses of each width, with its parabola and best rate."""
    best = {o.point: o for o in optima_of(rows)}
    for number, (point, losses) in enumerate(sorted(by_point(rows).items(), key=lambda item: item[0].width)):
        finite = {rate: loss for rate, loss in sorted(losses.items()) if math.isfinite(loss)}
        axis.plot(list(finite), list(finite.values()), "o", color=f"C{number}", markersize=4)
        if (one := best.get(point)) is not None:
            x = np.linspace(one.log_rate - 1.5, one.log_rate + 1.5, 50)
            y = one.loss + one.curvature * (x - one.log_rate) ** 2
            axis.plot(2**x, y, color=f"C{number}", linewidth=1)
            axis.plot(one.rate, one.loss, "|", color=f"C{number}", markersize=14)
            axis.annotate(f" {point.width}", (2 ** x[-1], y[-1]), color=f"C{number}", fontsize=7)
    _rate_axis(axis, "x")
    axis.set_xlabel("peak rate", fontsize=8)
    axis.set_ylabel("nats per token, by width", fontsize=8)


def _rate_axis(axis: Any, which: str) -> None:
    """Make an axis logarithmic, with ticks at the grid's rates."""
    axis.set(**{f"{which}scale": "log"})
    low, high = axis.get_xlim() if which == "x" else axis.get_ylim()
    shown = [rate for rate in RATES if low <= rate <= high]
    axis.set(**{f"{which}ticks": shown, f"{which}ticklabels": [f"{rate:.3g}" for rate in shown]})
    axis.tick_params(
        axis=which, which="minor", bottom=which != "x", left=which != "y", labelbottom=False, labelleft=False
    )


def _best(axis: Any, optima: Sequence[Optimum], size: str, rule: Rule | None) -> None:
    """The scans that differ only in `size`, and the rule over it."""
    others = [name for name in REFERENCE if name != size]
    shown = _lines(optima, others, size)
    for number, ((corpus, fixed), line) in enumerate(shown.items()):
        at = dict(zip(others, fixed, strict=True))
        x = [getattr(o.point, size) for o in line]
        y = [o.rate for o in line]
        error = [[o.rate * (1 - 2**-o.error) for o in line], [o.rate * (2**o.error - 1) for o in line]]
        label = ", ".join([corpus, *(f"{LABELS[n]} {v:,}" for n, v in at.items() if v != REFERENCE[n])])
        axis.errorbar(x, y, error, fmt="o", color=f"C{number}", markersize=4, linewidth=1, label=label)
        if rule is not None:
            curve = [2.0**v for v in np.linspace(math.log2(min(x)), math.log2(max(x)), 20)]
            axis.plot(
                curve, [rule(_resized(line[0].point, size, value)) for value in curve], color=f"C{number}", linewidth=1
            )
    ticks = sorted({getattr(o.point, size) for line in shown.values() for o in line})
    axis.set(xscale="log", xticks=ticks, xticklabels=[f"{value:,}" for value in ticks])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    if shown:
        axis.legend(fontsize=6, frameon=False)
    else:
        axis.set_visible(False)


def _resized(point: Point, size: str, value: float) -> Point:
    """`point` with one of the sizes of a rule changed, the others kept."""
    changed: dict[str, Any] = {size: value}
    if size == "steps":
        changed = {"tokens": round(value * point.batch_tokens)}
    elif size == "batch_tokens":
        changed["tokens"] = round(value * point.steps)
    return replace(point, **changed)


def _lines(
    optima: Sequence[Optimum], others: Sequence[str], size: str
) -> dict[tuple[str, tuple[int, ...]], list[Optimum]]:
    """(corpus, other sizes) -> scans, if `size` has at least two values among them."""
    groups: dict[tuple[str, tuple[int, ...]], list[Optimum]] = {}
    for one in optima:
        key = one.point.corpus, tuple(getattr(one.point, name) for name in others)
        groups.setdefault(key, []).append(one)
    return {k: v for k, v in groups.items() if len({getattr(o.point, size) for o in v}) > 1}
