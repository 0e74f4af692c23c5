"""Kinds of tasks that take one, two or three calls of the built-in tools; later calls use the results of earlier ones.

A kind draws random values and gives the question about them, the calls that lead to the answer, and the answer. The
last wording of each language is kept for held-out tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from minimind.environments.builtin import builtin_tools
from minimind.environments.builtin.tools import COLUMNS, ELEMENTS, ELEMENTS_ZH, GOODS, MOUNTAINS, RIVERS
from minimind.environments.tools import by_name

NAMES = (
    ("Anna", "小安"), ("Ben", "小本"), ("Clara", "小兰"), ("David", "大伟"), ("Emma", "小梅"), ("Frank", "小方"),
    ("Grace", "小雅"), ("Henry", "小亨"), ("Iris", "小爱"), ("Jack", "小杰"), ("Kate", "小凯"), ("Leo", "小乐"),
)  # fmt: skip
_CONVERSIONS = (
    ("km", "千米", "m", "米", 1000), ("m", "米", "cm", "厘米", 100), ("kg", "千克", "g", "克", 1000),
    ("h", "小时", "min", "分钟", 60), ("min", "分钟", "s", "秒", 60), ("week", "周", "day", "天", 7),
    ("l", "升", "ml", "毫升", 1000), ("day", "天", "h", "小时", 24),
)  # fmt: skip


@dataclass(frozen=True)
class SolutionStep:
    """A call and its result."""

    tool: str
    arguments: Mapping[str, Any]
    result: str

    @property
    def call(self) -> dict[str, Any]:
        return {"name": self.tool, "arguments": dict(self.arguments)}


@dataclass(frozen=True)
class TaskCase:
    """A task with its random values. words: fill the gaps of the wordings; steps: lead to `answer`; state: the tools'
    memory at the start."""

    words: Sequence[Any]
    steps: Sequence[SolutionStep]
    answer: str
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """draw: makes a case from (random, chinese); english, chinese: wordings, the last one for held-out tasks."""

    name: str
    draw: Callable[[Random, bool], TaskCase]
    english: tuple[str, ...]
    chinese: tuple[str, ...]


class Solution:
    """Runs built-in tools, and records the calls of a right solution in their order."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.steps: list[SolutionStep] = []
        self._state = json.loads(json.dumps(state or {}))

    def __call__(self, tool: str, **arguments: Any) -> str:
        result = _TOOLS[tool](arguments, self._state)
        self.steps.append(SolutionStep(tool, arguments, result))
        return result


_TOOLS = by_name(builtin_tools())


def _calculation(random: Random, chinese: bool) -> TaskCase:
    a, b, sign = random.randint(12, 99), random.randint(3, 99), random.choice("+-*")
    solve = Solution()
    return TaskCase((a, sign, b), solve.steps, solve("calculate", expression=f"{a}{sign}{b}"))


def _conversion(random: Random, chinese: bool) -> TaskCase:
    row, value = random.choice(_CONVERSIONS), random.randint(2, 99)
    unit, to = (row[1], row[3]) if chinese else (row[0], row[2])
    solve = Solution()
    return TaskCase((value, unit, to), solve.steps, solve("convert", value=value, unit=unit, to=to))


def _later(random: Random, chinese: bool) -> TaskCase:
    solve, day, days = Solution(), random_day(random), random.randint(2, 90)
    return TaskCase((day, days), solve.steps, solve("add_days", date=day, days=days))


def _weekday(random: Random, chinese: bool) -> TaskCase:
    solve, day = Solution(), random_day(random)
    return TaskCase((day,), solve.steps, solve("weekday", date=day))


def _memory(random: Random, chinese: bool) -> TaskCase:
    state, name = _remembered(random, chinese, lambda: str(random.randint(10, 999)))
    solve = Solution(state)
    return TaskCase((name,), solve.steps, solve("recall", name=name), state)


def _price(random: Random, chinese: bool) -> TaskCase:
    solve, item, column = Solution(), _item(random, chinese), _column(random, chinese)
    return TaskCase((item, column), solve.steps, solve("look_up", item=item, column=column))


def _element(random: Random, chinese: bool) -> TaskCase:
    solve, number = Solution(), random.randrange(len(ELEMENTS))
    name = _search_element(solve, number, chinese)
    return TaskCase((name,), solve.steps, str(number + 1))


def _mountain(random: Random, chinese: bool) -> TaskCase:
    solve, row = Solution(), random.choice(MOUNTAINS)
    solve("search", query=f"{row[1]}的高度" if chinese else f"height of {row[0]}")
    return TaskCase((row[chinese],), solve.steps, str(row[2]))


def _cost(random: Random, chinese: bool) -> TaskCase:
    solve, item, count = Solution(), _item(random, chinese), random.randint(2, 30)
    price = solve("look_up", item=item, column=_PRICE[chinese])
    return TaskCase((count, item), solve.steps, solve("calculate", expression=f"{count}*{price}"))


