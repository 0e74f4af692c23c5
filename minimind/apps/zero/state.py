"""The state of a folder of `minimind zero` between starts: zero.json, which is written atomically."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minimind.apps.zero.planning import Plan
from minimind.apps.zero.stages import Chain
from minimind.utils.files import read_json, write_json

NAME = "zero.json"
_HEARTBEAT = 5.0  # seconds between saves of a stage's time, which is how much a kill can lose


@dataclass
class State:
    """asked: the flags that may not change; chain, plan: made from them at the first start, None before; seconds: time
    spent on each stage over all starts; starts: the Unix time of each start."""

    folder: Path
    asked: dict[str, Any]
    chain: Chain | None = None
    plan: Plan | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)
    _written: float = 0.0

    @staticmethod
    def open(folder: Path, asked: dict[str, Any]) -> State:
        """The state in `folder`, or a new one. Raises ValueError if the folder was begun with other flags, or holds
        something else."""
        fields = read_json(folder / NAME)
        if fields is None:
            if (folder / NAME).exists():
                raise ValueError(f"{folder / NAME}: damaged; put it back, or name another folder with --out")
            if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
                raise ValueError(f"--out {folder}: not empty, and no folder of minimind zero; name another folder")
            return State(folder, asked)
        state = State.of(folder, fields)
        differ = [name for name in asked if state.asked.get(name) != asked[name]]
        if differ:
            differences = ", ".join(
                f"--{name} {spelt(state.asked.get(name))} (now {spelt(asked[name])})" for name in differ
            )
            raise ValueError(f"--out {folder}: begun with {differences}; repeat that command or name another folder")
        return state

    @staticmethod
    def of(folder: Path, fields: Mapping[str, Any]) -> State:
        chain = fields["chain"]
        for part in ("data", "extra"):
            chain[part] = {name: tuple(values) for name, values in chain[part].items()}
        made = Chain(**{**chain, "names": tuple(chain["names"]), "common": tuple(chain["common"])})
        return State(folder, fields["asked"], made, Plan.of(fields["plan"]), fields["seconds"], fields["starts"])

    def write(self) -> None:
        assert self.chain is not None and self.plan is not None
        write_json(
            self.folder / NAME,
            {
                "asked": self.asked,
                "chain": dataclasses.asdict(self.chain),
                "plan": dataclasses.asdict(self.plan),
                "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
                "starts": self.starts,
            },
        )
        self._written = time.monotonic()

    def spend(self, stage: str, seconds: float) -> None:
        """Add to the time of `stage`."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if time.monotonic() - self._written > _HEARTBEAT:
            self.write()

    def command(self, stage: str) -> list[str]:
        """The script of a stage with all its flags, as it is run and can be run by hand."""
        assert self.chain is not None and self.plan is not None
        planned = self.plan.stage(stage)
        flags = [*self.chain.flags(stage, planned.preset, self.folder), *planned.flags]
        return self.chain.command(stage, [*flags, "--out", str(self.folder / stage)])

    def finished(self, stage: str) -> bool:
        return (self.folder / stage / "finished").exists()


def spelt(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock `folder`. Raises ValueError if another process has locked it; a dead process holds no lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".zero.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"--out {folder}: another minimind zero works in it; wait, or name another folder") from None
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise ValueError(f"--out {folder}: cannot be written ({reason}); name another folder") from None
    try:
        yield
    finally:
        lock.release()
