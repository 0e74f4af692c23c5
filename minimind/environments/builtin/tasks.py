"""Tasks for agents, and conversations that show a weak one how they are done.

Held-out tasks have values that no training task has; half of them are worded as no training task is. The same on every
machine: nothing here is random but by a seed.

The conversations are weak on purpose: a third of them is right, the others guess without a call, stop before the last
one, call the same tool again, or write a call that is none. A model that learns from them can do the tasks and does not
know that it should: that is left to rewards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from minimind.environments.builtin.kinds import KINDS, Kind, SolutionStep, TaskCase
from minimind.environments.builtin.kit import builtin_tools
from minimind.environments.tools import by_name
from minimind.utils.display import say
from minimind.utils.files import cache_root, make_folder, write_atomically

NAME = "builtin:agent"  # what --data calls them
_OF_KIND = 320  # tasks drawn of each kind and language
_HELD_OUT = 10  # one case of so many
_GUESS, _STOP, _REPEAT, _BROKEN = "guess", "stop", "repeat", "broken"
SLIPS = (None, None, None, _GUESS, _GUESS, _STOP, _STOP, _BROKEN, _REPEAT)  # None: right


@dataclass(frozen=True)
class Task:
    """question, with `tools` on offer, a tool for each of the case's steps and one that is not needed. new_wording:
    whether no training task is worded so."""

    kind: str
    chinese: bool
    question: str
    case: TaskCase
    tools: tuple[str, ...]
    new_wording: bool = False

    @property
    def row(self) -> dict[str, Any]:
        """As a prompt of a .jsonl file."""
        messages = [self._system, {"role": "user", "content": self.question}, {"role": "assistant", "content": ""}]
        return {
            "conversations": messages,
            "reference": self.case.answer,
            "calls": len(self.case.steps),
            "kind": self.kind,
            "state": dict(self.case.state),
            "new_wording": self.new_wording,
        }

    def conversation(self, slip: str | None = None) -> dict[str, Any]:
        """Solved, or not quite, as `slip` has it."""
        messages = [self._system, {"role": "user", "content": self.question}]
        steps = list(self.case.steps)
        if slip == _GUESS:
            return {"conversations": [*messages, self._answer(_shifted(self.case.answer))]}
        if slip == _BROKEN:
            said = f"<tool_call>\n{steps[0].tool} {json.dumps(dict(steps[0].arguments), ensure_ascii=False)}\n"
            return {"conversations": [*messages, {"role": "assistant", "content": said + "</tool_call>"}]}
        if slip == _STOP:
            steps.pop()
        if slip == _REPEAT:
            steps.insert(0, steps[0])
        for step in steps:
            messages += [_called(step), {"role": "tool", "content": step.result}]
        answer = self.case.answer if slip != _STOP else _shifted(self.case.answer)
        return {"conversations": [*messages, self._answer(answer)]}

    @property
    def _system(self) -> dict[str, Any]:
        schemas = by_name(builtin_tools())
        return {"role": "system", "content": "", "tools": [schemas[name].schema for name in self.tools]}

    def _answer(self, answer: str) -> dict[str, Any]:
        said = f"答案是{answer}。" if self.chinese else f"The answer is {answer}."
        return {"role": "assistant", "content": said}


@cache
def tasks() -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """(training, held-out), each in an order that a hash of the question decides."""
    train: dict[str, Task] = {}
    heldout: dict[str, Task] = {}
    for kind in KINDS:
        for chinese in (False, True):
            random = Random(f"{kind.name} {chinese}")
            for number in range(_OF_KIND):
                _add(train, heldout, kind, kind.draw(random, chinese), chinese, number)
    return _ordered(train), _ordered(heldout)


def agent_prompts(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """(training, held-out) prompts as .jsonl files, each with its answer as "reference", written at the first call
    under `cache_dir`. Raises ValueError when the folder cannot be written."""
    train, heldout = ([task.row for task in part] for part in tasks())
    return _written("agent-train", train, cache_dir, console), _written("agent-heldout", heldout, cache_dir, console)


def weak_agent(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """(training, held-out) conversations of a weak agent; otherwise as `agent_prompts`."""
    train, heldout = ([task.conversation(_slip(task)) for task in part] for part in tasks())
    return (
        _written("weak-agent-train", train, cache_dir, console),
        _written("weak-agent-heldout", heldout, cache_dir, console),
    )


def _add(
    train: dict[str, Task], heldout: dict[str, Task], kind: Kind, case: TaskCase, chinese: bool, number: int
) -> None:
    wordings = kind.chinese if chinese else kind.english
    held = _number(f"{kind.name} {case.words} {case.answer}") % _HELD_OUT == 0
    new = held and number % 2 == 0
    wording = wordings[-1] if new else wordings[number % (len(wordings) - 1)]
    question = wording.format(*case.words)
    used = list(dict.fromkeys(step.tool for step in case.steps))
    others = [tool.name for tool in builtin_tools() if tool.name not in used]
    offered = sorted([*used, others[_number(question) % len(others)]], key=lambda name: _number(question + name))
    task = Task(kind.name, chinese, question, case, tuple(offered), new)
    (heldout if held else train).setdefault(f"{question} {case.answer}", task)


def _ordered(found: dict[str, Task]) -> tuple[Task, ...]:
    return tuple(sorted(found.values(), key=lambda task: _number(task.question)))


def _slip(task: Task) -> str | None:
    slip = SLIPS[_number("slip " + task.question) % len(SLIPS)]
    return _GUESS if slip == _STOP and len(task.case.steps) == 1 else slip


def _called(step: SolutionStep) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [step.call]}


def _shifted(answer: str) -> str:
    """Another answer of the same look: every digit is the next one, or the word is one of a few."""
    if answer[0].isalpha():
        return "Sunday" if answer != "Sunday" else "Monday"
    return "".join(str((int(c) + 3) % 10) if c.isdigit() else c for c in answer)


def _written(name: str, rows: Sequence[Any], cache_dir: str | Path | None, console: Console | None) -> Path:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    folder = make_folder(cache_root(cache_dir) / "corpus")
    path = folder / f"{name}-{blake2b(data, digest_size=8).hexdigest()}.jsonl"
    if not path.exists():
        write_atomically(path, data)
        say(console or Console(stderr=True), f"built-in tasks for agents: {len(rows):,} rows in {path}")
    return path


def _number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
