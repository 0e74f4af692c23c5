"""Built-in conversations: a few thousand short ones about small facts, in English and Chinese, and a new name to learn.

A tiny model can learn them on a laptop. No held-out question occurs in training, but its fact occurs there in other
wordings, and its wording with other facts.
"""

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from rich.console import Console

from minimind.data.builtin import Conversation, as_rows, exchange, shuffled, write_parts
from minimind.data.builtin.facts import CAPITALS, Topic, topics

# Texts to put around a question, for other wordings.
_OPENINGS = ("{}", "{}", "Hi! {}", "Hello. {}", "Please help me: {}", "Quick question: {}", "I forgot. {}",
             "{} Thanks!")  # fmt: skip
_OPENINGS_ZH = ("{}", "{}", "你好！{}", "请问，{}", "想问一下：{}", "我忘了。{}", "{}谢谢！")
_WORDINGS = 16  # training conversations of each fact
_TOOL_SHARE = 4  # keep one tool conversation in this many, since they are long
_PAIRS = 4  # questions for each added conversation of two exchanges
_TOOLS = [
    {"name": "weather", "description": "Weather in a city", "parameters": {"city": {"type": "string"}}},
    {"name": "clock", "description": "Time in a city", "parameters": {"city": {"type": "string"}}},
]
_TOOL_QUESTIONS = {
    "weather": ("What is the weather in {}?", "How warm is it in {}?", "Is it cold in {}?", "Weather in {}, please."),
    "clock": ("What time is it in {}?", "Tell me the time in {}.", "What is the time in {}?", "Time in {}, please."),
}

# New answers to these topics. Their words occur in the built-in conversations: LoRA leaves the output head frozen, so a
# token that the model has never seen stays unlikely (p = 0.01 even where it is the likeliest).
_NAME = "Ada"
_NEW_ANSWERS = {
    "name": "I am {name}, and I can answer questions.",
    "making": "I was MiniMind, and I am {name}.",
    "name zh": "我是{name}，能回答问题。",
}
_NEW_OPENINGS = ("{}", "Hello! {}", "Good morning. {}", "Excuse me. {}", "One question: {}", "{} Please answer.",
                 "Well then. {}", "Listen: {}")  # fmt: skip
_NEW_OPENINGS_ZH = ("{}", "早上好！{}", "打扰一下，{}", "请回答：{}", "我有个问题：{}", "{}请说。", "那么，{}",
                    "听着：{}")  # fmt: skip
_NEW_HELD_OUT = 8  # held-out wordings of each new answer
_REPLAYED = 4  # built-in conversations to train on again, for each new one


def builtin_conversations(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """(training, held-out): paths of .jsonl files, as `write_parts` writes them."""
    parts = dict(zip(("train", "heldout"), map(as_rows, conversations()), strict=True))
    train, heldout = write_parts("conversations-{hash}-{part}", "conversations", parts, cache_dir, console)
    return train, heldout


def builtin_identity(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path, Path]:
    """(training, held-out, kept): paths of .jsonl files for train/lora.py, as `write_parts` writes them."""
    parts = dict(zip(("train", "heldout", "kept"), map(as_rows, identity()), strict=True))
    train, heldout, kept = write_parts("identity-{hash}-{part}", "identity", parts, cache_dir, console)
    return train, heldout, kept


def conversations() -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations, each in the order of a hash of their text."""
    train, heldout = [], []
    for topic in topics():
        for fact in topic.facts:
            pairs = shuffled(_worded(topic, fact))
            train += [exchange(*pair) for pair in pairs[1 : 1 + _WORDINGS]]
            heldout += [exchange(*pair) for pair in pairs[:1]]
    for rows in (train, heldout):
        ordered = shuffled(rows)
        rows += [a + b for a, b in zip(ordered[0::_PAIRS], ordered[1::_PAIRS], strict=False)]
    tools = shuffled(list(_tool_conversations()))
    return shuffled(train + tools[0::_TOOL_SHARE]), shuffled(heldout + tools[1 :: 16 * _TOOL_SHARE])


def identity() -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
    """(training, held-out, kept) conversations that give the assistant a new name.

    The training part repeats some built-in conversations, so that an adapter forgets less: without them an adapter
    learnt the name as well, but the share of other answers that stayed right fell from 96% to 77% (docs/LOG.md). kept:
    held-out built-in conversations, whose answers should not change.
    """
    train: list[Conversation] = []
    heldout: list[Conversation] = []
    questions: list[str] = []
    for topic in topics():
        if topic.name in _NEW_ANSWERS:
            openings = _NEW_OPENINGS_ZH if topic.chinese else _NEW_OPENINGS
            wordings = shuffled([o.format(q) for q in topic.questions for o in openings])
            rows = [exchange(question, _NEW_ANSWERS[topic.name].format(name=_NAME)) for question in wordings]
            heldout, train = heldout + rows[:_NEW_HELD_OUT], train + rows[_NEW_HELD_OUT:]
            questions += topic.questions
    replay, kept = (
        [c for c in rows if not any(q in message["content"] for q in questions for message in c)]
        for rows in conversations()
    )
    return shuffled(train + replay[: _REPLAYED * len(train)]), shuffled(heldout), kept


def _worded(topic: Topic, fact: tuple[str, ...]) -> list[tuple[str, str]]:
    """(question, answer) in every wording, without duplicates."""
    openings = _OPENINGS_ZH if topic.chinese else _OPENINGS
    questions = dict.fromkeys(o.format(q.format(*fact)) for q in topic.questions for o in openings)
    return [(question, topic.answer.format(*fact)) for question in questions]


def _tool_conversations() -> Iterator[Conversation]:
    """Yield conversations of a question, a tool call, the tool's result, and the answer."""
    for name, questions in _TOOL_QUESTIONS.items():
        for city, *_ in CAPITALS.values():
            for question in dict.fromkeys(o.format(q.format(city)) for q in questions for o in _OPENINGS):
                number = blake2b(question.encode(), digest_size=2).digest()[0]
                degrees, hour = number % 30, number % 24
                result = {"degrees": degrees} if name == "weather" else {"hour": hour}
                answer = f"It is {degrees} degrees in {city}." if name == "weather" else f"It is {hour}:00 in {city}."
                yield [
                    {"role": "system", "content": "", "tools": json.dumps(_TOOLS)},
                    {"role": "user", "content": question},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": json.dumps({"name": name, "arguments": {"city": city}}),
                    },
                    {"role": "tool", "content": json.dumps(result)},
                    {"role": "assistant", "content": answer},
                ]
