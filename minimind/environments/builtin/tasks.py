"""Built-in tasks for agents, and conversations that train a weak agent on them.

Held-out tasks have values that no training task has; half of them also have a wording that no training task has, the
others one of the first SHARED wordings. All random choices are seeded, so the tasks are the same on every machine.

In the conversations a third of the tasks are done; for the others the model guesses without a call, stops before the
last call, or writes a malformed call. They have the SHARED wordings alone. A model trained on them is able to do the
tasks but often fails; reinforcement learning is to improve it. A conversation has several tasks, because most of a
single one's tokens are the description of its tools, which nothing is learnt from. Between them are names and numbers
to repeat, and to write into calls of made-up tools: without these, a small model learns to copy names into its calls
much later than the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from minimind.data.builtin import exchange, shuffled
from minimind.environments.builtin import builtin_tools
from minimind.environments.builtin.kinds import KINDS, NAMES, SHARED, Kind, SolutionStep, TaskCase, random_day
from minimind.environments.builtin.tools import ELEMENTS, ELEMENTS_ZH, GOODS, MOUNTAINS, RIVERS
from minimind.environments.tools import by_name
from minimind.environments.turns import CLOSE, OPEN, read_calls
from minimind.utils.display import say
from minimind.utils.files import cache_root, make_folder, write_atomically

NAME = "builtin:agent"  # the value of --data that selects these tasks
_TASKS_PER_KIND = 320  # tasks drawn for each kind and language
_HELD_OUT = 10  # one case in this many is held out
_GUESS, _STOP, _BROKEN = "guess", "stop", "broken"
SLIPS = (None, None, None, _GUESS, _GUESS, _GUESS, _STOP, _STOP, _BROKEN)  # None: no mistake
_TOGETHER = 4  # most tasks of a weak agent's conversation
_TOOLS_TOGETHER = 3  # most tools that they take
_COPIES = 6000  # conversations in which names and numbers are copied
_DICTATED = 3  # calls in one of them
_MADE_UP = {  # tools and their parameters
    "find": ("what", "place"), "order": ("thing", "amount"), "note": ("text", "day"), "send": ("to", "message"),
    "compare": ("first", "second"), "plan": ("start", "steps", "goal"),
}  # fmt: skip
_ATTRIBUTES = (("colour", "age", "owner"), ("颜色", "年龄", "主人"))


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
        question = {"role": "user", "content": self.question}
        return {
            "conversations": [_system(self.tools), question, {"role": "assistant", "content": ""}],
            "reference": self.case.answer,
            "calls": len(self.case.steps),
            "kind": self.kind,
            "state": dict(self.case.state),
            "new_wording": self.new_wording,
        }

    @property
    def used(self) -> tuple[str, ...]:
        """The tools that it takes."""
        return tuple(dict.fromkeys(step.tool for step in self.case.steps))

    @property
    def recalled(self) -> set[str]:
        """The names that its calls look up in the memory."""
        return {str(step.arguments["name"]) for step in self.case.steps if step.tool == "recall"}

    def conversation(self, slip: str | None = None) -> dict[str, Any]:
        """The task as a conversation row: solved, or with the mistake `slip`."""
        return {"conversations": [_system(self.tools), *self.messages(slip)]}

    def messages(self, slip: str | None = None) -> list[dict[str, Any]]:
        """The question and what follows."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": self.question}]
        steps = list(self.case.steps)
        if slip == _GUESS:
            steps.clear()
        elif slip == _BROKEN:
            messages += _broken(steps[0])
            steps.clear()
        elif slip == _STOP:
            steps.pop()
        for step in steps:
            messages += [_called(step), {"role": "tool", "content": step.result}]
        answer = self.case.answer if slip is None else _shifted(self.case.answer)
        return [*messages, self._answer(answer)]

    def _answer(self, answer: str) -> dict[str, Any]:
        text = f"答案是{answer}。" if self.chinese else f"The answer is {answer}."
        return {"role": "assistant", "content": text}


@cache
def tasks(few_wordings: bool = False) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """(training, held-out), each sorted by a hash of the question. few_wordings: training tasks have the SHARED
    wordings alone."""
    train: dict[str, Task] = {}
    heldout: dict[str, Task] = {}
    for kind in map(_with_few_wordings, KINDS) if few_wordings else KINDS:
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
    train, heldout = ([_together(group) for group in _groups(part)] for part in tasks(few_wordings=True))
    train = shuffled(train + [_copying(number) for number in range(_COPIES)])
    return (
        _written("weak-agent-train", train, cache_dir, console),
        _written("weak-agent-heldout", heldout, cache_dir, console),
    )


def _with_few_wordings(kind: Kind) -> Kind:
    english, chinese = ((*wordings[:SHARED], wordings[-1]) for wordings in (kind.english, kind.chinese))
    return replace(kind, english=english, chinese=chinese)