def _recalled_sum(random: Random, chinese: bool) -> TaskCase:
    state, name = _remembered(random, chinese, lambda: str(random.randint(10, 99)))
    solve, more = Solution(state), random.randint(3, 99)
    kept = solve("recall", name=name)
    return TaskCase((name, more), solve.steps, solve("calculate", expression=f"{kept}+{more}"), state)


def _later_weekday(random: Random, chinese: bool) -> TaskCase:
    solve, day, days = Solution(), random_day(random), random.randint(2, 90)
    later = solve("add_days", date=day, days=days)
    return TaskCase((day, days), solve.steps, solve("weekday", date=later))


def _element_sum(random: Random, chinese: bool) -> TaskCase:
    solve, number, more = Solution(), random.randrange(len(ELEMENTS)), random.randint(2, 99)
    name = _search_element(solve, number, chinese)
    return TaskCase((name, more), solve.steps, solve("calculate", expression=f"{number + 1}*{more}"))


def _river(random: Random, chinese: bool) -> TaskCase:
    solve, row = Solution(), random.choice(RIVERS)
    solve("search", query=f"{row[1]}的长度" if chinese else f"length of the {row[0]}")
    unit, to = ("千米", "米") if chinese else ("km", "m")
    return TaskCase((row[chinese],), solve.steps, solve("convert", value=row[2], unit=unit, to=to))


def _two_items(random: Random, chinese: bool) -> TaskCase:
    solve = Solution()
    first, second = (row[chinese] for row in random.sample(GOODS, 2))
    prices = [solve("look_up", item=item, column=_PRICE[chinese]) for item in (first, second)]
    return TaskCase((first, second), solve.steps, solve("calculate", expression=f"{prices[0]}+{prices[1]}"))


def _stock_value(random: Random, chinese: bool) -> TaskCase:
    solve, item = Solution(), _item(random, chinese)
    price = solve("look_up", item=item, column=_PRICE[chinese])
    stock = solve("look_up", item=item, column="库存" if chinese else "stock")
    return TaskCase((item,), solve.steps, solve("calculate", expression=f"{price}*{stock}"))


def _wish(random: Random, chinese: bool) -> TaskCase:
    state, name = _remembered(random, chinese, lambda: _item(random, chinese))
    solve, count = Solution(state), random.randint(2, 30)
    price = solve("look_up", item=solve("recall", name=name), column=_PRICE[chinese])
    return TaskCase((name, count), solve.steps, solve("calculate", expression=f"{count}*{price}"), state)


_PRICE = ("price", "价格")


def random_day(random: Random) -> str:
    """A date of the years 2000 to 2029, YYYY-MM-DD."""
    return f"{random.randint(2000, 2029)}-{random.randint(1, 12):02d}-{random.randint(1, 28):02d}"


def _item(random: Random, chinese: bool) -> str:
    return str(random.choice(GOODS)[chinese])


def _column(random: Random, chinese: bool) -> str:
    half = len(COLUMNS) // 2
    return list(COLUMNS)[half * chinese :][random.randrange(half)]


def _remembered(random: Random, chinese: bool, value: Callable[[], str]) -> tuple[dict[str, Any], str]:
    """(a state whose memory has a value for each of three people, the name of one of them)."""
    names = [row[chinese] for row in random.sample(NAMES, 3)]
    return {"memory": {name: value() for name in names}}, names[0]


def _search_element(solve: Solution, number: int, chinese: bool) -> str:
    name = ELEMENTS_ZH[number] if chinese else ELEMENTS[number]
    solve("search", query=f"{name}的原子序数" if chinese else f"atomic number of {name}")
    return name


