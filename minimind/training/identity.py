"""What makes a run this run and no other: which flags count, what differs between two runs, what an old one leaves out.

A run goes on with other values of a flag that changes no step but for rounding. Of the flags that remain:

    --precision       counts: bf16 rounds to eight bits, which moves a loss visibly; runs are compared by it
    --keep-best, --patience    count: they decide where a run ends and which weights opening it takes
    --eval-tokens, --eval-prompts    count with those two, as best figures are compared on one and the same part
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A run goes on with other values of these.
_FREE = {
    *("attention", "cache_dir", "device", "parallel", "reduce_dtype", "replicas"),  # where, and by whose kernels
    *("compile", "cuda_graph", "fused", "micro_batches", "micro_tokens", "recompute"),  # the order of sums
    *("eval_prompts", "eval_questions", "eval_tokens", "evals", "kept_data"),  # what is measured on the way
    *("keep_checkpoints", "log_every", "save_every", "show"),  # what is kept and shown
    *("on_bad_row", "trust_remote_code"),  # what is refused: data and models are known by their content
    *("adapter", "from", "preset", "teacher", "tokenizer"),  # what they name counts, see _NAMES
}
_MEASURES_BEST = {"eval_prompts", "eval_tokens"}
_LENGTH = {"tokens", "epochs", "rollouts"}
# Flags that were left to the data and the weights after others were: runs that had chosen these still say a value.
_LATER = {"epochs", "optimizer"}
_HISTORY = {"legs", "lengthens"}  # of config.json: how a run began, which no flag repeats
# Flags whose contents count, and where these stand.
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
    """What a configuration of an earlier version does not say. flags: the default of each, which holds where a flag is
    newer than the run. legacy: what then stood for what is chosen from the data by now: flags that are left to the
    data, and other choices."""

    flags: Mapping[str, Any] = field(default_factory=dict)
    legacy: Mapping[str, Any] = field(default_factory=dict)

    def complete(self, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        """`old` as this version would have written it, had it been started as `new` is."""
        said, now = old.get("args", {}), new.get("args", {})
        args = {**{k: v for k, v in self.flags.items() if k in now}, **said}
        chosen = dict(old.get("chosen", {}))
        for name, value in self.legacy.items():
            if name in chosen or ("chosen" in old and name in said and name not in _LATER):
                continue
            if name not in now:
                chosen[name] = value
            elif now[name] == self.flags.get(name) and said.get(name, value) == value:
                args[name], chosen[name] = now[name], value
        later: dict[str, Any] = {name: new[name] for name in ("tokenizer", "references") if name in new}
        return {**later, **old, "args": args, "chosen": chosen}


@dataclass(frozen=True)
class Change:
    """key: where it stands in config.json, with dots between; before, now: None where it is not said."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        before, now = _shown(self.before), _shown(self.now)
        if self.key == "tokenizer":  # fingerprints: their beginnings tell them apart
            before, now = before[:8], now[:8]
        return f"{self.key.removeprefix('args.').replace('references.', 'weights of ')} {before} (now {now})"

    @property
    def name(self) -> str:
        """Of the flag, or of what is chosen where a flag says nothing."""
        return self.key.removeprefix("args.").removeprefix("chosen.")

    @property
    def flag(self) -> str | None:
        """What a command line says for `before`; None where no flag does."""
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
    """Between two configurations. counts: what makes them two runs; length: that one is longer; free: the rest."""

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
        """The flags that undo it; empty where flags alone do not."""
        flags = [change.flag for change in (*self.counts, *self.length)]
        return "" if None in flags else " ".join(map(str, flags))

    @property
    def free_text(self) -> str:
        return listed(self.free)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference:
    """How `new`, a run's configuration, differs from `old`, completed by `Defaults.complete`."""
    before, now = (_leaves(json.loads(json.dumps(config))) for config in (old, new))
    keeps_best = any(side.get(f"args.{name}") for side in (before, now) for name in ("keep_best", "patience"))
    free = _FREE - _MEASURES_BEST if keeps_best else _FREE
    found = Difference()
    for key in sorted(before.keys() | now.keys()):
        change = Change(key, before.get(key), now.get(key))
        if key in _HISTORY or _same(change) or _said_otherwise(change, before, now):
            continue
        if key.startswith(("args.", "chosen.")) and change.name in _LENGTH:
            found.length.append(change)
        elif key.startswith("args.") and change.name in free:
            found.free.append(change)
        else:
            found.counts.append(change)
    for flag, contents in _NAMES.items():
        found = _named(found, flag, contents)
    return found


def _named(found: Difference, flag: str, contents: tuple[str, ...]) -> Difference:
    """`found` with the flag in place of what it names, where both differ."""
    named = [change for change in found.free if change.key == flag]
    rest = [change for change in found.counts if not change.key.startswith(contents)]
    if not named or len(rest) == len(found.counts):
        return found
    return Difference([*rest, *named], found.length, [c for c in found.free if c not in named])


def _same(change: Change) -> bool:
    """Paths are the same from anywhere, and weights are whatever their folder is called."""
    before, now = change.before, change.now
    if change.key in _PATHS and before and now:
        before, now = ([os.path.abspath(os.path.expanduser(path)) for path in side] for side in (before, now))
    if change.key == "weights" and before and now:
        before, now = (side.split()[-1] for side in (before, now))
    return before == now


def _said_otherwise(change: Change, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether one side says by a flag what the other left to the data, and both come to the same; or one of them has
    nothing chosen: a flag tells of it, or the stage makes no such choice."""
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
