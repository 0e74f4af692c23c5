"""The folder every run leaves: config, metrics.jsonl, loss.png, samples.txt, checkpoints, versions."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from minimind.data.files import write_json
from minimind.training.checkpoint import list_checkpoints, remove_partial

ResumeMode = Literal["auto", "never"]


@dataclass(frozen=True)
class RunFolder:
    """path: the folder; checkpoint: where to continue from, None at a fresh start."""

    path: Path
    checkpoint: Path | None

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    def mark_finished(self) -> None:
        (self.path / "finished").touch()


def open_run(
    out: str | None, default_name: str, config: dict[str, Any], resume: ResumeMode, root: Path = Path("runs")
) -> RunFolder:
    """Continue the unfinished run with this very configuration, or make a new folder. Nothing is overwritten.

    out: the folder to use; None takes runs/<default_name>, numbered when that is taken by another run.
    Raises ValueError when `out` holds a finished run or one with another configuration.
    """
    if out is not None:
        path = Path(out)
        if not (path / "config.json").exists() and path.exists() and any(path.iterdir()):
            raise ValueError(f"--out {out}: not empty and not a run folder; name another folder")
        if not (path / "config.json").exists():
            return _create(path, config)
        if resume == "never":
            raise ValueError(f"--out {out}: holds a run already; name another folder or drop --resume never")
        if (path / "finished").exists():
            raise ValueError(f"--out {out}: this run is finished; name another folder to train anew")
        difference = _difference(_read_config(path), config)
        if difference:
            raise ValueError(
                f"--out {out}: started with {difference}; repeat that command or name another folder"
            )
        return _continue(path)
    number = 1
    while True:
        path = root / (default_name if number == 1 else f"{default_name}-{number}")
        if not path.exists():
            return _create(path, config)
        unfinished = (path / "config.json").exists() and not (path / "finished").exists()
        if resume == "auto" and unfinished and not _difference(_read_config(path), config):
            return _continue(path)
        number += 1


def truncate(path: Path, size: int) -> None:
    """Cut a log back to where the checkpoint saw it, so that a resumed run writes each line once."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(size)


def versions(device: str) -> dict[str, Any]:
    """What it ran on and with; git commit where the code is a checkout."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "triton", "numpy", "tokenizers", "safetensors"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "commit": _git_commit(),
        **packages,
    }


def _create(path: Path, config: dict[str, Any]) -> RunFolder:
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", config)
    return RunFolder(path, None)


def _continue(path: Path) -> RunFolder:
    remove_partial(path)
    checkpoints = list_checkpoints(path)
    return RunFolder(path, checkpoints[-1] if checkpoints else None)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: not valid JSON ({error}); name another --out") from error


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    new = json.loads(json.dumps(new))
    return ", ".join(
        f"{key}={old.get(key)} (now {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    )


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
