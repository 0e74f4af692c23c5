"""Built-in problems with answers that can be checked: arithmetic for rewards, and problems with written reasoning.

Arithmetic is for reinforcement learning: sums and differences of a number below 100 and a digit. The training
conversations are weak on purpose: one answer in ten is right, the others are off by one or by ten, independently of the
question. A model trained on them gives answers spread around the right number: nano solves a third of the held-out
problems when it samples and four fifths greedily, so rewards mostly teach it to prefer the answers that it already
finds likeliest. No held-out problem occurs in a training file.

Problems with reasoning are for train/reason.py: sums, comparisons, counting and units, in English and Chinese. A
held-out problem has numbers, words or units that no training problem of its kind and language combines. The training
part also repeats some built-in conversations, which are answered without reasoning.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from minimind.data.builtin import Conversation, as_rows, exchange, shuffled, write_parts
from minimind.data.builtin.chat import conversations

NAME = "builtin:arithmetic"  # its name for --data
SLIPS = (0, 1, 1, 1, 1, -1, -1, -1, -1, 10)  # each is added to the right answer once
_ARITHMETIC_HELD_OUT = 8  # hold out one problem in this many


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
    size = len(rows) // _ARITHMETIC_HELD_OUT
    return rows[size:], rows[:size]


def _parts() -> dict[str, list[Problem]]:
    return dict(zip(("train", "heldout"), problems(), strict=True))


def _weak(problem: Problem) -> list[dict[str, Any]]:
    """A conversation for each of SLIPS; a negative answer loses its sign."""
    return [{"conversations": exchange(problem.question, str(abs(problem.answer + slip)))} for slip in SLIPS]


def _prompt(problem: Problem) -> dict[str, Any]:
    return {"conversations": exchange(problem.question, ""), "reference": str(problem.answer)}


class WorkedProblem(NamedTuple):
    question: str
    reasoning: str
    answer: str


_HELD_OUT = 24  # of each kind and language
_TRAINED = 400  # of each kind and language, at most
_REPLAYED, _KEPT = 1000, 64  # built-in conversations to train on again, and to hold out
_SUMS = ("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?")
_SUMS_ZH = ("{}加{}等于多少？", "计算{}+{}。", "{}与{}的和是多少？")
_WORDS = ["cat", "dog", "sun", "map", "pen", "cup", "box", "hat", "car", "key", "bed", "egg"]
_WORDS_ZH = "猫狗鸟鱼山水火木花草星月"
_UNITS = (("hours", "hour", "minutes", 60), ("days", "day", "hours", 24), ("weeks", "week", "days", 7),
          ("meters", "meter", "centimeters", 100), ("kilograms", "kilogram", "grams", 1000),
          ("minutes", "minute", "seconds", 60))  # fmt: skip
_UNITS_ZH = (("小时", "分钟", 60), ("天", "小时", 24), ("周", "天", 7), ("米", "厘米", 100), ("千克", "克", 1000),
             ("分钟", "秒", 60))  # fmt: skip
_MOST = 40  # units to convert


def builtin_reasoning(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """(training, held-out): paths of .jsonl files, as `write_parts` writes them."""
    parts = dict(zip(("train", "heldout"), map(as_rows, reasoning()), strict=True))
    train, heldout = write_parts("reasoning-{hash}-{part}", "reasoning", parts, cache_dir, console)
    return train, heldout


def reasoning() -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations, each in the order of a hash of their text."""
    before, kept = conversations()
    train, heldout = before[:_REPLAYED], kept[:_KEPT]
    for chinese in (False, True):
        for kind in (_sums, _comparisons, _counts, _conversions):
            once = {worked.question: worked for worked in kind(chinese)}
            rows = [_conversation(worked) for worked in shuffled(list(once.values()))]
            heldout, train = heldout + rows[:_HELD_OUT], train + rows[_HELD_OUT : _HELD_OUT + _TRAINED]
    return shuffled(train), shuffled(heldout)


def _sums(chinese: bool) -> Iterator[WorkedProblem]:
    """Sums, tens and ones apart. Each pair of numbers occurs in one wording."""
    for a in range(11, 60):
        for b in range(11, 60):
            wording = (_SUMS_ZH if chinese else _SUMS)[_number(a, b) % 3]
            tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
            steps = f"{a // 10 * 10}+{b // 10 * 10}={tens}; {a % 10}+{b % 10}={ones}; {tens}+{ones}={a + b}"
            yield WorkedProblem(wording.format(a, b), steps, str(a + b))


def _comparisons(chinese: bool) -> Iterator[WorkedProblem]:
    """Comparisons by the tens, or by the ones if the tens are equal."""
    for a in range(11, 100):
        for b in range(11, 100):
            if a == b:
                continue
            larger = _number(a, b) % 2 == 0
            place, x, y = ("tens", a // 10, b // 10) if a // 10 != b // 10 else ("ones", a % 10, b % 10)
            answer = max(a, b) if larger else min(a, b)
            if chinese:
                word, place = "大" if larger else "小", "十位" if place == "tens" else "个位"
                yield WorkedProblem(f"{a}和{b}哪个更{word}？", f"看{place}：{x}和{y}，{answer}更{word}。", f"{answer}")
            else:
                word = "larger" if larger else "smaller"
                steps = f"Look at the {place}: {x} and {y}, so {answer} is {word}."
                yield WorkedProblem(f"Which is {word}, {a} or {b}?", steps, f"{answer}")


def _counts(chinese: bool) -> Iterator[WorkedProblem]:
    """Lists of 2 to 9 words, counted one by one."""
    words = _WORDS_ZH if chinese else _WORDS
    for i in range(2 * _TRAINED):
        picked = [words[_number(i, j) % len(words)] for j in range(2 + _number(i) % 8)]
        numbered = [f"{word} {n}" for n, word in enumerate(picked, 1)]
        if chinese:
            yield WorkedProblem(f"数一数：{'、'.join(picked)}。一共几个？", "，".join(numbered), f"{len(picked)}个")
        else:
            yield WorkedProblem(f"How many words are here: {' '.join(picked)}?", ", ".join(numbered), f"{len(picked)}")


def _conversions(chinese: bool) -> Iterator[WorkedProblem]:
    """Conversions to a smaller unit."""
    for n in range(2, _MOST + 1):
        if chinese:
            for unit, part, size in _UNITS_ZH:
                steps = f"1{unit}是{size}{part}，{n}*{size}={n * size}。"
                yield WorkedProblem(f"{n}{unit}是多少{part}？", steps, f"{n * size}{part}")
        else:
            for plural, unit, part, size in _UNITS:
                steps = f"1 {unit} is {size} {part}; {n}*{size}={n * size}"
                yield WorkedProblem(f"How many {part} are {n} {plural}?", steps, f"{n * size} {part}")


def _conversation(worked: WorkedProblem) -> Conversation:
    return [
        {"role": "user", "content": worked.question},
        {"role": "assistant", "reasoning_content": worked.reasoning, "content": worked.answer},
    ]


def _number(*values: int) -> int:
    """A hash of `values` from 0 to 255, evenly spread."""
    return blake2b(repr(values).encode(), digest_size=1).digest()[0]
