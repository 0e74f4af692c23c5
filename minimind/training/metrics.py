"""metrics.jsonl and the picture drawn from it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from minimind.utils.display import caption, decoration, pyplot


class MetricsLog:
    """Append-only JSON lines. `kind` is "train" (every step) or "eval"; wall-clock values are under "time", the
    rest is reproducible to the bit on one CPU process."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: dict[str, Any], time: dict[str, float]) -> None:
        row = {"kind": kind, "step": step, **values, "time": time}
        self.file.write(json.dumps(row, allow_nan=True) + "\n")

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """ValueError names the line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: no row of metrics ({error}); remove the line") from None
    return rows


@decoration
def plot_losses(metrics: Path, picture: Path, title: str, unit: str = "nats per token") -> None:
    """Draw training and held-out loss over tokens, with the learning rate and the gradient norm below."""
    plt = pyplot()
    rows = read_metrics(metrics)
    train = [r for r in rows if r["kind"] == "train"]
    evals = [r for r in rows if r["kind"] == "eval"]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6.5), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    if train:
        tokens = [r["tokens"] / 1e6 for r in train]
        losses = [r["loss"] for r in train]
        top.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        top.plot(tokens, smooth(losses), color="tab:blue", label="training")
        bottom.plot(tokens, [r["grad_norm"] for r in train], color="tab:gray", linewidth=0.8)
        rate = bottom.twinx()
        rate.plot(tokens, [r["lr"] for r in train], color="tab:green")
        rate.set_ylabel("learning rate", color="tab:green")
        rate.set_ylim(bottom=0)
    for rows_of, style, name in (
        ([r for r in evals if not r["heldout_all"]], "o-", "held-out, the same part each time"),
        ([r for r in evals if r["heldout_all"]], "*", "all of held-out"),
    ):
        rows_of = [r for r in rows_of if "heldout_loss" in r]
        if rows_of:
            x, y = [r["tokens"] / 1e6 for r in rows_of], [r["heldout_loss"] for r in rows_of]
            newest = rows_of[-1]
            last = f"{newest['heldout_bpb']:.3f} bits per byte" if "heldout_bpb" in newest else f"{y[-1]:.3f}"
            label = f"{name}: {last}"
            top.plot(x, y, style, color="tab:red", markersize=5 if style == "o-" else 14, label=label)
    _plot_named(top, evals)
    top.set_ylabel(f"loss, {unit}")
    top.set_title(caption(title))
    top.grid(alpha=0.3)
    if train or evals:
        top.legend()
    bottom.set_xlabel("tokens trained on, millions")
    bottom.set_ylabel("gradient norm", color="tab:gray")
    if any(r["grad_norm"] > 0 for r in train):
        bottom.set_yscale("log")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _plot_named(axes: Any, evals: list[dict[str, Any]]) -> None:
    """A curve for each named evaluation set."""
    names = {m[1]: None for row in evals for key in row if (m := re.fullmatch(r"heldout_(\w+)_loss", key))}
    for i, name in enumerate(names):
        key = f"heldout_{name}_loss"
        mine = [row for row in evals if key in row]
        for final, style, size in ((False, "o-", 4), (True, "*", 11)):
            some = [row for row in mine if row["heldout_all"] == final]
            label = f"{name}: {some[-1][key]:.3f}" if some and final else None
            x, y = [row["tokens"] / 1e6 for row in some], [row[key] for row in some]
            axes.plot(x, y, style, color=f"C{i + 4}", markersize=size, label=label)


def smooth(values: list[float]) -> list[float]:
    """Bias-corrected exponential moving average over about 2% of the run; steps over non-finite values."""
    decay = 1 - 1 / max(2, len(values) / 50)
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(mean / weight if weight else float("nan"))
    return out
