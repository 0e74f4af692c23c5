"""A longer run that begins where an earlier one, finished or not, has come to: `--lengthen RUN`.

The earlier run stays as it is. The longer one is a folder of its own, which begins with a copy of a checkpoint and of
the metrics and samples up to there; data order, optimizer and random numbers go on from it.

Its learning rate follows the schedule of the whole longer run. A cosine (or a warm-up and a cooldown) made for fewer
steps has fallen too far by then, so over as many steps as the warm-up took the rate rises in a straight line from where
it was to the longer run's curve, as for continued pretraining (re-warming and re-decaying, Ibrahim et al. 2024, arXiv
2403.08763, who go back to the peak itself: with new data. Here the data stay, and the curve is where the longer run
would be). --schedule wsd is made for this (Hu et al. 2024, 2404.06395): the run goes on from the newest checkpoint
before the cooldown, whose rate is the peak, and no rise is needed; every such run keeps the one where its cooldown
begins. --schedule constant just goes on. Steps of the warm-up are those of the first run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minimind.training.checkpoint import list_checkpoints, step_of
from minimind.training.identity import Defaults, compare, listed

# (steps planned, step after which a longer plan took over), in order
Legs = tuple[tuple[int, int], ...]
# (step, steps planned) -> share of the peak rate
Curve = Callable[[int, int], float]


@dataclass(frozen=True)
class EarlierRun:
    """run: the earlier run's folder; checkpoint: of it, where the longer one begins; legs: the longer run's."""

    run: Path
    checkpoint: Path
    legs: Legs

    @property
    def history(self) -> dict[str, Any]:
        """For config.json."""
        return {"lengthens": str(self.run), "legs": [list(leg) for leg in self.legs]}

    def copy_into(self, folder: Path) -> None:
        """The checkpoint, the best weights and the logs. ValueError, naming the folder, where they cannot be written
        or the run is being trained."""
        lock = FileLock(self.run / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"--lengthen {self.run}: another process is training it; wait") from None
        except OSError:  # a folder that only others may write, where nobody trains either
            pass
        try:
            for path in (self.checkpoint, *self.run.glob("checkpoints/best-*")):
                _copy(path, folder / "checkpoints" / path.name)
            for name in ("metrics.jsonl", "samples.txt"):  # cut to the checkpoint's when it is opened
                if (self.run / name).exists():
                    shutil.copyfile(self.run / name, folder / name)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written ({error}); name another folder with --out") from error
        finally:
            lock.release()


def find_source(
    run: str,
    config: dict[str, Any],
    defaults: Defaults,
    planned: Callable[[dict[str, Any]], int],
    flat: Callable[[int], int],
) -> EarlierRun:
    """What a run of `config` that lengthens `run` begins with. Raises ValueError, naming the flag, where it is not the
    same run but for a greater length.

    planned(flags) -> the steps that these --tokens, --epochs or --rollouts come to. flat(steps planned) -> the last
    step after which a longer run can go on at the rate it has.
    """
    folder = source_of(run)
    raw = read_config(folder)
    old = defaults.complete(raw, config)
    found = compare(old, config)
    if found.counts:
        raise ValueError(
            f"--lengthen {run}: started with {listed(found.counts)}; --tokens, --epochs and --rollouts alone may differ"
        )
    before, now = planned(_flags(old)), planned(_flags(config))
    if now <= before:
        raise ValueError(
            f"--lengthen {run}: planned for {before} steps, and these flags come to {now}; give a larger --tokens, "
            "--epochs or --rollouts"
        )
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise ValueError(f"--lengthen {run}: has no checkpoint yet; start anew without --lengthen")
    usable = [path for path in checkpoints if step_of(path) <= flat(before)] or checkpoints
    return EarlierRun(folder, usable[-1], (*legs_of(raw), (before, step_of(usable[-1]))))


def source_of(run: str) -> Path:
    """The folder that --lengthen names; ValueError where it is no run."""
    folder = Path(run).expanduser()
    if not (folder / "config.json").is_file() or "stage" not in read_config(folder):
        raise ValueError(f"--lengthen {run}: not a run folder; name one that a script of train/ left")
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.json. ValueError where it is damaged."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: not valid JSON ({error}); name another --out") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'}: not a run's configuration; name another --out")
    return config


def legs_of(config: dict[str, Any]) -> Legs:
    return tuple((steps, left) for steps, left in config.get("legs", []))


def rate_factor(curve: Curve, step: int, steps: int, legs: Legs, rise: int) -> float:
    """Share of the peak rate at `step` of a run that was lengthened at the ends of its `legs`; rise: steps that the way
    from one curve to the next takes."""
    if not legs:
        return curve(step, steps)
    *earlier, (planned, left) = legs
    if step < left:
        return rate_factor(curve, step, planned, tuple(earlier), rise)
    before = rate_factor(curve, left - 1, planned, tuple(earlier), rise)
    share = min(1.0, (step - left + 1) / rise)
    return before + (curve(step, steps) - before) * share


def describe_rates(curve: Curve, steps: int, legs: Legs, rise: int) -> str:
    """One line about how the rate goes on, for the start of a lengthened run."""
    planned, left = legs[-1]
    was = rate_factor(curve, left - 1, planned, legs[:-1], rise)
    there = curve(left + rise - 1, steps)
    way = f"the rate goes on at {was:.2f} of the peak"
    if abs(there - was) > 0.005:
        way = f"the rate goes from {was:.2f} of the peak to {there:.2f} over {rise} steps"
    return f"lengthened at step {left} from {planned} steps to {steps}: {way} and then as in a run of {steps}"


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    """The flags, and where they leave something to the data what was chosen."""
    chosen = config.get("chosen", {})
    return {**config["args"], **{k: v for k, v in chosen.items() if config["args"].get(k) is None}}


def _copy(source: Path, goal: Path) -> None:
    partial = goal.with_name(f".partial-{goal.name}-{os.getpid()}")
    shutil.copytree(source, partial)
    os.replace(partial, goal)
