"""A quarter of an hour of a card: the most valuable questions first, each within its own time, all results in one file.

    python bench/card.py --rehearse --minutes 60        every question on a CPU, as small as it goes
    python bench/card.py --minutes 12 --out card        on a card; card/card.tar.gz is what to take home
    python bench/card.py --minutes 4 --before card.tar.gz --out card      another card goes on with what is not done

Each question (bench/cards/questions.py) is a process of its own that is cut off after twice its estimate; none needs
another's success. The archive is written anew after every question and every 20 seconds, so that a cut leaves what was
done. A question that is done is not asked again; one that failed at this commit, or was cut off, comes after the new.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

from rich.console import Console

from bench.cards.questions import CardQuestion, CardSetting, questions, run_folder
from bench.cards.report import LARGEST, TABLE, lines_of, pack, said, show, unpack, write_table
from bench.cards.running import execute
from bench.operators.report import slug
from minimind.training.run_folder import versions
from minimind.utils.display import duration
from minimind.utils.files import write_json
from minimind.utils.stdio import command_line

ROOT = Path(__file__).parents[1]
DONE, CUT, NOT_REACHED, NEEDS_CARD = "done", "cut", "not reached", "needs a GPU"
ARCHIVE, STATE = "card.tar.gz", "card.json"
PACKING = 3.0  # seconds kept for the last archive
EVERY = 20.0  # seconds between archives while a question runs


@dataclass(frozen=True)
class Args:
    """Ask a card what is worth most."""

    minutes: float = 12.0
    """End by then: what runs is cut off, and nothing is begun whose estimate does not fit."""
    part: tuple[int, ...] = ()
    """Only these groups of the list, counted from 1. None: all."""
    only: tuple[str, ...] = ("",)
    """Only the questions with one of these in their name."""
    again: bool = False
    """Also ask what is done."""
    rehearse: bool = False
    """Everything on a CPU, as small as it goes; what has no form there is listed."""
    data: tuple[str, ...] = ()
    """Text to train on, as in train/pretrain.py; None takes the built-in corpus."""
    before: str | None = None
    """The archive of an earlier call, where --work is not there any more."""
    out: str = "build/card"
    """Folder for the archive, card.tar.gz."""
    work: str | None = None
    """Folder for what questions leave; None for `work` in --out."""


@dataclass
class CardRun:
    """state: what became of each question, by name; deadline: of time.monotonic(); every: seconds between archives."""

    work: Path
    archive: Path
    commit: str
    console: Console
    state: dict[str, dict[str, Any]]
    environment: dict[str, str] = field(default_factory=dict)
    deadline: float = float("inf")
    every: float = EVERY
    rehearse: bool = False

    def begin(self, asked: Sequence[CardQuestion]) -> None:
        """A state for every question, so that the first archive has them all."""
        for question in asked:
            entry = self.state.setdefault(question.name, {"state": NOT_REACHED})
            if question.card and self.rehearse:
                entry |= {"state": NEEDS_CARD, "rehearsed": True}
        self.keep()

    def order(self, asked: Sequence[CardQuestion], again: bool) -> list[CardQuestion]:
        """What is left to ask: first what was not tried at this commit."""
        states = {q.name: self.state[q.name] for q in asked}
        left = [q for q in asked if states[q.name]["state"] != NEEDS_CARD]
        left = [q for q in left if again or states[q.name]["state"] != DONE]
        return sorted(left, key=lambda q: states[q.name].get("commit") == self.commit)

    def go_on(self, left: Sequence[CardQuestion]) -> None:
        """Leaving out those whose estimate does not fit."""
        for question in left:
            if 60 * question.minutes <= self.seconds_left():
                self.ask(question)

    def ask(self, question: CardQuestion) -> None:
        log = self.log_of(question)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        shutil.rmtree(run_folder(self.work, question.name), ignore_errors=True)  # it would be gone on with
        start = time.monotonic()
        self.note(question, CUT, start)  # which is true if nothing more is heard
        state = f"no {question.needs}"
        if question.needs is None or shutil.which(question.needs) is not None:
            limit = min(120 * question.minutes, self.seconds_left())
            environment = {**os.environ, **self.environment, **question.environment}
            tick = partial(self.note, question, CUT, start)
            code = execute(question.command, ROOT, log, limit, environment, tick, self.every)
            state = CUT if code is None else f"failed {code}" if code else DONE
        entry = self.note(question, state, start)
        self.say(f"{question.name}: {state}, {duration(entry['seconds'])}: {entry['said']}")

    def note(self, question: CardQuestion, state: str, start: float) -> dict[str, Any]:
        """Keep what is known of it now."""
        entry = self.state[question.name] = {
            "state": state,
            "seconds": round(time.monotonic() - start, 1),
            "commit": self.commit,
            "rehearsed": self.rehearse,
            "said": said(self.log_of(question), question.telling),
            "command": " ".join("python" if part == sys.executable else part for part in question.command),
        }
        self.keep()
        return entry

    def log_of(self, question: CardQuestion) -> Path:
        return self.work / "logs" / f"{slug(question.name)}.log"

    def keep(self) -> list[str]:
        """State, table and archive; returns what was too large for it."""
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / STATE, self.state)
        write_table(self.work / TABLE, lines_of(self.state, list(self.state)))
        return pack(self.work, self.archive)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic() - PACKING

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def main(args: Args) -> int:
    """The exit status: 0 if every question that was asked for is done or needs a card."""
    start = time.monotonic()
    out = Path(args.out).resolve()
    work = Path(args.work).resolve() if args.work else out / "work"
    out.mkdir(parents=True, exist_ok=True)
    if args.before is not None and not (work / STATE).exists():
        unpack(Path(args.before), work)
    data = tuple(str(Path(path).resolve()) for path in args.data)
    asked = wanted(questions(CardSetting(args.rehearse, work, data)), args)
    state = earlier(work / STATE, args.rehearse)
    commit = versions("")["commit"] or "unknown"
    deadline = start + 60 * args.minutes
    environment = {"PYTHONUNBUFFERED": "1", "COLUMNS": "150"}  # all output before a cut, tables whole
    if args.rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    card = CardRun(work, out / ARCHIVE, commit, Console(), state, environment, deadline, rehearse=args.rehearse)
    return put(card, asked, args)


def put(card: CardRun, asked: Sequence[CardQuestion], args: Args) -> int:
    """Ask, and whatever happens show the table and leave the archive."""
    card.begin(asked)
    left = card.order(asked, args.again)
    minutes = sum(question.minutes for question in left)
    card.say(f"{len(left)} of {len(asked)} questions to ask, about {minutes:.3g} minutes on an H200")
    try:
        card.go_on(left)
    finally:
        large = card.keep()
        names = [question.name for question in asked]
        show(lines_of(card.state, names), Console(width=None if sys.stdout.isatty() else 160))
        if large:
            card.say(f"above {LARGEST >> 20} MiB, so not in the archive: {', '.join(large)}")
        size = card.archive.stat().st_size / 1e6
        card.say(f"archive: {card.archive} ({size:.1f} MB)")
    return 0 if all(card.state[name]["state"] in (DONE, NEEDS_CARD) for name in names) else 1


def earlier(path: Path, rehearse: bool) -> dict[str, dict[str, Any]]:
    """What became of each question in earlier calls; what a rehearsal did is not done on a card."""
    state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: entry for name, entry in state.items() if entry.get("rehearsed", False) == rehearse}


def wanted(every: Sequence[CardQuestion], args: Args) -> list[CardQuestion]:
    """ValueError where nothing is."""
    parts = sorted({question.part for question in every})
    for part in args.part:
        if part not in parts:
            raise ValueError(f"--part {part}: choose from {parts[0]} to {parts[-1]}")
    found = [q for q in every if not args.part or q.part in args.part]
    found = [q for q in found if any(name in q.name for name in args.only)]
    if not found:
        raise ValueError(f"--only {' '.join(args.only)}: no question has this in its name")
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended, and the archive written
    try:
        status = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(status)
