"""Built-in arithmetic: sums and differences of a number below 100 and a digit, for reinforcement learning.

The training conversations are weak on purpose: one answer in ten is right, the others are off by one or by ten,
independently of the question. A model trained on them gives answers spread around the right number: nano solves a third
of the held-out problems when it samples and four fifths greedily, so rewards mostly teach it to prefer the answers
that it already finds likeliest. No held-out problem occurs in a training file.
"""

from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from minimind.data.builtin import exchange, write_parts

NAME = "builtin:arithmetic"  # its name for --data
SLIPS = (0, 1, 1, 1, 1, -1, -1, -1, -1, 10)  # each is added to the right answer once
_HELD_OUT = 8  # hold out one problem in this many


class Problem(NamedTuple):
    question: str
    answer: int


def weak_arithmetic(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """(training, held-out) conversations with weak answers: paths of .jsonl files, as `write_parts` writes them."""
    parts = {name: [row for p in part for row in _weak(p)] for name, part in _parts().items()}
    train, heldout = write_parts("weak-arithmetic-{part}-{hash}", "arithmetic", parts, cache_dir, console)
    return train, heldout


def arithmetic_prompts(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """(training, held-out) prompts, each with its right answer as "reference"; otherwise like `weak_arithmetic`."""
    parts = {name: [_prompt(p) for p in part] for name, part in _parts().items()}
    train, heldout = write_parts("arithmetic-{part}-{hash}", "arithmetic", parts, cache_dir, console)
    return train, heldout


def problems() -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems, each in the order of a hash of the question."""
    rows = []
    for a in range(100):
        for b in range(1, 10):
            rows.append(Problem(f"{a}+{b}=?", a + b))
            if a >= b:
                rows.append(Problem(f"{a}-{b}=?", a - b))
    rows.sort(key=lambda problem: blake2b(problem.question.encode(), digest_size=8).digest())
    size = len(rows) // _HELD_OUT
    return rows[size:], rows[:size]


def _parts() -> dict[str, list[Problem]]:
    return dict(zip(("train", "heldout"), problems(), strict=True))


def _weak(problem: Problem) -> list[dict[str, Any]]:
    """A conversation for each of SLIPS; a negative answer loses its sign."""
    return [{"conversations": exchange(problem.question, str(abs(problem.answer + slip)))} for slip in SLIPS]


def _prompt(problem: Problem) -> dict[str, Any]:
    return {"conversations": exchange(problem.question, ""), "reference": str(problem.answer)}
