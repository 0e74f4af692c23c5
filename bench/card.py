"""Run the most valuable tasks on a GPU within a quarter of an hour, each with a time limit, all results in one file.

    python bench/card.py --rehearse --minutes 60        every task on a CPU, with the smallest sizes
    python bench/card.py --minutes 12 --out card        on a GPU; card/card.tar.gz has all results
    python bench/card.py --minutes 4 --before card.tar.gz --out card      continue later, or on another GPU
    python bench/card.py --all --out card               every benchmark, two to three hours

Each task (bench/cards/tasks.py) is a process of its own, which is stopped after twice its estimated time; no task needs
another's success. The archive is written after every task and every 20 seconds, so that an interruption loses little. A
task that is done is not repeated; one that failed at this commit, or was stopped, runs after those that did not run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console

from bench.cards.report import LARGEST, TABLE, lines_of, pack, result_line, show, unpack, write_table
from bench.cards.tasks import BenchmarkTask, CardSetting, run_folder, tasks
from bench.common.command import run, table_console
from bench.common.record import ROOT, slug
from minimind.training.run_folder import versions
from minimind.utils.display import duration
from minimind.utils.files import write_json

DONE, CUT, NOT_REACHED, NEEDS_GPU = "done", "cut", "not reached", "needs a GPU"
ARCHIVE, STATE = "card.tar.gz", "card.json"
PACKING = 3.0  # seconds kept for the last archive
EVERY = 20.0  # seconds between archives while a task runs
QUICK_MINUTES = 12.0


@dataclass(frozen=True)
class Args:
    """Run the benchmarks of a GPU in order of value."""

    minutes: float | None = None
    """Time limit: a running task is stopped then, and none is started whose estimate does not fit. None: 12, or no
    limit with --all."""
    all: bool = False
    """Also run the tasks that do not fit a quarter of an hour."""
    part: tuple[int, ...] = ()
    """Groups of tasks to run, counted from 1. Empty: all of them."""
    only: tuple[str, ...] = ("",)
    """Run only the tasks whose name contains one of these."""
    again: bool = False
    """Also run the tasks that are done."""
    rehearse: bool = False
    """Run everything on a CPU with the smallest sizes; tasks that need a GPU are only listed."""
    data: tuple[str, ...] = ()
    """Text to train on, as in train/pretrain.py; empty: the built-in corpus."""
    chats: tuple[str, ...] = ()
    """Conversations to train on, as in train/sft.py; empty: the built-in conversations."""
    before: str | None = None
    """The archive of an earlier call, if its --work folder no longer exists."""
    out: str = "build/card"
    """Folder of the archive, card.tar.gz."""
    work: str | None = None
    """Folder of the tasks' files; None: `work` in --out."""


