"""Sums and differences of a number below a hundred and a digit: a task whose answers a program can check.

For reinforcement learning without a download. The conversations to learn from are weak on purpose: one answer in ten
is right, the others slip by one or by ten in ways that do not depend on the question. Who learns from them learns to
calculate, with a blur around the right number: nano's sampled answers are right for a third of the held-out problems,
its likeliest ones for four fifths, so that much of what rewards teach it is to trust what it knows. Held-out problems
occur neither there nor among those that rewards are given for. The same rows on every machine; nothing here is random.
"""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from minimind.utils.files import cache_root, make_folder, write_atomically
from minimind.utils.progress import say

NAME = "builtin:arithmetic"  # what --data calls it
SLIPS = (0, 1, 1, 1, 1, -1, -1, -1, -1, 10)  # one of them is added to the right answer
_ANSWERS = 10  # weak ones to each problem: every slip once
_HELD_OUT = 8  # one problem of so many


class Problem(NamedTuple):
    question: str
    answer: int


def weak_arithmetic(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """(training, held-out) conversations with weak answers, as .jsonl files, written at the first call under
    `cache_dir`. Raises ValueError as builtin_conversations does."""
    train, heldout = problems()
    return (
        _written("weak-arithmetic-train", [row for p in train for row in _weak(p, _ANSWERS)], cache_dir, console),
        _written("weak-arithmetic-heldout", [row for p in heldout for row in _weak(p, 10)], cache_dir, console),
    )


def arithmetic_prompts(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """(training, held-out) prompts, each with its right answer as "reference"; otherwise as `weak_arithmetic`."""
    train, heldout = problems()
    return (
        _written("arithmetic-train", [_prompt(p) for p in train], cache_dir, console),
        _written("arithmetic-heldout", [_prompt(p) for p in heldout], cache_dir, console),
    )


def problems() -> tuple[list[Problem], list[Problem]]:
    """(training, held-out), each in an order that a hash of the question decides."""
    found = []
    for a in range(100):
        for b in range(1, 10):
            found.append(Problem(f"{a}+{b}=?", a + b))
            if a >= b:
                found.append(Problem(f"{a}-{b}=?", a - b))
    found.sort(key=lambda problem: _hash(problem.question))
    size = len(found) // _HELD_OUT
    return found[size:], found[:size]


def _weak(problem: Problem, count: int) -> list[dict[str, Any]]:
    """`count` conversations, each slip as often as in SLIPS; no answer is below 0."""
    slips = (SLIPS[i % len(SLIPS)] for i in range(count))
    return [_conversation(problem.question, str(abs(problem.answer + slip))) for slip in slips]


def _prompt(problem: Problem) -> dict[str, Any]:
    return _conversation(problem.question, "") | {"reference": str(problem.answer)}


def _conversation(question: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": messages}


def _written(name: str, rows: list[dict[str, Any]], cache_dir: str | Path | None, console: Console | None) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    folder = make_folder(cache_root(cache_dir) / "corpus")
    path = folder / f"{name}-{_hash(data).hex()}.jsonl"
    if not path.exists():
        write_atomically(path, data)
        say(console or Console(stderr=True), f"built-in arithmetic: {len(rows):,} rows in {path}")
    return path


def _hash(text: str | bytes) -> bytes:
    return blake2b(text.encode() if isinstance(text, str) else text, digest_size=8).digest()
