"""The figures of a run: metrics.jsonl, pictures drawn from it, and experiment trackers."""

from __future__ import annotations

import importlib
import json
import math
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from minimind.utils.display import caption, decoration, pyplot

TrackerName = Literal["none", "tensorboard", "trackio", "wandb", "swanlab"]
# (title of a panel, {figure of rollouts: its label})
_PANELS = (
    ("reward", {"reward": "of the rollouts"}),
    ("KL to the reference, per token", {"kl": ""}),
    ("tokens of an answer", {"length": ""}),
    ("entropy of a token, nats", {"entropy": ""}),
)


@dataclass(frozen=True)
class Event:
    """Something that happened between steps, such as a rollout: a row of its own `kind` in metrics.jsonl, before the
    row of the step that follows. values: the same on all ranks; seconds: measured times; line: part of the progress
    line."""

    kind: str
    values: dict[str, Any]
    seconds: dict[str, float]
    line: str = ""


class MetricsLog:
    """Appends JSON lines to metrics.jsonl. `kind` is "train" (every step), "eval" or an event's. Times are under
    "time"; all other values are reproducible bit for bit in one process on a CPU."""

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
    """All rows of metrics.jsonl. Raises ValueError, naming the line, if one is not JSON."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a row of metrics ({error}); remove the line") from None
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
    for final, style, name in ((False, "o-", "held-out, the same part each time"), (True, "*", "all of held-out")):
        measured = [r for r in evals if r["heldout_all"] == final and "heldout_loss" in r]
        if measured:
            x, y = [r["tokens"] / 1e6 for r in measured], [r["heldout_loss"] for r in measured]
            newest = measured[-1]
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
    """A curve for every named held-out set."""
    names = {m[1]: None for row in evals for key in row if (m := re.fullmatch(r"heldout_(\w+)_loss", key))}
    for i, name in enumerate(names):
        key = f"heldout_{name}_loss"
        for final, style, size in ((False, "o-", 4), (True, "*", 11)):
            some = [row for row in evals if key in row and row["heldout_all"] == final]
            label = f"{name}: {some[-1][key]:.3f}" if some and final else None
            x, y = [row["tokens"] / 1e6 for row in some], [row[key] for row in some]
            axes.plot(x, y, style, color=f"C{i + 4}", markersize=size, label=label)


@decoration
def plot_figures(metrics: Path, picture: Path, title: str, unit: str, labels: Mapping[str, str]) -> None:
    """Draw held-out figures over the tokens trained on. labels: {figure: its name in the legend}. Lines join figures
    that were measured on the same part of the held-out data; stars are figures of all of it."""
    plt = pyplot()
    rows = [row for row in read_metrics(metrics) if row["kind"] == "eval"]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, label) in enumerate(labels.items()):
        for final, style, size in ((False, "o-", 5), (True, "*", 14)):
            measured = [row for row in rows if name in row and row["heldout_all"] == final]
            values = [row[name] for row in measured]
            text = f"{label}: {values[-1]:.3f}" if final and values else None
            axes.plot(
                [row["tokens"] / 1e6 for row in measured], values, style, color=f"C{i}", markersize=size, label=text
            )
    axes.set_title(caption(title))
    axes.set_xlabel("tokens trained on, millions")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


@decoration
def plot_rollouts(metrics: Path, picture: Path, title: str) -> None:
    """Draw reward (held-out too), KL, length and entropy of the answers over the run."""
    plt = pyplot()
    rows = read_metrics(metrics)
    rollouts = [row for row in rows if row["kind"] == "rollout"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for panel, (name, figures) in zip(axes.flat, _PANELS, strict=True):
        panel.set_title(name)
        panel.set_xlabel("optimizer steps")
        panel.grid(alpha=0.3)
        for key, label in figures.items():
            _plot_smoothed(panel, [row for row in rollouts if key in row], key, label)
    _plot_heldout(axes.flat[0], [row for row in rows if row["kind"] == "eval" and "heldout_reward" in row])
    if not any("kl" in row for row in rollouts):
        axes.flat[1].text(0.5, 0.5, "no reference model", ha="center", transform=axes.flat[1].transAxes)
    figure.suptitle(caption(title))
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _plot_smoothed(panel: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    x, y = [row["step"] for row in rows], [row[key] for row in rows]
    panel.plot(x, y, color="tab:blue", alpha=0.3, linewidth=0.8)
    panel.plot(x, smooth(y), color="tab:blue", label=label or None)


def _plot_heldout(panel: Any, rows: list[dict[str, Any]]) -> None:
    for key, label, colour in (
        ("heldout_reward", "held-out, sampled", "tab:red"),
        ("heldout_greedy_reward", "held-out, greedy", "tab:orange"),
    ):
        x, y = [row["step"] for row in rows], [row[key] for row in rows]
        if rows:
            panel.plot(x, y, "o-", color=colour, markersize=4, label=f"{label}: {y[-1]:.3f}")
    if panel.get_legend_handles_labels()[0]:
        panel.legend()


def smooth(values: list[float]) -> list[float]:
    """Bias-corrected exponential moving average over about 2% of the values; skips those that are not finite."""
    decay = 1 - 1 / max(2, len(values) / 50)
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(mean / weight if weight else float("nan"))
    return out


class Tracker(Protocol):
    """An experiment tracker. Its run id is kept in checkpoints, so that a resumed run continues the same curve."""

    name: TrackerName
    run_id: str | None

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    name: TrackerName = "none"
    run_id: str | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass


class TensorBoardTracker:
    name: TrackerName = "tensorboard"

    def __init__(self, folder: Path, start_step: int) -> None:
        writer = _require("torch.utils.tensorboard", "tensorboard")
        # purge_step hides points that a killed run drew after its checkpoint
        self.writer = writer.SummaryWriter(str(folder / "tensorboard"), purge_step=start_step or None)
        self.run_id: str | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class HostedTracker:
    """trackio, wandb or swanlab, which have nearly the same interface. Raises ValueError if it cannot start.

    trackio keeps its data on this machine (`trackio show --project minimind`). It identifies a run by its name alone,
    so the name ends in a random number and serves as the id.
    """

    def __init__(self, package: TrackerName, folder: Path, config: dict[str, Any], run_id: str | None) -> None:
        self.name = package
        module = _require(package, package)
        by_package: dict[str, dict[str, Any]] = {
            "trackio": {"name": run_id or f"{folder.name}-{secrets.token_hex(3)}"},
            "wandb": {"name": folder.name, "id": run_id, "dir": str(folder)},
            "swanlab": {"name": folder.name, "id": run_id, "log_dir": str(folder / "swanlab")},
        }
        own = by_package[package]
        try:
            self.run = module.init(project="minimind", config=config, resume="allow", **own)
        except Exception as problem:
            raise ValueError(f"--track {package}: {_line(problem)}; drop the flag, or mend that") from problem
        self.run_id: str | None = own["name"] if package == "trackio" else str(self.run.id)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()


class GuardedTracker:
    """Keeps a failing tracker from ending the run: the run continues without it, after one line."""

    def __init__(self, tracker: Tracker) -> None:
        self.name, self.run_id = tracker.name, tracker.run_id
        self._tracker: Tracker = tracker

    def log(self, step: int, values: dict[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, values))

    def finish(self) -> None:
        self._try(self._tracker.finish)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as problem:
            self._tracker = NoTracker()
            print(f"--track {self.name}: the run continues without it ({_line(problem)})", file=sys.stderr)


def make_tracker(
    name: TrackerName, folder: Path, config: dict[str, Any], saved: dict[str, Any], start_step: int
) -> Tracker:
    """The tracker called `name`. saved: {"name", "id"} from the checkpoint, empty for a new run; an id is used only by
    the tracker that made it."""
    if name == "none":
        return NoTracker()
    if name == "tensorboard":
        return GuardedTracker(TensorBoardTracker(folder, start_step))
    run_id = saved["id"] if saved.get("name") == name else None
    return GuardedTracker(HostedTracker(name, folder, config, run_id))


def _line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0] or type(problem).__name__


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"--track {package}: the package is not installed; run `pip install 'minimind[track]'`"
        ) from error
