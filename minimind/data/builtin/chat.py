"""Conversations without a download: a few thousand short ones, in English and Chinese, about small facts.

Made to be learnt by a tiny model on a laptop, and to be measured honestly: each held-out question is worded as no
training conversation words it, though its fact and its wording were each seen, with others. The same rows on every
machine; nothing here is random.
"""

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console

from minimind.data.builtin.facts import CAPITALS, Topic, topics
from minimind.utils.files import cache_root, make_folder, write_atomically
from minimind.utils.progress import say

Message = dict[str, Any]
Conversation = list[Message]
# Around a question, so that more than its own words matter.
_OPENINGS = (
    "{}",
    "{}",
    "Hi! {}",
    "Hello. {}",
    "Please help me: {}",
    "Quick question: {}",
    "I forgot. {}",
    "{} Thanks!",
)
_OPENINGS_ZH = ("{}", "{}", "你好！{}", "请问，{}", "想问一下：{}", "我忘了。{}", "{}谢谢！")
_WORDINGS = 16  # of each fact, to train on
_TOOL_SHARE = 4  # one of so many worded tool conversations, as each is long
_PAIRS = 4  # one conversation of two exchanges for so many questions
_TOOLS = [
    {"name": "weather", "description": "Weather in a city", "parameters": {"city": {"type": "string"}}},
    {"name": "clock", "description": "Time in a city", "parameters": {"city": {"type": "string"}}},
]
_TOOL_QUESTIONS = {
    "weather": ("What is the weather in {}?", "How warm is it in {}?", "Is it cold in {}?", "Weather in {}, please."),
    "clock": ("What time is it in {}?", "Tell me the time in {}.", "What is the time in {}?", "Time in {}, please."),
}


def builtin_conversations(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """(training, held-out): paths of .jsonl files, written at the first call under `cache_dir`, which defaults to
    $MINIMIND_CACHE, else ~/.cache/minimind. Raises ValueError when the folder cannot be written."""
    console = console or Console(stderr=True)
    folder = make_folder(cache_root(cache_dir) / "corpus")
    paths = []
    for name, rows in zip(("train", "heldout"), conversations(), strict=True):
        data = "".join(json.dumps({"conversations": c}, ensure_ascii=False) + "\n" for c in rows).encode()
        path = folder / f"conversations-{blake2b(data, digest_size=8).hexdigest()}-{name}.jsonl"
        if not path.exists():
            write_atomically(path, data)
            say(console, f"built-in conversations: {len(rows):,} rows in {path}")
        paths.append(path)
    return paths[0], paths[1]


def conversations() -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out), each in an order that a hash of their text decides."""
    train, heldout = [], []
    for topic in topics():
        for fact in topic.facts:
            worded = _shuffled(_worded(topic, fact))
            train += [_exchange(*pair) for pair in worded[1 : 1 + _WORDINGS]]
            heldout += [_exchange(*pair) for pair in worded[:1]]
    for rows in (train, heldout):
        ordered = _shuffled(rows)
        rows += [a + b for a, b in zip(ordered[0::_PAIRS], ordered[1::_PAIRS], strict=False)]
    tools = _shuffled(list(_tool_conversations()))
    return _shuffled(train + tools[0::_TOOL_SHARE]), _shuffled(heldout + tools[1 :: 16 * _TOOL_SHARE])


def _worded(topic: Topic, fact: tuple[str, ...]) -> list[tuple[str, str]]:
    """(question, answer) in every wording, without repetition."""
    openings = _OPENINGS_ZH if topic.chinese else _OPENINGS
    questions = dict.fromkeys(o.format(q.format(*fact)) for q in topic.questions for o in openings)
    return [(question, topic.answer.format(*fact)) for question in questions]


def _exchange(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _tool_conversations() -> Iterator[Conversation]:
    """A question, a call, what the tool says, and the answer made of it."""
    for name, questions in _TOOL_QUESTIONS.items():
        for city, *_ in CAPITALS.values():
            for asked in dict.fromkeys(o.format(q.format(city)) for q in questions for o in _OPENINGS):
                number = blake2b(asked.encode(), digest_size=2).digest()[0]
                degrees, hour = number % 30, number % 24
                result = {"degrees": degrees} if name == "weather" else {"hour": hour}
                said = f"It is {degrees} degrees in {city}." if name == "weather" else f"It is {hour}:00 in {city}."
                yield [
                    {"role": "system", "content": "", "tools": json.dumps(_TOOLS)},
                    {"role": "user", "content": asked},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": json.dumps({"name": name, "arguments": {"city": city}}),
                    },
                    {"role": "tool", "content": json.dumps(result)},
                    {"role": "assistant", "content": said},
                ]


def _shuffled(rows: list[Any]) -> list[Any]:
    """In the order of a hash of each row's text."""
    return sorted(rows, key=lambda row: blake2b(json.dumps(row).encode(), digest_size=8).digest())
