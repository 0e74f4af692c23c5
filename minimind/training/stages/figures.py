"""A picture of a run's held-out figures beyond its loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minimind.training.metrics import read_metrics
from minimind.utils.display import caption, decoration, pyplot


@decoration
def plot_figures(metrics: Path, picture: Path, title: str, unit: str, labels: Mapping[str, str]) -> None:
    """Draw the figures `labels` names (what each is called) over the tokens trained on. Lines join those measured on
    the same part of the held-out data; stars are those of all of it."""
    plt = pyplot()
    rows = [row for row in read_metrics(metrics) if row["kind"] == "eval"]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, label) in enumerate(labels.items()):
        for final, style, size in ((False, "o-", 5), (True, "*", 14)):
            mine = [row for row in rows if name in row and row["heldout_all"] == final]
            values = [row[name] for row in mine]
            text = f"{label}: {values[-1]:.3f}" if final and values else None
            axes.plot([row["tokens"] / 1e6 for row in mine], values, style, color=f"C{i}", markersize=size, label=text)
    axes.set_title(caption(title))
    axes.set_xlabel("tokens trained on, millions")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
