"""Whether a run continues an earlier one: the flags that must be equal, and how --lengthen extends a run.

A run may continue with other values of a flag that changes its steps by no more than rounding (_FREE). These flags look
similar but must be equal:

    --precision       bf16 rounds to eight bits, which visibly moves a loss, and runs are compared by it
    --keep-best, --patience           they decide where a run ends and which weights opening it uses
    --eval-tokens, --eval-prompts     count with those two, as best figures must be of the same documents

--lengthen RUN leaves the earlier run as it is. The longer run is a folder of its own that begins with a copy of a
checkpoint and of the metrics and samples up to it; data order, optimizer and random numbers continue from there.
`minimind.training.optim.RateSchedule` says how the learning rate continues.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minimind.training.checkpoint import list_checkpoints, step_of
from minimind.training.optim import Legs

# Flags that an unfinished run may change.
_FREE = {
    *("attention", "cache_dir", "device", "parallel", "reduce_dtype", "replicas"),  # the machine and the kernels
    *("compile", "cuda_graph", "fused", "micro_batches", "micro_tokens", "recompute"),  # the order of sums
    *("eval_prompts", "eval_questions", "eval_tokens", "evals", "kept_data"),  # evaluation
    *("keep_checkpoints", "log_every", "save_every", "show"),  # files and prints
    *("on_bad_row", "trust_remote_code"),  # checks: data and models are identified by content
    *("adapter", "from", "preset", "teacher", "tokenizer"),  # the contents they name count, see _NAMES
}
_MEASURES_BEST = {"eval_prompts", "eval_tokens"}
_LENGTH = {"tokens", "epochs", "rollouts"}
# Flags that became optional later than others: runs with a "chosen" part may still give them a value.
_LATER = {"epochs", "lr", "optimizer", "muon_iterations"}
_HISTORY = {"legs", "lengthens"}  # keys of config.json about how a run began, which no flag repeats
# Flags that name contents, and the keys in config.json that identify these.
_NAMES: dict[str, tuple[str, ...]] = {
    "args.from": ("weights", "model.", "tokenizer"),
    "args.preset": ("model.",),
    "args.tokenizer": ("tokenizer", "model.vocab_size"),
    "args.teacher": ("references.teacher",),
    "args.adapter": ("references.adapter",),
}
_PATHS = {"args.data", "args.heldout_data"}


@dataclass(frozen=True)
class Defaults:
    """Completes the configurations of earlier versions. flags: today's defaults, for flags newer than the run. legacy:
    what those versions did where the data now decides, by flag or choice."""

    flags: Mapping[str, Any] = field(default_factory=dict)
    legacy: Mapping[str, Any] = field(default_factory=dict)

    def complete(self, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        """`old` as this version would have written it for a run started like `new`."""
        before, now = old.get("args", {}), new.get("args", {})
        args = {**{k: v for k, v in self.flags.items() if k in now}, **before}
        chosen = dict(old.get("chosen", {}))
        for name, value in self.legacy.items():
            if name in chosen or ("chosen" in old and name in before and name not in _LATER):
                continue
            if name not in now:
                chosen[name] = value
            elif now[name] == self.flags.get(name) and before.get(name) in (None, value):
                args[name], chosen[name] = now[name], value
        later: dict[str, Any] = {name: new[name] for name in ("tokenizer", "references") if name in new}
        return {**later, **old, "args": args, "chosen": chosen}


@dataclass(frozen=True)
class Change:
    """A value that differs between two configurations. key: its path in config.json, with dots; before, now: None
    where it is missing."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        before, now = _shown(self.before), _shown(self.now)
        if self.key == "tokenizer":  # fingerprints: the first digits suffice
            before, now = before[:8], now[:8]
        return f"{self.key.removeprefix('args.').replace('references.', 'weights of ')} {before} (now {now})"

    @property
    def name(self) -> str:
        """The name of the flag or choice."""
        return self.key.removeprefix("args.").removeprefix("chosen.")

    @property
    def flag(self) -> str | None:
        """The command line's form of `before`; None where it is not a flag."""
        if not self.key.startswith("args."):
            return None
        name = self.name.replace("_", "-")
        if isinstance(self.before, bool):
            return f"--{name}" if self.before else f"--no-{name}"
        if self.before is None or self.before == []:
            return f"no --{name}"
        return f"--{name} {_shown(self.before)}"


@dataclass(frozen=True)
class Difference:
    """The changes between two configurations. counts: those that make them two runs; length: those of a run's length;
    free: those that a run may make."""

    counts: list[Change] = field(default_factory=list)
    length: list[Change] = field(default_factory=list)
    free: list[Change] = field(default_factory=list)

    @property
    def same_run(self) -> bool:
        return not self.counts and not self.length

    @property
    def only_length(self) -> bool:
        return bool(self.length) and not self.counts

    def __str__(self) -> str:
        return listed([*self.counts, *self.length])

    @property
    def way_back(self) -> str:
        """The flags that undo the changes; empty where flags cannot."""
        flags = [change.flag for change in (*self.counts, *self.length)]
        return "" if None in flags else " ".join(map(str, flags))

    @property
    def free_text(self) -> str:
        return listed(self.free)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference:
    """How the configuration `new` of a run differs from `old`, which `Defaults.complete` has completed."""
    before, now = (_leaves(json.loads(json.dumps(config))) for config in (old, new))
    keeps_best = any(side.get(f"args.{name}") for side in (before, now) for name in ("keep_best", "patience"))
    free = _FREE - _MEASURES_BEST if keeps_best else _FREE
    difference = Difference()
    for key in sorted(before.keys() | now.keys()):
        change = Change(key, before.get(key), now.get(key))
        if key in _HISTORY or _same(change) or _same_effect(change, before, now):
            continue
        if key.startswith(("args.", "chosen.")) and change.name in _LENGTH:
            difference.length.append(change)
        elif key.startswith("args.") and change.name in free:
            difference.free.append(change)
        else:
            difference.counts.append(change)
    for flag, contents in _NAMES.items():
        difference = _by_flag(difference, flag, contents)
    return difference