KINDS = (
    Kind("calculation", _calculation,
         ("What is {0}{1}{2}?", "Calculate {0}{1}{2}.", "How much is {0}{1}{2}?", "Work out {0}{1}{2}."),
         ("{0}{1}{2}等于多少？", "请计算{0}{1}{2}。", "算一下{0}{1}{2}。", "求{0}{1}{2}的值。")),
    Kind("conversion", _conversion,
         ("How many {2} are {0} {1}?", "Convert {0} {1} to {2}.", "What is {0} {1} in {2}?", "Turn {0} {1} into {2}."),
         ("{0}{1}是多少{2}？", "把{0}{1}换算成{2}。", "{0}{1}等于多少{2}？", "{0}{1}合多少{2}？")),
    Kind("later day", _later,
         ("Which date is {1} days after {0}?", "What is the date {1} days after {0}?", "Add {1} days to {0}.",
          "Name the date {1} days after {0}."),
         ("{0}之后{1}天是哪一天？", "从{0}起过{1}天是几号？", "{0}加{1}天是哪天？", "{0}再过{1}天是什么日期？")),
    Kind("weekday", _weekday,
         ("What day of the week is {0}?", "Which weekday is {0}?", "On what weekday falls {0}?",
          "Name the weekday of {0}."),
         ("{0}是星期几？", "{0}那天星期几？", "请问{0}是周几？", "说出{0}是星期几。")),
    Kind("memory", _memory,
         ("What is {0}'s number?", "Which number does {0} have?", "Tell me {0}'s number.", "Give me {0}'s number."),
         ("{0}的号码是多少？", "请告诉我{0}的号码。", "{0}的号码是什么？", "我想知道{0}的号码。")),
    Kind("table", _price,
         ("What is the {1} of {0}?", "Tell me the {1} of {0}.", "Look up the {1} of {0}.", "Give me the {1} of {0}."),
         ("{0}的{1}是多少？", "查一下{0}的{1}。", "请告诉我{0}的{1}。", "我想知道{0}的{1}。")),
    Kind("element", _element,
         ("What is the atomic number of {0}?", "Which atomic number has {0}?", "Tell me the atomic number of {0}.",
          "Give me the atomic number of {0}."),
         ("{0}的原子序数是多少？", "查一下{0}的原子序数。", "请告诉我{0}的原子序数。", "我想知道{0}的原子序数。")),
    Kind("mountain", _mountain,
         ("How high is {0}?", "What is the height of {0}?", "How many metres high is {0}?", "Tell me how high {0} is."),
         ("{0}有多高？", "{0}高多少米？", "{0}的高度是多少？", "我想知道{0}有多高。")),
    Kind("cost", _cost,
         ("What do {0} {1} cost?", "How much are {0} {1}?", "What is the price of {0} {1}?",
          "I buy {0} {1}. The price?"),
         ("买{0}个{1}要多少钱？", "{0}个{1}一共多少钱？", "{0}个{1}的总价是多少？", "我想买{0}个{1}，要多少钱？")),
    Kind("recalled sum", _recalled_sum,
         ("What is {0}'s number plus {1}?", "Add {1} to {0}'s number.", "How much is {0}'s number plus {1}?",
          "Work out {0}'s number plus {1}."),
         ("{0}的号码加{1}等于多少？", "把{0}的号码加上{1}。", "算一下{0}的号码加{1}。", "求{0}的号码加{1}。")),
    Kind("later weekday", _later_weekday,
         ("What day of the week is {1} days after {0}?", "Which weekday is {1} days after {0}?",
          "On what weekday falls {1} days after {0}?", "Name the weekday {1} days after {0}."),
         ("{0}之后{1}天是星期几？", "从{0}起过{1}天是周几？", "{0}加{1}天是星期几？", "{0}再过{1}天是星期几？")),
    Kind("element sum", _element_sum,
         ("What is {1} times the atomic number of {0}?", "Multiply the atomic number of {0} by {1}.",
          "How much is {1} times the atomic number of {0}?", "Work out {1} times the atomic number of {0}."),
         ("{0}的原子序数乘{1}等于多少？", "把{0}的原子序数乘以{1}。", "算一下{0}的原子序数乘{1}。",
          "求{0}的原子序数乘{1}。")),
    Kind("river", _river,
         ("How many metres long is the {0}?", "What is the length of the {0} in metres?",
          "Tell me the length of the {0} in metres.", "Give me the length of the {0} in metres."),
         ("{0}长多少米？", "{0}的长度是多少米？", "请告诉我{0}长多少米。", "我想知道{0}长多少米。")),
    Kind("two items", _two_items,
         ("What do {0} and {1} cost together?", "How much are {0} and {1} together?",
          "What is the price of {0} and {1} together?", "I buy {0} and {1}. What do they cost together?"),
         ("{0}和{1}一共多少钱？", "买{0}和{1}要多少钱？", "{0}和{1}的总价是多少？", "我想买{0}和{1}，一共多少钱？")),
    Kind("stock value", _stock_value,
         ("What is all the {0} in stock worth?", "What is the stock of {0} worth?",
          "How much is the stock of {0} worth?", "Tell me what the stock of {0} is worth."),
         ("库存的{0}一共值多少钱？", "{0}的库存值多少钱？", "全部{0}库存的总价是多少？",
          "我想知道{0}的库存值多少钱。")),
    Kind("wish", _wish,
         ("What do {1} of what {0} wants cost?", "How much are {1} of what {0} wants?",
          "What is the price of {1} of what {0} wants?", "I buy {1} of what {0} wants. The price?"),
         ("{0}想要的东西买{1}个多少钱？", "买{1}个{0}想要的东西要多少钱？", "{0}想要的东西{1}个的总价是多少？",
          "我买{1}个{0}想要的东西，要多少钱？")),
)  # fmt: skip
