"""The folder every run leaves: config, metrics.jsonl, loss.png, samples.txt, checkpoints, versions."""

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
from minimind.training.identity import Defaults, Difference, compare
from minimind.training.lengthen import EarlierRun, Legs, legs_of, read_config, source_of
from minimind.utils.files import read_json, write_json

ResumeMode = Literal["auto", "never"]
_NO_DEFAULTS = Defaults()


@dataclass(frozen=True)
class RunFolder:
    """path: the folder; checkpoint: where to continue from, None at a fresh start. Locked for this process: the
    lock goes with the object, or with the process however it ends. A copy in another process has None.

    notes: lines about how it was found; changed: flags that this start gives another value than the first one did, by
    name. legs: of a lengthened run, see lengthen.py; lengthens: the run that it was made of just now.
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

    @property
    def finished(self) -> bool:
        return (self.path / "finished").exists()

    def mark_finished(self) -> None:
        (self.path / "finished").touch()


def find_run(
    out: str | None,
    default_name: str,
    config: dict[str, Any],
    resume: ResumeMode,
    defaults: Defaults,
    root: Path = Path("runs"),
    lengthen: str | None = None,
) -> dict[str, Any]:
    """What the run that `open_run` would continue or lengthen chose from its data when it began, `config` being without
    that; empty where there is none. Makes and locks nothing."""
    for path in _runs(out, default_name, root) if resume == "auto" else ():
        found = defaults.complete(read_config(path), config)
        left = {
            k: v for k, v in found["chosen"].items() if config.get("args", {}).get(k) in (None, defaults.flags.get(k))
        }
        if not (path / "finished").exists() and compare(found, {**config, "chosen": left}).same_run:
            return found["chosen"]
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

    out: the folder to use; None takes runs/<default_name>, numbered when that is taken by another run. source: what a
    new folder begins with. Raises ValueError when `out` holds a finished run, one with another configuration, or one
    that is running.
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
        raise ValueError(f"--out {out}: holds a run already; name another folder or drop --resume never")
    found = compare(defaults.complete(read_config(path), config), config)
    if found.only_length:
        raise ValueError(
            f"--out {out}: started with {found}; to lengthen it give --lengthen {out} and another --out, or none: "
            "it stays as it is"
        )
    if (path / "finished").exists():
        raise ValueError(f"--out {out}: this run is finished; name another folder to train anew")
    if not found.same_run:
        back = f" ({found.way_back})" if found.way_back else ""
        raise ValueError(f"--out {out}: started with {found}; repeat that command{back} or name another folder")
    return _continue(path, lock, found)


def newest_finished(stage: str, root: Path = Path("runs"), data: Sequence[str] | None = None) -> str:
    """The finished run of `stage` that ended last: on this --data, or where none is given on any but a task of its own
    such as builtin:arithmetic. Raises ValueError, with the way out, where there is none."""

    def fits(config: dict[str, Any]) -> bool:
        trained_on = config.get("args", {}).get("data", [])
        of_a_task = any(name.startswith("builtin:") for name in trained_on)
        return config.get("stage") == stage and (not of_a_task if data is None else trained_on == list(data))

    ended = [(flag.stat().st_mtime_ns, flag.parent) for flag in root.glob("*/finished")]
    runs = [path for _, path in sorted(ended) if fits(read_config(path))]
    if not runs:
        raise ValueError(
            f"--from: there is no finished run of train/{stage}.py under {root}/; run it first, or name weights"
        )
    return str(runs[-1])


def truncate(path: Path, size: int) -> None:
    """Cut a log back to where the checkpoint saw it, so that a resumed run writes each line once."""
    there = path.stat().st_size if path.exists() else 0
    if there < size:
        raise ValueError(
            f"{path}: {there} bytes, but the checkpoint was written after {size}; was it edited? "
            "Put it back or start anew in another folder"
        )
    if path.exists():
        os.truncate(path, size)


def versions(device: str) -> dict[str, Any]:
    """What it ran on and with; git commit where the code is a checkout."""
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
        "torch": str(torch.__version__),  # with its build, which the package's own version does not name
        **packages,
    }


def record_versions(run: RunFolder, device: str, attention: str) -> None:
    """Add this start to versions.json: a resumed run may have continued on other software, and with other values of
    flags that change no step. attention: as `attention_name` says."""
    path = run.path / "versions.json"
    known = read_json(path) if path.exists() else {"starts": []}
    starts = (known or {}).get("starts")
    if not isinstance(starts, list):
        raise ValueError(f"{path}: damaged; remove it, a new one is begun")
    changed = {"changed": dict(run.changed)} if run.changed else {}
    write_json(path, {"starts": [*starts, versions(device) | {"attention": attention} | changed]})


def _runs(out: str | None, default_name: str, root: Path) -> Iterator[Path]:
    """Those that a new start may continue, in order."""
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
                others = [(run, found) for run, found in near if found.same_run or source is None]
                return _create(path, config, lock, source, others)
        if resume == "never" or not (path / "config.json").exists():
            continue
        found = compare(defaults.complete(read_config(path), config), config)
        near.append((path, found))
        if not found.same_run or (path / "finished").exists():
            continue
        lock = _try_lock(path)
        if lock is not None:
            return _continue(path, lock, found)
    raise AssertionError("there is always a next number")


def _nearest(others: Sequence[tuple[Path, Difference]]) -> tuple[str, ...]:
    """A line about the run that is most like the one that begins: how the two differ, and how to go on with it. Nothing
    where all are finished and others."""
    told = [(path, found) for path, found in others if not found.counts or not (path / "finished").exists()]
    if not told:
        return ()
    path, found = min(reversed(told), key=lambda other: len(other[1].counts) + len(other[1].length))
    finished = (path / "finished").exists()
    if found.same_run:
        state = "finished: it is trained anew" if finished else "which another process trains: this is a second one"
        return (f"{path} is this very run, {state}",)
    steps = [step_of(checkpoint) for checkpoint in list_checkpoints(path)]
    where = "finished" if finished else " after step ".join(["unfinished", *map(str, steps[-1:])])
    ways = [f"{found.way_back} continues it"] if found.way_back and not finished else []
    ways += [f"--lengthen {path} goes on with it to a greater length"] if found.only_length else []
    way = f"; {', '.join(ways)}" if ways else ""
    return (f"near: {path}, {where}, was started with {found}{way}; this run starts anew",)


def _make(path: Path) -> bool:
    """Whether the folder is new. ValueError where it cannot be made."""
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


def _continue(path: Path, lock: FileLock, found: Difference) -> RunFolder:
    remove_partial(path)
    checkpoints = list_checkpoints(path)
    notes = (f"continues with other flags: {found.free_text}",) if found.free else ()
    changed = {change.name: change.now for change in found.free}
    checkpoint = checkpoints[-1] if checkpoints else None
    return RunFolder(path, checkpoint, lock, notes, changed, legs_of(read_config(path)))


def _git_commit() -> str | None:
    """Of the checkout; of a copy without .git what $MINIMIND_COMMIT says."""
    told = os.environ.get("MINIMIND_COMMIT")
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return told
    return answer.stdout.strip() or told if answer.returncode == 0 else told
