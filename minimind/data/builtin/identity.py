"""Conversations that give the assistant another name: made for train/lora.py.

Among them are some that it was taught before, so that it forgets less of the rest: with the new name alone an adapter
learnt it just as well, but the share of other answers that stayed right fell from 96% to 77% (docs/LOG.md). Each
held-out question is worded as no training conversation words it. The same rows on every machine.
"""

import json
from hashlib import blake2b
from pathlib import Path

from rich.console import Console

from minimind.data.builtin.chat import Conversation, conversations
from minimind.data.builtin.facts import topics
from minimind.utils.files import cache_root, make_folder, write_atomically
from minimind.utils.progress import say

NAME = "Ada"
# By topic of builtin_facts, whose wordings ask for it. Of words that the model was taught: the head is frozen, and a
# token it never met stays unlikely (p = 0.01 where it is the likeliest one).
_ANSWERS = {
    "name": "I am {name}, and I can answer questions.",
    "making": "I was MiniMind, and I am {name}.",
    "name zh": "我是{name}，能回答问题。",
}
_OPENINGS = ("{}", "Hello! {}", "Good morning. {}", "Excuse me. {}", "One question: {}", "{} Please answer.",
             "Well then. {}", "Listen: {}")  # fmt: skip
_OPENINGS_ZH = ("{}", "早上好！{}", "打扰一下，{}", "请回答：{}", "我有个问题：{}", "{}请说。", "那么，{}", "听着：{}")
_HELD_OUT = 8  # wordings of each answer
_REPLAYED = 4  # conversations taught before, for each new one


def builtin_identity(
    cache_dir: str | Path | None = None, console: Console | None = None, name: str = NAME
) -> tuple[Path, Path, Path]:
    """(training, held-out, kept): paths of .jsonl files, written at the first call under `cache_dir`. kept: held-out
    built-in conversations whose answers should stay as they are. Raises ValueError as builtin_conversations does."""
    console = console or Console(stderr=True)
    folder = make_folder(cache_root(cache_dir) / "corpus")
    paths = []
    for part, rows in zip(("train", "heldout", "kept"), identity(name), strict=True):
        data = "".join(json.dumps({"conversations": c}, ensure_ascii=False) + "\n" for c in rows).encode()
        path = folder / f"identity-{blake2b(data, digest_size=8).hexdigest()}-{part}.jsonl"
        if not path.exists():
            write_atomically(path, data)
            say(console, f"built-in identity: {len(rows):,} rows in {path}")
        paths.append(path)
    return paths[0], paths[1], paths[2]


def identity(name: str = NAME) -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
    """(training, held-out, kept), each in an order that a hash of their text decides."""
    train: list[Conversation] = []
    heldout: list[Conversation] = []
    asked: list[str] = []
    for topic in topics():
        if topic.name in _ANSWERS:
            openings = _OPENINGS_ZH if topic.chinese else _OPENINGS
            worded = _shuffled([o.format(q) for q in topic.questions for o in openings])
            rows = [_exchange(question, _ANSWERS[topic.name].format(name=name)) for question in worded]
            heldout, train = heldout + rows[:_HELD_OUT], train + rows[_HELD_OUT:]
            asked += topic.questions
    before, kept = (
        [c for c in rows if not any(q in message["content"] for q in asked for message in c)]
        for rows in conversations()
    )
    return _shuffled(train + before[: _REPLAYED * len(train)]), _shuffled(heldout), kept


def _exchange(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _shuffled(rows: list) -> list:
    return sorted(rows, key=lambda row: blake2b(json.dumps(row).encode(), digest_size=8).digest())
