"""Pairs of answers without a download: manners, made for train/dpo.py and train/reward.py.

Who greets is told that it is nice to meet them, who thanks that they are welcome, others the answer alone. The content
is right and the same in all three; which of two answers is the chosen one depends on how the question was asked. Of any
two manners each is chosen before the other equally often, so that whoever does not look at the question is right in
half of the pairs, however likely it finds an answer. The manner stands behind the content: the content then has the
same words before it in both answers, and no objective can win by making it unlikely in one of them (docs/LOG.md). Each
held-out question is worded as no training question words it. The same rows on every machine.
"""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console

from minimind.data.builtin.chat import Conversation
from minimind.data.builtin.facts import topics
from minimind.utils.files import cache_root, make_folder, write_atomically
from minimind.utils.progress import say

Row = dict[str, Conversation]
# For each manner: how it is asked, how that is answered.
MANNERS = (
    (("Hi! {}", "Hello. {}", "Good morning! {}", "Good evening. {}"), "{} Nice to meet you!"),
    (("{} Thanks!", "{} Thank you.", "Thanks in advance. {}", "{} Many thanks."), "{} You are welcome."),
    (("{}", "Please help me: {}", "Quick question: {}", "I forgot. {}"), "{}"),
)
MANNERS_ZH = (
    (("你好！{}", "早上好！{}", "您好，{}", "晚上好。{}"), "{}很高兴认识你！"),
    (("{}谢谢！", "{}多谢。", "先谢谢你。{}", "{}非常感谢。"), "{}不客气。"),
    (("{}", "请问，{}", "想问一下：{}", "我忘了。{}"), "{}"),
)
_HELD_OUT = 4  # a held-out question for one of so many facts


def builtin_preferences(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
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
            train += _pairs(asked[0], answer, manners, turn=len(train))
            if _digest([topic.name, *fact]) % _HELD_OUT == 0:
                heldout += _pairs(asked[1], answer, manners, turn=len(heldout))
    return _shuffled(train), _shuffled(heldout)


def _pairs(question: str, answer: str, manners: tuple[tuple[tuple[str, ...], str], ...], turn: int) -> list[Row]:
    """One for each manner; the rejected answer has the next one's or, at odd turns, that of the one before."""
    rows, shift = [], 1 if turn % 2 else -1
    for i, (wordings, reply) in enumerate(manners):
        asked = wordings[_digest(question) % len(wordings)].format(question)
        other = manners[(i + shift) % len(manners)][1]
        sides = {"chosen": reply.format(answer), "rejected": other.format(answer)}
        rows.append({name: _exchange(asked, said) for name, said in sides.items()})
    return rows


def _exchange(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _shuffled(rows: list[Any]) -> list[Any]:
    return sorted(rows, key=_digest)


def _digest(value: Any) -> int:
    return int.from_bytes(blake2b(json.dumps(value).encode(), digest_size=8).digest(), "big")
