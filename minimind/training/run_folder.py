"""Run folders: finding, locking, creating and continuing them.

A run folder holds config.json, metrics.jsonl, loss.png, samples.txt, checkpoints/ and versions.json.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from minimind.training.checkpoint import list_checkpoints, remove_partial, step_of
from minimind.training.identity import Defaults, Difference, EarlierRun, Legs, compare, legs_of, read_config, source_of
from minimind.utils.files import read_json, write_json

ResumeMode = Literal["auto", "never"]
_NO_DEFAULTS = Defaults()


@dataclass(frozen=True)
class RunFolder:
    """A run folder, locked for this process until the object is deleted or the process ends; a copy in another process
    has no lock.

    checkpoint: where to continue, None for a new run. notes: lines about how the folder was found. changed: flags with
    other values than at the first start, by name. legs: earlier lengths of the run, see RateSchedule. lengthens: the
    run that it was just made from.
    """

    path: Path
    checkpoint: Path | None
    lock: FileLock | None
    notes: tuple[str, ...] = ()
    changed: Mapping[str, Any] = field(default_factory=dict)
    legs: Legs = ()
    lengthens: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RunFolder, (*(getattr(self, name) for name in ("path", "checkpoint")), None, self.notes, self.changed,
                           self.legs, self.lengthens)  # fmt: skip

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    def mark_finished(self) -> None:
        (self.path / "finished").touch()


def is_finished(run: Path) -> bool:
    return (run / "finished").exists()


def find_run(
    out: str | None,
    default_name: str,
    config: dict[str, Any],
    resume: ResumeMode,
    defaults: Defaults,
    root: Path = Path("runs"),
    lengthen: str | None = None,
) -> dict[str, Any]:
    """The choices ("chosen" in config.json) of the run that `open_run` would continue or lengthen; empty without such a
    run. config: without choices. Creates and locks nothing."""
    for path in _runs(out, default_name, root) if resume == "auto" else ():
        earlier = defaults.complete(read_config(path), config)
        flags = config.get("args", {})
        open_choices = {k: v for k, v in earlier["chosen"].items() if flags.get(k) in (None, defaults.flags.get(k))}
        if not is_finished(path) and compare(earlier, {**config, "chosen": open_choices}).same_run:
            return earlier["chosen"]
    if lengthen is not None:
        return defaults.complete(read_config(source_of(lengthen)), config)["chosen"]
    return {}


def open_run(
    out: str | None,
    default_name: str,
    config: dict[str, Any],
    resume: ResumeMode,
    root: Path = Path("runs"),
    defaults: Defaults = _NO_DEFAULTS,
    source: EarlierRun | None = None,
) -> RunFolder:
    """Continue the unfinished run with this configuration, or make a new folder. Nothing is overwritten.

    out: the folder; None for runs/<default_name>, with a number if another run has that name. source: the run that a
    new folder lengthens. Raises ValueError if `out` holds a finished run, a run with another configuration, or one
    that another process is training.
    """
    if out is None:
        return _next_free(root, default_name, config, resume, defaults, source)
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    if path.exists() and not (path / "config.json").exists() and any(f.name != ".lock" for f in path.iterdir()):
        raise ValueError(f"--out {out}: not empty and not a run folder; name another folder")
    _make(path)
    lock = _try_lock(path)
    if lock is None:
        raise ValueError(f"--out {out}: another process is training in it; wait, or name another folder")
    if not (path / "config.json").exists():
        return _create(path, config, lock, source)
    if resume == "never":
        raise ValueError(f"--out {out}: already holds a run; name another folder or drop --resume never")
    difference = compare(defaults.complete(read_config(path), config), config)
    if difference.only_length:
        raise ValueError(
            f"--out {out}: started with {difference}; to lengthen it use --lengthen {out} with another --out or none: "
            "the earlier run stays as it is"
        )
    if is_finished(path):
        raise ValueError(f"--out {out}: this run is finished; name another folder to train anew")
    if not difference.same_run:
        back = f" ({difference.way_back})" if difference.way_back else ""
        raise ValueError(f"--out {out}: started with {difference}; repeat that command{back} or name another folder")
    return _continue(path, lock, difference)


def newest_finished(stage: str, root: Path = Path("runs"), data: Sequence[str] | None = None) -> str:
    """The finished run of `stage` that ended last. data: its --data; None: any but a task such as builtin:arithmetic.
    Raises ValueError if there is none."""

    def fits(config: dict[str, Any]) -> bool:
        trained_on = config.get("args", {}).get("data", [])
        is_task = any(name.startswith("builtin:") for name in trained_on)
        return config.get("stage") == stage and (not is_task if data is None else trained_on == list(data))

    flags = [*root.glob("*/finished"), *root.glob("*/*/finished")]  # and the stages of minimind zero
    ended = [(flag.stat().st_mtime_ns, flag.parent) for flag in flags]
    runs = [path for _, path in sorted(ended) if fits(read_config(path))]
    if not runs:
        raise ValueError(
            f"--from: there is no finished run of train/{stage}.py under {root}/; run it first, or name weights"
        )
    return str(runs[-1])


def truncate(path: Path, size: int) -> None:
    """Cut a log to its size at the checkpoint, so that a resumed run writes each line once."""
    there = path.stat().st_size if path.exists() else 0
    if there < size:
        raise ValueError(
            f"{path}: has {there} bytes, fewer than the {size} at the checkpoint; was it edited? "
            "Put it back or start anew in another folder"
        )
    if path.exists():
        os.truncate(path, size)


def versions(device: str) -> dict[str, Any]:
    """The device, the versions of the packages, and the git commit of a checkout."""
    packages: dict[str, str | None] = {}
    for name in ("triton", "numpy", "tokenizers", "safetensors"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "commit": _git_commit(),
        "torch": str(torch.__version__),  # with its build, which importlib.metadata leaves out
        **packages,
    }


def record_versions(run: RunFolder, device: str, attention: str) -> None:
    """Add this start to versions.json: a run may be resumed with other software, and with other values of flags that
    change no step. attention: from `attention_name`."""
    path = run.path / "versions.json"
    recorded = read_json(path) if path.exists() else {"starts": []}
    starts = (recorded or {}).get("starts")
    if not isinstance(starts, list):
        raise ValueError(f"{path}: damaged; remove it, and a new one is begun")
    changed = {"changed": dict(run.changed)} if run.changed else {}
    write_json(path, {"starts": [*starts, versions(device) | {"attention": attention} | changed]})


def _runs(out: str | None, default_name: str, root: Path) -> Iterator[Path]:
    """The runs that a new start may continue, in order."""
    for path in _numbered(root / default_name) if out is None else [Path(out)]:
        if (path / "config.json").exists():
            yield path
        elif out is not None or not path.is_dir():
            return


def _numbered(base: Path) -> Iterator[Path]:
    return (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in count(1))


def _next_free(
    root: Path, name: str, config: dict[str, Any], resume: ResumeMode, defaults: Defaults, source: EarlierRun | None
) -> RunFolder:
    near: list[tuple[Path, Difference]] = []
    for path in _numbered(root / name):
        if _make(path):
            lock = _try_lock(path)
            if lock is not None:
                others = [(run, difference) for run, difference in near if difference.same_run or source is None]
                return _create(path, config, lock, source, others)
        if resume == "never" or not (path / "config.json").exists():
            continue
        difference = compare(defaults.complete(read_config(path), config), config)
        near.append((path, difference))
        if not difference.same_run or is_finished(path):
            continue
        lock = _try_lock(path)
        if lock is not None:
            return _continue(path, lock, difference)
    raise AssertionError("there is always a next number")


def _nearest(others: Sequence[tuple[Path, Difference]]) -> tuple[str, ...]:
    """A line about the most similar run: how it differs and how to continue it. Empty if all others differ and are
    finished."""
    candidates = [(path, diff) for path, diff in others if not diff.counts or not is_finished(path)]
    if not candidates:
        return ()
    path, difference = min(reversed(candidates), key=lambda other: len(other[1].counts) + len(other[1].length))
    finished = is_finished(path)
    if difference.same_run:
        state = "finished: it is trained anew" if finished else "which another process trains: this is a second one"
        return (f"{path} is this very run, {state}",)
    steps = [step_of(checkpoint) for checkpoint in list_checkpoints(path)]
    where = "finished" if finished else " after step ".join(["unfinished", *map(str, steps[-1:])])
    ways = [f"{difference.way_back} continues it"] if difference.way_back and not finished else []
    ways += [f"--lengthen {path} goes on with it to a greater length"] if difference.only_length else []
    way = f"; {', '.join(ways)}" if ways else ""
    return (f"near: {path}, {where}, was started with {difference}{way}; this run starts anew",)


def _make(path: Path) -> bool:
    """Make the folder; whether it is new. Raises ValueError if it cannot be made."""
    try:
        path.mkdir(parents=True)
    except OSError as error:
        if path.is_dir():
            return False
        raise ValueError(f"{path}: cannot be made ({error.strerror}); name another folder with --out") from None
    return True


def _try_lock(path: Path) -> FileLock | None:
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); name another folder with --out") from None
    return lock


def _create(
    path: Path,
    config: dict[str, Any],
    lock: FileLock,
    source: EarlierRun | None = None,
    others: Sequence[tuple[Path, Difference]] = (),
) -> RunFolder:
    notes = _nearest(others)
    if source is None:
        write_json(path / "config.json", config)
        return RunFolder(path, None, lock, notes)
    source.copy_into(path)
    write_json(path / "config.json", config | source.history)
    return RunFolder(path, list_checkpoints(path)[-1], lock, notes, {}, source.legs, source.run)


def _continue(path: Path, lock: FileLock, difference: Difference) -> RunFolder:
    remove_partial(path)
    checkpoints = list_checkpoints(path)
    notes = (f"continues with other flags: {difference.free_text}",) if difference.free else ()
    changed = {change.name: change.now for change in difference.free}
    checkpoint = checkpoints[-1] if checkpoints else None
    return RunFolder(path, checkpoint, lock, notes, changed, legs_of(read_config(path)))


def _git_commit() -> str | None:
    """The commit of the checkout, or $MINIMIND_COMMIT for a copy without .git."""
    named = os.environ.get("MINIMIND_COMMIT")
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return named
    return answer.stdout.strip() or named if answer.returncode == 0 else named