@dataclass
class CardRun:
    """state: the outcome of each task, by name. deadline: in time.monotonic(). every: seconds between archives."""

    work: Path
    archive: Path
    commit: str
    console: Console
    state: dict[str, dict[str, Any]]
    environment: dict[str, str] = field(default_factory=dict)
    deadline: float = float("inf")
    every: float = EVERY
    rehearse: bool = False

    def begin(self, selected: Sequence[BenchmarkTask]) -> None:
        """Give every task a state, so that the first archive has them all."""
        for task in selected:
            entry = self.state.setdefault(task.name, {"state": NOT_REACHED})
            if task.gpu and self.rehearse:
                entry |= {"state": NEEDS_GPU, "rehearsed": True}
        self.save()

    def order(self, selected: Sequence[BenchmarkTask], again: bool) -> list[BenchmarkTask]:
        """The tasks left to run; first those that have not been tried at this commit."""
        states = {task.name: self.state[task.name] for task in selected}
        left = [task for task in selected if states[task.name]["state"] != NEEDS_GPU]
        left = [task for task in left if again or states[task.name]["state"] != DONE]
        return sorted(left, key=lambda task: states[task.name].get("commit") == self.commit)

    def run_all(self, left: Sequence[BenchmarkTask]) -> None:
        """Run the tasks whose estimates fit the remaining time."""
        for task in left:
            if 60 * task.minutes <= self.seconds_left():
                self.run(task)

    def run(self, task: BenchmarkTask) -> None:
        log = self.log_of(task)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        shutil.rmtree(run_folder(self.work, task.name), ignore_errors=True)  # a run there would be continued
        start = time.monotonic()
        self.note(task, CUT, start)  # true if nothing more can be written
        state = f"no {task.needs}"
        if task.needs is None or shutil.which(task.needs) is not None:
            limit = min(120 * task.minutes, self.seconds_left())
            environment = {**os.environ, **self.environment, **task.environment}
            code = execute(task.command, log, limit, environment, partial(self.note, task, CUT, start), self.every)
            state = CUT if code is None else f"failed {code}" if code else DONE
        entry = self.note(task, state, start)
        self.say(f"{task.name}: {state}, {duration(entry['seconds'])}: {entry['said']}")

    def note(self, task: BenchmarkTask, state: str, start: float) -> dict[str, Any]:
        """Record the state of a task, and save everything."""
        entry = self.state[task.name] = {
            "state": state,
            "seconds": round(time.monotonic() - start, 1),
            "commit": self.commit,
            "rehearsed": self.rehearse,
            "said": result_line(self.log_of(task), task.telling),
            "command": " ".join("python" if part == sys.executable else part for part in task.command),
        }
        self.save()
        return entry

    def log_of(self, task: BenchmarkTask) -> Path:
        return self.work / "logs" / f"{slug(task.name)}.log"

    def save(self) -> list[str]:
        """Write state, table and archive; return the names of the files that are too large for the archive."""
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / STATE, self.state)
        write_table(self.work / TABLE, lines_of(self.state, list(self.state)))
        return pack(self.work, self.archive)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic() - PACKING

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def execute(
    command: Sequence[str], log: Path, limit: float, environment: dict[str, str],
    tick: Callable[[], object], every: float,
) -> int | None:  # fmt: skip
    """Run a command with its output in `log`; its exit status, or None if it was stopped after `limit` seconds. tick is
    called every `every` seconds. Whatever the command has started ends with it."""
    end_by = time.monotonic() + limit
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while (left := end_by - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=min(left, every))
                tick()
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(args: Args) -> int:
    """The exit status: 0 if every selected task is done or needs a GPU."""
    start = time.monotonic()
    out = Path(args.out).resolve()
    work = Path(args.work).resolve() if args.work else out / "work"
    out.mkdir(parents=True, exist_ok=True)
    if args.before is not None and not (work / STATE).exists():
        unpack(Path(args.before), work)
    data, chats = (tuple(str(Path(path).resolve()) for path in paths) for paths in (args.data, args.chats))
    has_gpu = torch.cuda.is_available() and not args.rehearse
    large = not has_gpu or torch.cuda.get_device_properties(0).total_memory > 40 * 2**30
    selected = select(tasks(CardSetting(args.rehearse, work, data, chats, large), args.all), args)
    minutes = args.minutes if args.minutes is not None else float("inf") if args.all else QUICK_MINUTES
    environment = {"PYTHONUNBUFFERED": "1", "COLUMNS": "150"}  # output is complete if stopped, tables are not cut
    if args.rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    card = CardRun(
        work, out / ARCHIVE, versions("")["commit"] or "unknown", Console(), read_state(work / STATE, args.rehearse),
        environment, start + 60 * minutes, rehearse=args.rehearse,
    )  # fmt: skip
    return run_selected(card, selected, args)


def run_selected(card: CardRun, selected: Sequence[BenchmarkTask], args: Args) -> int:
    """Run the tasks; whatever happens, show the table and write the archive."""
    card.begin(selected)
    left = card.order(selected, args.again)
    minutes = sum(task.minutes for task in left)
    card.say(f"{len(left)} of {len(selected)} tasks to run, about {minutes:.3g} minutes on an H200")
    try:
        card.run_all(left)
    finally:
        too_large = card.save()
        names = [task.name for task in selected]
        show(lines_of(card.state, names), table_console(160))
        if too_large:
            card.say(f"larger than {LARGEST >> 20} MiB and not in the archive: {', '.join(too_large)}")
        size = card.archive.stat().st_size / 1e6
        card.say(f"archive: {card.archive} ({size:.1f} MB)")
    return 0 if all(card.state[name]["state"] in (DONE, NEEDS_GPU) for name in names) else 1


def read_state(path: Path, rehearse: bool) -> dict[str, dict[str, Any]]:
    """The outcomes of earlier calls. Those of a rehearsal do not count on a GPU."""
    state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: entry for name, entry in state.items() if entry.get("rehearsed", False) == rehearse}


def select(every: Sequence[BenchmarkTask], args: Args) -> list[BenchmarkTask]:
    """The tasks that --part and --only select. ValueError if there are none."""
    parts = sorted({task.part for task in every})
    for part in args.part:
        if part not in parts:
            raise ValueError(f"--part {part}: choose from {parts[0]} to {parts[-1]}")
    selected = [task for task in every if not args.part or task.part in args.part]
    selected = [task for task in selected if any(name in task.name for name in args.only)]
    if not selected:
        raise ValueError(f"--only {' '.join(args.only)}: no task has this in its name")
    return selected


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running task, then writes the archive
    run(main, Args, __doc__)
