"""The folder every run leaves: config, metrics.jsonl, loss.png, samples.txt, checkpoints, versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from minimind.data.files import read_json, write_json
from minimind.training.checkpoint import list_checkpoints, remove_partial

ResumeMode = Literal["auto", "never"]


# Settings that change where things lie, how they are sent and by whose kernels, not what is computed, rounding aside.
_NOT_IDENTITY = {"args.attention", "args.cache_dir", "args.parallel", "args.reduce_dtype", "args.replicas"}

# Flags that were left to the data and the weights after others were: runs that had chosen these still say a value.
_LATER = {"epochs", "optimizer"}


@dataclass(frozen=True)
class RunFolder:
    """path: the folder; checkpoint: where to continue from, None at a fresh start. Locked for this process: the
    lock goes with the object, or with the process however it ends. A copy in another process has None."""

    path: Path
    checkpoint: Path | None
    lock: FileLock | None

    def __reduce__(self) -> tuple[Any, ...]:
        return RunFolder, (self.path, self.checkpoint, None)

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
        return {**old, "args": args, "chosen": chosen}


def find_run(
    out: str | None,
    default_name: str,
    config: dict[str, Any],
    resume: ResumeMode,
    defaults: Defaults,
    root: Path = Path("runs"),
) -> dict[str, Any]:
    """What the run that `open_run` would continue chose from its data when it began, `config` being without that; empty
    where there is none. Makes and locks nothing."""
    if resume == "never":
        return {}
    if out is not None:
        paths = iter([Path(out)])
    else:
        base = root / default_name
        paths = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in count(1))
    for path in paths:
        if not (path / "config.json").exists():
            if out is None and path.is_dir():
                continue
            return {}
        found = defaults.complete(_read_config(path), config)
        chosen = found.pop("chosen")
        if not (path / "finished").exists() and not _difference(found, config):
            return chosen
    return {}


def open_run(
    out: str | None,
    default_name: str,
    config: dict[str, Any],
    resume: ResumeMode,
    root: Path = Path("runs"),
    defaults: Defaults = Defaults(),
) -> RunFolder:
    """Continue the unfinished run with this very configuration, or make a new folder. Nothing is overwritten.

    out: the folder to use; None takes runs/<default_name>, numbered when that is taken by another run.
    Raises ValueError when `out` holds a finished run, one with another configuration, or one that is running.
    """
    if out is None:
        return _next_free(root / default_name, config, resume, defaults)
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    if (
        path.exists()
        and not (path / "config.json").exists()
        and any(f.name != ".lock" for f in path.iterdir())
    ):
        raise ValueError(f"--out {out}: not empty and not a run folder; name another folder")
    _make(path)
    lock = _try_lock(path)
    if lock is None:
        raise ValueError(f"--out {out}: another process is training in it; wait, or name another folder")
    if not (path / "config.json").exists():
        return _create(path, config, lock)
    if resume == "never":
        raise ValueError(f"--out {out}: holds a run already; name another folder or drop --resume never")
    if (path / "finished").exists():
        raise ValueError(f"--out {out}: this run is finished; name another folder to train anew")
    difference = _difference(defaults.complete(_read_config(path), config), config)
    if difference:
        raise ValueError(
            f"--out {out}: started with {difference}; repeat that command or name another folder"
        )
    return _continue(path, lock)


def newest_finished(stage: str, root: Path = Path("runs"), data: Sequence[str] | None = None) -> str:
    """The finished run of `stage` that ended last: on this --data, or where none is given on any but a task of its own
    such as builtin:arithmetic. Raises ValueError, with the way out, where there is none."""

    def fits(config: dict[str, Any]) -> bool:
        trained_on = config.get("args", {}).get("data", [])
        of_a_task = any(name.startswith("builtin:") for name in trained_on)
        return config.get("stage") == stage and (not of_a_task if data is None else trained_on == list(data))

    ended = [(flag.stat().st_mtime_ns, flag.parent) for flag in root.glob("*/finished")]
    runs = [path for _, path in sorted(ended) if fits(_read_config(path))]
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


def record_versions(run: Path, device: str, attention: str) -> None:
    """Add this start to versions.json: a resumed run may have continued on other software. attention: as
    `attention_name` says."""
    path = run / "versions.json"
    known = read_json(path) if path.exists() else {"starts": []}
    starts = (known or {}).get("starts")
    if not isinstance(starts, list):
        raise ValueError(f"{path}: damaged; remove it, a new one is begun")
    write_json(path, {"starts": [*starts, versions(device) | {"attention": attention}]})


def _next_free(base: Path, config: dict[str, Any], resume: ResumeMode, defaults: Defaults) -> RunFolder:
    number = 1
    while True:
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        number += 1
        fresh = _make(path)
        if not fresh and (
            resume == "never"
            or (path / "finished").exists()
            or not (path / "config.json").exists()
            or _difference(defaults.complete(_read_config(path), config), config)
        ):
            continue
        lock = _try_lock(path)
        if lock is not None:
            return _create(path, config, lock) if fresh else _continue(path, lock)


def _make(path: Path) -> bool:
    """Whether the folder is new. ValueError where it cannot be made."""
    try:
        path.mkdir(parents=True)
    except OSError as error:
        if path.is_dir():
            return False
        raise ValueError(
            f"{path}: cannot be made ({error.strerror}); name another folder with --out"
        ) from None
    return True


def _try_lock(path: Path) -> FileLock | None:
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); name another folder with --out"
        ) from None
    return lock


def _create(path: Path, config: dict[str, Any], lock: FileLock) -> RunFolder:
    write_json(path / "config.json", config)
    return RunFolder(path, None, lock)


def _continue(path: Path, lock: FileLock) -> RunFolder:
    remove_partial(path)
    checkpoints = list_checkpoints(path)
    return RunFolder(path, checkpoints[-1] if checkpoints else None, lock)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: not valid JSON ({error}); name another --out") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'}: not a run's configuration; name another --out")
    return config


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    before, now = (_leaves(json.loads(json.dumps(config))) for config in (old, new))
    return ", ".join(
        f"{key.removeprefix('args.')} {before.get(key)} (now {now.get(key)})"
        for key in sorted((before.keys() | now.keys()) - _NOT_IDENTITY)
        if before.get(key) != now.get(key)
    )


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


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