def _add(
    train: dict[str, Task], heldout: dict[str, Task], kind: Kind, case: TaskCase, chinese: bool, number: int
) -> None:
    wordings = kind.chinese if chinese else kind.english
    held = _number(f"{kind.name} {case.words} {case.answer}") % _HELD_OUT == 0
    new = held and number % 2 == 0
    wording = wordings[-1] if new else wordings[number % (SHARED if held else len(wordings) - 1)]
    question = wording.format(*case.words)
    offered = _offered([step.tool for step in case.steps], question)
    task = Task(kind.name, chinese, question, case, offered, new)
    (heldout if held else train).setdefault(f"{question} {case.answer}", task)


def _offered(used: Sequence[str], key: str) -> tuple[str, ...]:
    """The tools `used` and another one, in an order that depends on `key`."""
    others = [tool.name for tool in builtin_tools() if tool.name not in used]
    offered = [*dict.fromkeys(used), others[_number(key) % len(others)]]
    return tuple(sorted(offered, key=lambda name: _number(key + name)))


def _groups(part: Sequence[Task]) -> list[list[Task]]:
    """The tasks in groups of at most _TOGETHER that take at most _TOOLS_TOGETHER tools, and recall each name once."""
    groups: list[list[Task]] = []
    unfilled: list[list[Task]] = []
    for task in part:
        for group in unfilled:
            if len({*task.used}.union(*(other.used for other in group))) <= _TOOLS_TOGETHER and not any(
                task.recalled & other.recalled for other in group
            ):
                break
        else:
            group = []
            groups.append(group)
            unfilled.append(group)
        group.append(task)
        if len(group) == _TOGETHER:
            unfilled.remove(group)
    return groups


def _together(group: Sequence[Task]) -> dict[str, Any]:
    """A conversation row of a weak agent, in which it is given all these tasks."""
    tools = _offered([name for task in group for name in task.used], group[0].question)
    messages = [message for task in group for message in task.messages(_slip(task))]
    return {"conversations": [_system(tools), *messages]}


def _copying(number: int) -> dict[str, Any]:
    """A conversation row in which names, numbers and dates are repeated as they are, as JSON, or in calls."""
    random, chinese = Random(f"copy {number}"), number % 2
    form = number // 2 % 3
    if form == 2:
        return {"conversations": [m for _ in range(_DICTATED) for m in _dictated(random, chinese)]}
    items = [_anything(random, chinese) for _ in range(random.randint(3, 8))]
    plain = ("、" if chinese else ", ").join(items)
    if form == 0:
        return {"conversations": exchange(("重复：" if chinese else "Repeat: ") + plain, plain)}
    question = ("写成JSON列表：" if chinese else "Write as a JSON list: ") + plain
    return {"conversations": exchange(question, json.dumps(items, ensure_ascii=False))}


def _dictated(random: Random, chinese: int) -> list[dict[str, Any]]:
    """A call of a made-up tool that the user dictates, and the call."""
    tool = random.choice(list(_MADE_UP))
    arguments = {name: _argument(random, chinese) for name in _MADE_UP[tool]}
    words = ("，" if chinese else ", ").join(f"{name} {value}" for name, value in arguments.items())
    question = f"调用{tool}：{words}" if chinese else f"Call {tool}: {words}"
    call = {"name": tool, "arguments": arguments}
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def _argument(random: Random, chinese: int) -> Any:
    """A number, two numbers with a sign between them, a date, or a name, which may stand in a phrase."""
    name = random.choice(_names(chinese))
    phrase = f"{name}的{random.choice(_ATTRIBUTES[1])}" if chinese else f"{random.choice(_ATTRIBUTES[0])} of {name}"
    term = f"{random.randint(1, 999)}{random.choice('+-*')}{random.randint(1, 99)}"
    return random.choice((random.randint(1, 999), term, random_day(random), name, name, phrase, phrase))


def _anything(random: Random, chinese: int) -> str:
    """A name, twice as often as a number or a date."""
    kinds = (lambda: random.choice(_names(chinese)), lambda: str(random.randint(1, 9999)), lambda: random_day(random))
    return kinds[random.choice((0, 0, 1, 2))]()


@cache
def _names(chinese: int) -> tuple[str, ...]:
    rows = (*zip(ELEMENTS, ELEMENTS_ZH, strict=True), *MOUNTAINS, *RIVERS, *GOODS, *NAMES)
    return tuple(str(row[chinese]) for row in rows)


def _system(tools: Sequence[str]) -> dict[str, Any]:
    schemas = by_name(builtin_tools())
    return {"role": "system", "content": "", "tools": [schemas[name].schema for name in tools]}


def _ordered(unordered: dict[str, Task]) -> tuple[Task, ...]:
    return tuple(sorted(unordered.values(), key=lambda task: _number(task.question)))


def _slip(task: Task) -> str | None:
    slip = SLIPS[_number("slip " + task.question) % len(SLIPS)]
    return _GUESS if slip == _STOP and len(task.case.steps) == 1 else slip


def _broken(step: SolutionStep) -> list[dict[str, Any]]:
    """A call that is not JSON, and what the model is told."""
    written = f"{OPEN}\n{step.tool} {json.dumps(dict(step.arguments), ensure_ascii=False)}\n{CLOSE}"
    (call,) = read_calls(written, {})
    return [{"role": "assistant", "content": written}, {"role": "tool", "content": call.error}]


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