def _by_flag(difference: Difference, flag: str, contents: tuple[str, ...]) -> Difference:
    """`difference` with the flag in place of the contents that it names, where both differ."""
    named = [change for change in difference.free if change.key == flag]
    rest = [change for change in difference.counts if not change.key.startswith(contents)]
    if not named or len(rest) == len(difference.counts):
        return difference
    return Difference([*rest, *named], difference.length, [c for c in difference.free if c not in named])


def _same(change: Change) -> bool:
    """Whether both values are the same path, or the same weights in folders of different names."""
    before, now = change.before, change.now
    if change.key in _PATHS and before and now:
        before, now = ([os.path.abspath(os.path.expanduser(path)) for path in side] for side in (before, now))
    if change.key == "weights" and before and now:
        before, now = (side.split()[-1] for side in (before, now))
    return before == now


def _same_effect(change: Change, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a change has no effect: a flag of one side equals the other side's choice from the data, or one side
    never made the choice, since a flag decided it or its stage has no such choice."""
    flag, chosen = f"args.{change.name}", f"chosen.{change.name}"
    if change.key == chosen:
        return None in (change.before, change.now)
    if change.key != flag:
        return False
    first, second = (side.get(chosen) if side.get(flag) is None else side.get(flag) for side in (before, now))
    return first == second


def listed(changes: list[Change]) -> str:
    return ", ".join(map(str, changes))


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


@dataclass(frozen=True)
class EarlierRun:
    """A run to lengthen. run: its folder; checkpoint: where the longer run begins; legs: those of the longer run."""

    run: Path
    checkpoint: Path
    legs: Legs

    @property
    def history(self) -> dict[str, Any]:
        """The keys of config.json that record it."""
        return {"lengthens": str(self.run), "legs": [list(leg) for leg in self.legs]}

    def copy_into(self, folder: Path) -> None:
        """Copy the checkpoint, the best weights and the logs. Raises ValueError, naming the folder, if they cannot
        be written or another process trains the run."""
        lock = FileLock(self.run / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"--lengthen {self.run}: another process is training it; wait") from None
        except OSError:  # a read-only folder: nobody trains in it
            pass
        try:
            for path in (self.checkpoint, *self.run.glob("checkpoints/best-*")):
                _copy(path, folder / "checkpoints" / path.name)
            for name in ("metrics.jsonl", "samples.txt"):  # cut to the checkpoint's size when the run is opened
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
    count_steps: Callable[[dict[str, Any]], int],
    stable_steps: Callable[[int], int],
) -> EarlierRun:
    """The start of a run of `config` that lengthens `run`. Raises ValueError, naming the flag, if anything but the
    length differs.

    count_steps(flags): the steps that --tokens, --epochs or --rollouts amount to. stable_steps(steps planned): the last
    step after which a longer run can continue at the same learning rate.
    """
    folder = source_of(run)
    raw = read_config(folder)
    old = defaults.complete(raw, config)
    difference = compare(old, config)
    if difference.counts:
        raise ValueError(
            f"--lengthen {run}: started with {listed(difference.counts)}; --tokens, --epochs and --rollouts alone "
            "may differ"
        )
    before, now = count_steps(_flags(old)), count_steps(_flags(config))
    if now <= before:
        raise ValueError(
            f"--lengthen {run}: planned for {before} steps, and these flags amount to {now}; give a larger --tokens, "
            "--epochs or --rollouts"
        )
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise ValueError(f"--lengthen {run}: has no checkpoint yet; start anew without --lengthen")
    usable = [path for path in checkpoints if step_of(path) <= stable_steps(before)] or checkpoints
    return EarlierRun(folder, usable[-1], (*legs_of(raw), (before, step_of(usable[-1]))))


def source_of(run: str) -> Path:
    """The folder that --lengthen names. Raises ValueError if it is not a run."""
    folder = Path(run).expanduser()
    if not (folder / "config.json").is_file() or "stage" not in read_config(folder):
        raise ValueError(f"--lengthen {run}: not a run folder; name one that a script of train/ left")
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.json. Raises ValueError if it is damaged."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: not valid JSON ({error}); name another --out") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'}: not a run's configuration; name another --out")
    return config


def legs_of(config: dict[str, Any]) -> Legs:
    return tuple((steps, left) for steps, left in config.get("legs", []))


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    """The flags, together with the values that were chosen from the data."""
    chosen = config.get("chosen", {})
    return {**config["args"], **{k: v for k, v in chosen.items() if config["args"].get(k) is None}}


def _copy(source: Path, goal: Path) -> None:
    partial = goal.with_name(f".partial-{goal.name}-{os.getpid()}")
    shutil.copytree(source, partial)
    os.replace(partial, goal)
