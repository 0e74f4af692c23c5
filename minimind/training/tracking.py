"""Experiment trackers behind one small interface. The run id lives in the checkpoint, so a resumed run goes on
drawing the same curve. One that fails at the start is an error; one that fails later is left behind in a line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["none", "tensorboard", "wandb", "swanlab"]


class Tracker(Protocol):
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
        # purge_step hides what a killed run had drawn past its checkpoint
        self.writer = writer.SummaryWriter(str(folder / "tensorboard"), purge_step=start_step or None)
        self.run_id: str | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class HostedTracker:
    """wandb and swanlab, whose init and log agree."""

    def __init__(self, package: TrackerName, folder: Path, config: dict[str, Any], run_id: str | None) -> None:
        self.name = package
        module = _require(package, package)
        place = {"wandb": {"dir": str(folder)}, "swanlab": {"log_dir": str(folder / "swanlab")}}[package]
        try:
            self.run = module.init(
                project="minimind", name=folder.name, config=config, id=run_id, resume="allow", **place
            )
        except Exception as problem:
            raise ValueError(f"--track {package}: {_line(problem)}; drop the flag, or mend that") from problem
        self.run_id: str | None = str(self.run.id)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()


class GuardedTracker:
    """A tracker is decoration: where it fails, the run goes on without it, and a line says so."""

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
            print(f"--track {self.name}: goes on without ({_line(problem)})", file=sys.stderr)


def make_tracker(
    name: TrackerName, folder: Path, config: dict[str, Any], saved: dict[str, Any], start_step: int
) -> Tracker:
    """saved: {"name", "id"} from the checkpoint, empty at a fresh start; another tracker's id is not used."""
    if name == "none":
        return NoTracker()
    if name == "tensorboard":
        return GuardedTracker(TensorBoardTracker(folder, start_step))
    known = saved["id"] if saved.get("name") == name else None
    return GuardedTracker(HostedTracker(name, folder, config, known))


def _line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0] or type(problem).__name__


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"--track {package}: the package is not installed; run `pip install 'minimind[track]'`"
        ) from error
