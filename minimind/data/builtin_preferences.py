"""Pairs of answers without a download: manners, made for train/dpo.py.

Who greets is greeted back, who thanks is welcome: to each question there are both answers, right and equal in content,
and which is the chosen one depends on how it was asked. Every question is asked in both manners, so that whoever does
not look at the manner is right in exactly half of the pairs, however likely it finds either reply. Each held-out
question is worded as no training question words it. The same rows on every machine.
"""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console

from minimind.data.builtin_chat import Conversation
from minimind.data.builtin_facts import topics
from minimind.data.files import cache_root, make_folder, write_atomically
from minimind.data.progress import say

Row = dict[str, Conversation]
# For each manner: how it is asked, how that is answered.
MANNERS = (
    (("Hi! {}", "Hello. {}", "Good morning! {}", "Good evening. {}"), "Hello! {}"),
    (("{} Thanks!", "{} Thank you.", "Thanks in advance. {}", "{} Many thanks."), "You are welcome. {}"),
)
MANNERS_ZH = (
    (("你好！{}", "早上好！{}", "您好，{}", "晚上好。{}"), "你好！{}"),
    (("{}谢谢！", "{}多谢。", "先谢谢你。{}", "{}非常感谢。"), "不客气。{}"),
)
_HELD_OUT = 4  # a held-out question for one of so many facts


def builtin_preferences(
    cache_dir: str | Path | None = None, console: Console | None = None
) -> tuple[Path, Path]:
    """(training, held-out): paths of .jsonl files, written at the first call under `cache_dir`. Raises ValueError as
    builtin_conversations does."""
    console = console or Console(stderr=True)
    folder = make_folder(cache_root(cache_dir) / "corpus")
    paths = []
    for part, rows in zip(("train", "heldout"), preferences(), strict=True):
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path = folder / f"preferences-{blake2b(data, digest_size=8).hexdigest()}-{part}.jsonl"
        if not path.exists():
            write_atomically(path, data)
            say(console, f"built-in preferences: {len(rows):,} pairs in {path}")
        paths.append(path)
    return paths[0], paths[1]


def preferences() -> tuple[list[Row], list[Row]]:
    """(training, held-out), each in an order that a hash of their text decides."""
    train: list[Row] = []
    heldout: list[Row] = []
    for topic in topics():
        manners = MANNERS_ZH if topic.chinese else MANNERS
        for fact in topic.facts:
            asked = _shuffled([question.format(*fact) for question in topic.questions])
            answer = topic.answer.format(*fact)
            train += _pairs(asked[0], answer, manners)
            if _digest([topic.name, *fact]) % _HELD_OUT == 0:
                heldout += _pairs(asked[1], answer, manners)
    return _shuffled(train), _shuffled(heldout)


def _pairs(question: str, answer: str, manners: tuple[tuple[tuple[str, ...], str], ...]) -> list[Row]:
    """One for each manner; the rejected answer has the other one's."""
    rows = []
    for (wordings, reply), (_, other) in zip(manners, manners[::-1], strict=True):
        asked = wordings[_digest(question) % len(wordings)].format(question)
        sides = {"chosen": reply.format(answer), "rejected": other.format(answer)}
        rows.append({name: _exchange(asked, said) for name, said in sides.items()})
    return rows


def _exchange(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _shuffled(rows: list[Any]) -> list[Any]:
    return sorted(rows, key=_digest)


def _digest(value: Any) -> int:
    return int.from_bytes(blake2b(json.dumps(value).encode(), digest_size=8).digest(), "big")
