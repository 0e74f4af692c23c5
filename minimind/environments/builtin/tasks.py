"""Built-in tasks for agents, and conversations that train a weak agent on them.

Held-out tasks have values that no training task has; half of them also have a wording that no training task has. All
random choices are seeded, so the tasks are the same on every machine.

A third of the conversations are right; the others guess without a call, stop before the last call, repeat a call, or
write a malformed call. A model trained on them is able to do the tasks but often fails; reinforcement learning is to
improve it.
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

from minimind.environments.builtin import builtin_tools
from minimind.environments.builtin.kinds import KINDS, Kind, SolutionStep, TaskCase
from minimind.environments.tools import by_name
from minimind.utils.display import say
from minimind.utils.files import cache_root, make_folder, write_atomically

NAME = "builtin:agent"  # the value of --data that selects these tasks
_TASKS_PER_KIND = 320  # tasks drawn for each kind and language
_HELD_OUT = 10  # one case in this many is held out
_GUESS, _STOP, _REPEAT, _BROKEN = "guess", "stop", "repeat", "broken"
SLIPS = (None, None, None, _GUESS, _GUESS, _STOP, _STOP, _BROKEN, _REPEAT)  # None: a correct conversation


@dataclass(frozen=True)
class Task:
    """A question and the names of the tools on offer: those that the case's steps use and one that is not needed.
    new_wording: whether no training task has this wording."""

    kind: str
    chinese: bool
    question: str
    case: TaskCase
    tools: tuple[str, ...]
    new_wording: bool = False

    @property
    def row(self) -> dict[str, Any]:
        """The task as a prompt row of a .jsonl file."""
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
        """The task as a conversation row: solved, or with the mistake `slip`."""
        messages = [self._system, {"role": "user", "content": self.question}]
        steps = list(self.case.steps)
        if slip == _GUESS:
            return {"conversations": [*messages, self._answer(_shifted(self.case.answer))]}
        if slip == _BROKEN:
            call = f"<tool_call>\n{steps[0].tool} {json.dumps(dict(steps[0].arguments), ensure_ascii=False)}\n"
            return {"conversations": [*messages, {"role": "assistant", "content": call + "</tool_call>"}]}
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
        text = f"答案是{answer}。" if self.chinese else f"The answer is {answer}."
        return {"role": "assistant", "content": text}


@cache
def tasks() -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """(training, held-out), each sorted by a hash of the question."""
    train: dict[str, Task] = {}
    heldout: dict[str, Task] = {}
    for kind in KINDS:
        for chinese in (False, True):
            random = Random(f"{kind.name} {chinese}")
            for number in range(_TASKS_PER_KIND):
                _add(train, heldout, kind, kind.draw(random, chinese), chinese, number)
    return _ordered(train), _ordered(heldout)


def agent_prompts(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """Paths of (training, held-out) prompts in .jsonl files under `cache_dir`, written at the first call. Each row has
    its answer as "reference". Raises ValueError if the folder cannot be written."""
    train, heldout = ([task.row for task in part] for part in tasks())
    return _written("agent-train", train, cache_dir, console), _written("agent-heldout", heldout, cache_dir, console)


def weak_agent(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """Like `agent_prompts`, but for conversations of a weak agent."""
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


def _ordered(unordered: dict[str, Task]) -> tuple[Task, ...]:
    return tuple(sorted(unordered.values(), key=lambda task: _number(task.question)))


def _slip(task: Task) -> str | None:
    slip = SLIPS[_number("slip " + task.question) % len(SLIPS)]
    return _GUESS if slip == _STOP and len(task.case.steps) == 1 else slip


def _called(step: SolutionStep) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [step.call]}


def _shifted(answer: str) -> str:
    """A wrong answer of the same form: each digit plus 3 modulo 10, or another day of the week."""
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
