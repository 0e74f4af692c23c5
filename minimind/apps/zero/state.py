"""What a folder of `minimind zero` remembers between starts: zero.json, written whole or not at all."""

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
_HEARTBEAT = 5.0  # seconds between notes of the time that a stage has taken: what a kill can lose


@dataclass
class State:
    """asked: the flags that the folder stands for; chain, plan: what they came to at the first start, None before
    that; seconds: spent on each stage so far, over all starts; starts: when each was, as Unix time."""

    folder: Path
    asked: dict[str, Any]
    chain: Chain | None = None
    plan: Plan | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)
    _written: float = 0.0

    @staticmethod
    def open(folder: Path, asked: dict[str, Any]) -> State:
        """What was begun in `folder`, or a new state. ValueError where that was begun with other flags."""
        found = read_json(folder / NAME)
        if found is None:
            if (folder / NAME).exists():
                raise ValueError(f"{folder / NAME}: damaged; put it back, or name another folder with --out")
            if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
                raise ValueError(f"--out {folder}: not empty and not of minimind zero; name another folder")
            return State(folder, asked)
        state = State.of(folder, found)
        differ = [name for name in asked if state.asked.get(name) != asked[name]]
        if differ:
            told = ", ".join(f"--{name} {spelt(state.asked.get(name))} (now {spelt(asked[name])})" for name in differ)
            raise ValueError(f"--out {folder}: begun with {told}; repeat that command or name another folder")
        return state

    @staticmethod
    def of(folder: Path, found: Mapping[str, Any]) -> State:
        chain = found["chain"]
        for part in ("data", "extra"):
            chain[part] = {name: tuple(values) for name, values in chain[part].items()}
        made = Chain(**{**chain, "names": tuple(chain["names"]), "common": tuple(chain["common"])})
        return State(folder, found["asked"], made, Plan.of(found["plan"]), found["seconds"], found["starts"])

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
        """`stage` has taken so many seconds more."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if time.monotonic() - self._written > _HEARTBEAT:
            self.write()

    def command(self, stage: str) -> list[str]:
        """The script of a stage with the flags that it is run with; it can be repeated by hand."""
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
    """ValueError where another process works in `folder`; the lock of a dead one is free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".zero.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"--out {folder}: another minimind zero works in it; wait, or name another folder") from None
    except OSError as error:
        told = error.strerror or os.strerror(error.errno or 0)
        raise ValueError(f"--out {folder}: cannot be written ({told}); name another folder") from None
    try:
        yield
    finally:
        lock.release()
