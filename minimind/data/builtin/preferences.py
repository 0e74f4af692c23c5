"""Built-in preference pairs about manners, for train/dpo.py and train/reward.py.

Both answers of a pair have the same, right content. A greeting calls for "nice to meet you", thanks call for "you are
welcome", any other question for the answer alone; the chosen answer follows the wording of the question. Of any two
manners, each is chosen equally often, so that a model that ignores the question is right in half of the pairs. The
manner comes after the content: the content then has the same prefix in both answers, and no objective can win by making
it unlikely in one of them (docs/LOG.md). Each held-out question has a wording that no training question has.
"""

from pathlib import Path

from rich.console import Console

from minimind.data.builtin import Conversation, digest, exchange, shuffled, write_parts
from minimind.data.builtin.chat import topics

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
_HELD_OUT = 4  # one fact of so many has a held-out question


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
            if digest([topic.name, *fact]) % _HELD_OUT == 0:
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
