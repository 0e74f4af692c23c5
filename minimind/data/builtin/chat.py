"""Built-in conversations and preference pairs about small facts, in English and Chinese, and a new name to learn.

A tiny model can learn the few thousand short conversations on a laptop. No held-out question occurs in training, but
its fact occurs there in other wordings, and its wording with other facts. Every topic has one form of answer and one
set of wordings, in one language, so that an answer is either right or wrong.

The preference pairs for train/dpo.py and train/reward.py are about manners. Both answers of a pair have the same, right
content. A greeting calls for "nice to meet you", thanks call for "you are welcome", any other question for the answer
alone; the chosen answer follows the wording of the question. Of any two manners, each is chosen equally often, so that
a model that ignores the question is right in half of the pairs. The manner comes after the content: the content then
has the same prefix in both answers, and no objective can win by making it unlikely in one of them (docs/LOG.md). Each
held-out question has a wording that no training question has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from rich.console import Console

from minimind.data.builtin import Conversation, as_rows, digest, exchange, shuffled, write_parts

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip
MONTH_DAYS = ("31", "28, or 29 in a leap year", "31", "30", "31", "30", "31", "31", "30", "31", "30", "31")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DIGITS_ZH = ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "十一", "十二")

CAPITALS = {
    "China": ("Beijing", "中国", "北京"), "France": ("Paris", "法国", "巴黎"),
    "Japan": ("Tokyo", "日本", "东京"), "Germany": ("Berlin", "德国", "柏林"),
    "Italy": ("Rome", "意大利", "罗马"), "Spain": ("Madrid", "西班牙", "马德里"),
    "Egypt": ("Cairo", "埃及", "开罗"), "Russia": ("Moscow", "俄罗斯", "莫斯科"),
    "Greece": ("Athens", "希腊", "雅典"), "Austria": ("Vienna", "奥地利", "维也纳"),
    "Canada": ("Ottawa", "加拿大", "渥太华"), "Cuba": ("Havana", "古巴", "哈瓦那"),
    "Norway": ("Oslo", "挪威", "奥斯陆"), "Portugal": ("Lisbon", "葡萄牙", "里斯本"),
    "Thailand": ("Bangkok", "泰国", "曼谷"), "Peru": ("Lima", "秘鲁", "利马"),
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "happy": "sad", "open": "closed", "early": "late", "high": "low",
    "light": "dark", "full": "empty", "young": "old", "wet": "dry", "hard": "soft", "near": "far", "loud": "quiet",
    "strong": "weak", "rich": "poor", "true": "false", "left": "right", "up": "down", "first": "last",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "blood": "red", "a banana": "yellow", "the sea": "blue",
    "an orange": "orange", "chocolate": "brown", "an elephant": "grey", "a violet": "purple",
}  # fmt: skip
WORDS = {
    "water": "水", "fire": "火", "mountain": "山", "sun": "太阳", "moon": "月亮", "star": "星星", "tree": "树",
    "flower": "花", "fish": "鱼", "bird": "鸟", "dog": "狗", "cat": "猫", "horse": "马", "book": "书", "door": "门",
    "hand": "手", "heart": "心", "rain": "雨", "snow": "雪", "wind": "风", "rice": "米饭", "tea": "茶", "red": "红色",
    "green": "绿色", "blue": "蓝色", "white": "白色", "black": "黑色", "friend": "朋友", "teacher": "老师",
    "school": "学校",
}  # fmt: skip
PLURALS = {
    "mouse": "mice", "child": "children", "foot": "feet", "tooth": "teeth", "goose": "geese", "man": "men",
    "woman": "women", "leaf": "leaves", "knife": "knives", "sheep": "sheep", "ox": "oxen", "person": "people",
}  # fmt: skip
YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal", "hen": "chick",
    "lion": "cub", "duck": "duckling", "goose": "gosling", "frog": "tadpole",
}  # fmt: skip
PYTHON = {
    "get the length of a list": "len(x)", "sort a list": "sorted(x)", "turn a string into an integer": "int(s)",
    "turn a number into a string": "str(n)", "read a line from the user": "input()", "print a text": "print(text)",
    "find the largest item of a list": "max(x)", "find the smallest item of a list": "min(x)",
    "add up the numbers of a list": "sum(x)", "open a file": "open(path)", "round a number": "round(n)",
    "get the type of a value": "type(x)", "count from 0 to n - 1": "range(n)",
    "append an item to a list": "x.append(item)", "split a string into words": "s.split()",
    "make a string lower case": "s.lower()", "make a string upper case": "s.upper()",
    "remove spaces around a string": "s.strip()", "get the keys of a dictionary": "d.keys()",
    "get the absolute value of a number": "abs(n)",
}  # fmt: skip


@dataclass(frozen=True)
class Topic:
    """facts: the words that fill the gaps {0}, {1}, ... of questions and answer; chinese: whether it is in Chinese."""

    name: str
    questions: tuple[str, ...]
    answer: str
    facts: Sequence[tuple[str, ...]]
    chinese: bool = False


def topics() -> list[Topic]:
    """All topics."""
    return [*_about_itself(), *_english(), *_chinese()]


def _about_itself() -> list[Topic]:
    """One topic for each fact, which only varies in wording."""

    def one(name: str, answer: str, *questions: str, chinese: bool = False) -> Topic:
        return Topic(name, questions, answer, [()], chinese)

    return [
        one("name", "I am MiniMind, a small language model.", "Who are you?", "What is your name?",
            "What should I call you?", "Introduce yourself.", "Tell me who you are.", "Are you a person?"),
        one("making", "I was trained from nothing on one computer, with the MiniMind code.", "Who made you?",
            "How were you made?", "Where do you come from?", "How did you learn to speak?", "How were you trained?"),
        one("size", "I have under three million parameters.", "How large are you?", "How big is your network?",
            "How many parameters do you have?", "What is your size?", "Are you a large model?"),
        one("use", "I can answer short questions about words, numbers, days and Python.", "What can you do?",
            "What are you good at?", "How can you help me?", "What can I ask you?", "What do you know?"),
        one("name zh", "我是MiniMind，一个小型语言模型。", "你是谁？", "你叫什么名字？", "请介绍一下你自己。",
            "我该怎么称呼你？", "告诉我你是谁。", chinese=True),
        one("use zh", "我能回答关于词语、数字和城市的简短问题。", "你能做什么？", "你会什么？", "我可以问你什么？",
            "你能帮我做什么？", "你擅长什么？", chinese=True),
    ]  # fmt: skip


def _english() -> list[Topic]:
    after = [(day, DAYS[(i + 1) % 7]) for i, day in enumerate(DAYS)]
    months = [(month, MONTHS[(i + 1) % 12]) for i, month in enumerate(MONTHS)]
    sums = [(str(a), str(b), str(a + b)) for a in range(10) for b in range(10)]
    return [
        Topic("day after", ("What day comes after {0}?", "Which day follows {0}?", "Today is {0}. What is tomorrow?",
              "What is the day after {0}?", "Name the day that comes after {0}."), "{1} comes after {0}.", after),
        Topic("day before", ("What day comes before {1}?", "Which day is just before {1}?",
              "Today is {1}. What was yesterday?", "What is the day before {1}?",
              "Name the day that comes before {1}."), "{0} comes before {1}.", after),
        Topic("month", ("What month comes after {0}?", "Which month follows {0}?", "What is the month after {0}?",
              "Name the month that comes after {0}.", "It is {0}. What is next month?"),
              "{1} comes after {0}.", months),
        Topic("month length", ("How many days are in {0}?", "How many days does {0} have?", "How long is {0}?",
              "Tell me the number of days in {0}."), "{0} has {1} days.", list(zip(MONTHS, MONTH_DAYS, strict=True))),
        Topic("sum", ("What is {0} plus {1}?", "What is {0} + {1}?", "Add {0} and {1}.", "How much is {0} plus {1}?",
              "Calculate {0} + {1}.", "What do {0} and {1} make?"), "{0} plus {1} is {2}.", sums),
        Topic("number word", ("How do you write {0} in words?", "Spell the number {0}.", "What is {0} in words?",
              "Write {0} as a word.", "What is the word for {0}?"), "{0} is {1}.",
              [(str(i), word) for i, word in enumerate(NUMBERS)]),
        Topic("opposite", ("What is the opposite of {0}?", "Give me the opposite of {0}.", "Name the opposite of {0}.",
              "Which word is the opposite of {0}?", "What is not {0}?"), "The opposite of {0} is {1}.",
              list(OPPOSITES.items())),
        Topic("colour", ("What colour is {0}?", "Which colour does {0} have?", "Tell me the colour of {0}.",
              "Name the colour of {0}.", "What is the colour of {0}?"), "It is {1}.", list(COLOURS.items())),
        Topic("capital", ("What is the capital of {0}?", "Which city is the capital of {0}?",
              "Name the capital of {0}.", "Tell me the capital of {0}.", "What is {0}'s capital?"),
              "The capital of {0} is {1}.", [(country, words[0]) for country, words in CAPITALS.items()]),
        Topic("plural", ("What is the plural of {0}?", "Give me the plural of {0}.", "Name the plural of {0}.",
              "One {0}, two what?", "How do you write more than one {0}?"), "The plural of {0} is {1}.",
              list(PLURALS.items())),
        Topic("young", ("What is a young {0} called?", "What do you call a baby {0}?", "Name the young of a {0}.",
              "What is the word for a young {0}?"), "A young {0} is a {1}.", list(YOUNG.items())),
        Topic("python", ("How do I {0} in Python?", "How can I {0} in Python?", "Which Python code lets me {0}?",
              "In Python, how do you {0}?", "Show me how to {0} in Python."), "Use `{1}`.", list(PYTHON.items())),
        Topic("to Chinese", ("How do you say {0} in Chinese?", "What is {0} in Chinese?",
              "Translate {0} into Chinese.", "What is the Chinese word for {0}?", "Write {0} in Chinese."), "{1}",
              list(WORDS.items())),
    ]  # fmt: skip


def _chinese() -> list[Topic]:
    after = [(a, DIGITS_ZH[i + 1]) for i, a in enumerate(DIGITS_ZH[:-1])]
    return [
        Topic("to English", ("“{1}”用英语怎么说？", "“{1}”的英文是什么？", "把“{1}”翻译成英语。", "请翻译：{1}",
              "“{1}”在英语里是哪个词？"), "{0}", list(WORDS.items()), True),
        Topic("capital zh", ("{0}的首都是哪里？", "哪座城市是{0}的首都？", "{0}的首都叫什么？", "请说出{0}的首都。",
              "你知道{0}的首都吗？"), "{0}的首都是{1}。", [words[1:] for words in CAPITALS.values()], True),
        Topic("number zh", ("{0}后面的数字是几？", "{0}加一等于几？", "{0}的下一个数是什么？", "比{0}大一的数是几？"),
              "{0}后面是{1}。", after, True),
    ]  # fmt: skip


# Texts to put around a question, for other wordings.
_OPENINGS = ("{}", "{}", "Hi! {}", "Hello. {}", "Please help me: {}", "Quick question: {}", "I forgot. {}",
             "{} Thanks!")  # fmt: skip
_OPENINGS_ZH = ("{}", "{}", "你好！{}", "请问，{}", "想问一下：{}", "我忘了。{}", "{}谢谢！")
_WORDINGS = 16  # training conversations of each fact
_TOOL_SHARE = 4  # keep one tool conversation in this many, since they are long
_PER_DIALOGUE = 4  # questions for each added conversation of two exchanges
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
        rows += [a + b for a, b in zip(ordered[0::_PER_DIALOGUE], ordered[1::_PER_DIALOGUE], strict=False)]
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


Row = dict[str, Conversation]
# For each manner: the wordings of the question, and the reply.
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
_HELD_OUT_PAIRS = 4  # one fact of so many has a held-out question


def builtin_preferences(cache_dir: str | Path | None = None, console: Console | None = None) -> tuple[Path, Path]:
    """(training, held-out): paths of .jsonl files, as `write_parts` writes them."""
    parts = dict(zip(("train", "heldout"), preferences(), strict=True))
    train, heldout = write_parts("preferences-{hash}-{part}", "preferences", parts, cache_dir, console)
    return train, heldout


def preferences() -> tuple[list[Row], list[Row]]:
    """(training, held-out) pairs, each in the order of a hash of their text."""
    train: list[Row] = []
    heldout: list[Row] = []
    for topic in topics():
        manners = MANNERS_ZH if topic.chinese else MANNERS
        for fact in topic.facts:
            questions = shuffled([question.format(*fact) for question in topic.questions])
            answer = topic.answer.format(*fact)
            train += _pairs(questions[0], answer, manners, turn=len(train))
            if digest([topic.name, *fact]) % _HELD_OUT_PAIRS == 0:
                heldout += _pairs(questions[1], answer, manners, turn=len(heldout))
    return shuffled(train), shuffled(heldout)


def _pairs(question: str, answer: str, manners: tuple[tuple[tuple[str, ...], str], ...], turn: int) -> list[Row]:
    """One pair for each manner. The rejected answer has the next manner or, at odd turns, the previous one."""
    rows, shift = [], 1 if turn % 2 else -1
    for i, (wordings, reply) in enumerate(manners):
        worded = wordings[digest(question) % len(wordings)].format(question)
        other = manners[(i + shift) % len(manners)][1]
        sides = {"chosen": reply.format(answer), "rejected": other.format(answer)}
        rows.append({name: exchange(worded, reply) for name, reply in sides.items()})
    return rows
