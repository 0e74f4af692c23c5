"""Kinds of tasks that take one, two or three calls of the built-in tools; later calls use the results of earlier ones.

A kind draws random values and gives the question about them, the calls that lead to the answer, and the answer. It has
many wordings for training tasks, because a model that knows few does not understand a new one. The last wording of each
language is for held-out tasks alone; of the others, the first SHARED are the ones most like it.
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


SHARED = 3  # wordings of each language that training and held-out tasks share


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
    """draw: makes a case from (random, chinese); english, chinese: wordings. Training tasks have all but the last one,
    held-out tasks the first SHARED and the last one."""

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
         ("What is {0}{1}{2}?", "Calculate {0}{1}{2}.", "How much is {0}{1}{2}?", "{0}{1}{2} is how much?",
          "I need the result of {0}{1}{2}.", "Can you solve {0}{1}{2}?", "The result of {0}{1}{2}?",
          "Find the value of {0}{1}{2}.", "What does {0}{1}{2} make?", "Please compute {0}{1}{2} for me.",
          "Work out {0}{1}{2}."),
         ("{0}{1}{2}等于多少？", "请计算{0}{1}{2}。", "算一下{0}{1}{2}。", "{0}{1}{2}是多少？", "帮我算算{0}{1}{2}。",
          "{0}{1}{2}结果是多少？", "告诉我{0}{1}{2}是几。", "麻烦算出{0}{1}{2}。", "你能算出{0}{1}{2}吗？",
          "{0}{1}{2}得多少？", "求{0}{1}{2}的值。")),
    Kind("conversion", _conversion,
         ("How many {2} are {0} {1}?", "Convert {0} {1} to {2}.", "What is {0} {1} in {2}?",
          "{0} {1} is how many {2}?", "Express {0} {1} in {2}.", "I have {0} {1}. How many {2} is that?",
          "Please change {0} {1} to {2}.", "How much is {0} {1} in {2}?", "Find {0} {1} in {2}.",
          "In {2}, what is {0} {1}?", "Turn {0} {1} into {2}."),
         ("{0}{1}是多少{2}？", "把{0}{1}换算成{2}。", "{0}{1}等于多少{2}？", "请把{0}{1}换成{2}。",
          "多少{2}等于{0}{1}？", "用{2}表示{0}{1}。", "{0}{1}换算以后是几{2}？", "帮我换算一下，{0}{1}是几{2}？",
          "将{0}{1}转换为{2}。", "以{2}为单位，{0}{1}是多少？", "{0}{1}合多少{2}？")),
    Kind("later day", _later,
         ("Which date is {1} days after {0}?", "What is the date {1} days after {0}?", "Add {1} days to {0}.",
          "Which day comes {1} days after {0}?", "It is {0}. What is the date in {1} days?",
          "Starting from {0}, go {1} days forward. Which date is it?", "{1} days after {0} is which date?",
          "Find the date {1} days from {0}.", "Tell me the date {1} days later than {0}.",
          "When is {1} days past {0}?", "Name the date {1} days after {0}."),
         ("{0}之后{1}天是哪一天？", "从{0}起过{1}天是几号？", "{0}加{1}天是哪天？", "今天是{0}，{1}天以后是几号？",
          "从{0}往后数{1}天，那是哪个日期？", "{0}以后的第{1}天是哪天？", "帮我算算{0}后面{1}天是哪一天。",
          "{0}往后{1}天的日期是多少？", "{1}天前是{0}，今天是哪一天？", "请告诉我{0}之后{1}天的日期。",
          "{0}再过{1}天是什么日期？")),
    Kind("weekday", _weekday,
         ("What day of the week is {0}?", "Which weekday is {0}?", "On what weekday falls {0}?",
          "{0} is which day of the week?", "Tell me which weekday {0} is.", "Is {0} a Monday, or which day?",
          "Find out what weekday {0} falls on.", "I need the day of the week for {0}.",
          "The date is {0}. What weekday is that?", "Say which day of the week {0} is.",
          "Name the weekday of {0}."),
         ("{0}是星期几？", "{0}那天星期几？", "请问{0}是周几？", "查一下{0}是周几。", "{0}是一周中的哪一天？",
          "帮我看看{0}那天是周几。", "请告诉我{0}那天星期几。", "{0}这一天是星期几呢？", "日期是{0}，那天是周几？",
          "能不能查到{0}是周几？", "说出{0}是星期几。")),
    Kind("memory", _memory,
         ("What is {0}'s number?", "Which number does {0} have?", "Tell me {0}'s number.", "{0}'s number, please.",
          "I need the number of {0}.", "Do you know {0}'s number?", "What number did {0} leave?",
          "What number is kept for {0}?", "Find {0}'s number.", "I forgot {0}'s number. What is it?",
          "Give me {0}'s number."),
         ("{0}的号码是多少？", "请告诉我{0}的号码。", "{0}的号码是什么？", "查一下{0}的号码。", "能不能查到{0}的号码？",
          "帮我找找{0}的号码。", "我忘了{0}的号码，是多少？", "{0}留的号码是多少？", "麻烦把{0}的号码发给我。",
          "请问{0}的号码是几？", "我想知道{0}的号码。")),
    Kind("table", _price,
         ("What is the {1} of {0}?", "Tell me the {1} of {0}.", "Look up the {1} of {0}.", "{0}: what is its {1}?",
          "I need the {1} of {0}.", "What {1} does {0} have?", "Find the {1} of {0}.",
          "What does the table say is the {1} of {0}?", "Please check the {1} of {0}.",
          "Do you know the {1} of {0}?", "Give me the {1} of {0}."),
         ("{0}的{1}是多少？", "查一下{0}的{1}。", "请告诉我{0}的{1}。", "能不能查到{0}的{1}？", "帮我看看{0}的{1}。",
          "{0}的{1}是什么？", "请问{0}的{1}是几？", "麻烦查查{0}的{1}。", "表里{0}的{1}写着多少？",
          "店里的{0}，{1}是多少？", "我想知道{0}的{1}。")),
    Kind("element", _element,
         ("What is the atomic number of {0}?", "Which atomic number has {0}?", "Tell me the atomic number of {0}.",
          "I need the atomic number of {0}.", "{0} has which atomic number?", "Do you know the atomic number of {0}?",
          "Find the atomic number of {0}.", "What atomic number does {0} have?",
          "Please look for the atomic number of {0}.", "The element is {0}. What is its atomic number?",
          "Give me the atomic number of {0}."),
         ("{0}的原子序数是多少？", "查一下{0}的原子序数。", "请告诉我{0}的原子序数。", "能不能查到{0}的原子序数？",
          "帮我找找{0}的原子序数。", "{0}的原子序数是什么？", "元素{0}的原子序数是几？", "麻烦查查{0}的原子序数。",
          "请问{0}的原子序数是多少？", "{0}这种元素，原子序数是多少？", "我想知道{0}的原子序数。")),
    Kind("mountain", _mountain,
         ("How high is {0}?", "What is the height of {0}?", "How many metres high is {0}?",
          "Find the height of {0}.", "{0} is how many metres high?", "What height does {0} reach?",
          "I need the height of {0}.", "How tall is {0}?", "Do you know the height of {0} in metres?",
          "Please check the height of {0}.", "Tell me how high {0} is."),
         ("{0}有多高？", "{0}高多少米？", "{0}的高度是多少？", "查一下{0}的高度。", "能不能查到{0}高多少米？",
          "请告诉我{0}的高度。", "{0}的高度是多少米？", "帮我找找{0}的高度。", "请问{0}高几米？",
          "{0}这座山有多少米高？", "我想知道{0}有多高。")),
    Kind("cost", _cost,
         ("What do {0} {1} cost?", "How much are {0} {1}?", "What is the price of {0} {1}?",
          "How much must one pay for {0} {1}?", "We need {0} {1}. How much money is that?",
          "What would {0} {1} come to?", "Find the total for {0} {1}.",
          "Somebody orders {0} {1}. What do they owe?", "What is the bill for {0} {1}?",
          "The shop sold {0} {1}. For how much?", "I buy {0} {1}. The price?"),
         ("买{0}个{1}要多少钱？", "{0}个{1}一共多少钱？", "{0}个{1}的总价是多少？", "{0}个{1}应该付多少？",
          "算一下{0}个{1}的总价。", "请问{0}个{1}多少钱？", "有人订了{0}个{1}，总共多少钱？",
          "{1}来{0}个，要付多少钱？", "帮我算算{0}个{1}花多少钱。", "卖出{0}个{1}能收多少钱？",
          "我想买{0}个{1}，要多少钱？")),
    Kind("recalled sum", _recalled_sum,
         ("What is {0}'s number plus {1}?", "Add {1} to {0}'s number.", "How much is {0}'s number plus {1}?",
          "Find the sum of {0}'s number and {1}.", "{0}'s number plus {1} is how much?",
          "Take {0}'s number and add {1}.", "What do I get when I add {1} to {0}'s number?",
          "Please add {0}'s number and {1}.", "I need {0}'s number, increased by {1}.",
          "What is the sum of {1} and {0}'s number?", "Work out {0}'s number plus {1}."),
         ("{0}的号码加{1}等于多少？", "把{0}的号码加上{1}。", "算一下{0}的号码加{1}。", "{0}的号码加{1}是多少？",
          "请计算{0}的号码与{1}的和。", "{0}的号码和{1}相加得多少？", "帮我算算{0}的号码加{1}。",
          "在{0}的号码上加{1}，结果是什么？", "{1}加上{0}的号码是多少？", "先查{0}的号码，然后加{1}。",
          "求{0}的号码加{1}。")),
    Kind("later weekday", _later_weekday,
         ("What day of the week is {1} days after {0}?", "Which weekday is {1} days after {0}?",
          "On what weekday falls {1} days after {0}?", "{1} days after {0} is which day of the week?",
          "It is {0}. What weekday is it in {1} days?",
          "Starting from {0}, go {1} days forward. Which weekday is it?",
          "Find out what weekday it is {1} days from {0}.", "Tell me which day of the week comes {1} days after {0}.",
          "Which weekday will it be {1} days later than {0}?", "I need the day of the week {1} days past {0}.",
          "Name the weekday {1} days after {0}."),
         ("{0}之后{1}天是星期几？", "从{0}起过{1}天是周几？", "{0}加{1}天是星期几？", "今天是{0}，{1}天以后是周几？",
          "从{0}往后数{1}天，那天星期几？", "{0}以后的第{1}天是周几？", "帮我算算{0}后面{1}天是星期几。",
          "{0}往后{1}天是一周中的哪一天？", "{1}天前是{0}，今天是星期几？", "请告诉我{0}之后{1}天是周几。",
          "{0}再过{1}天是星期几？")),
    Kind("element sum", _element_sum,
         ("What is {1} times the atomic number of {0}?", "Multiply the atomic number of {0} by {1}.",
          "How much is {1} times the atomic number of {0}?",
          "Find the product of {1} and the atomic number of {0}.",
          "Take the atomic number of {0} and multiply it by {1}.",
          "{1} times the atomic number of {0} is how much?",
          "What is the atomic number of {0}, multiplied by {1}?",
          "What do I get when I multiply {1} by the atomic number of {0}?",
          "Please calculate the atomic number of {0} times {1}.", "I need the atomic number of {0} times {1}.",
          "Work out {1} times the atomic number of {0}."),
         ("{0}的原子序数乘{1}等于多少？", "把{0}的原子序数乘以{1}。", "算一下{0}的原子序数乘{1}。",
          "{0}的原子序数乘以{1}是多少？", "请计算{0}的原子序数与{1}的积。", "{1}乘{0}的原子序数得多少？",
          "帮我算算{0}的原子序数的{1}倍。", "{0}的原子序数的{1}倍是多少？", "先查{0}的原子序数，然后乘{1}。",
          "{0}的原子序数和{1}相乘，结果是什么？", "求{0}的原子序数乘{1}。")),
    Kind("river", _river,
         ("How many metres long is the {0}?", "What is the length of the {0} in metres?",
          "Tell me the length of the {0} in metres.", "Find the length of the {0} in metres.",
          "In metres, how long is the {0}?", "The {0} is how many metres long?",
          "How long is the {0}, in metres?", "I need the length of the {0} in metres.",
          "Do you know how many metres long the {0} is?", "Please convert the length of the {0} to metres.",
          "Give me the length of the {0} in metres."),
         ("{0}长多少米？", "{0}的长度是多少米？", "请告诉我{0}长多少米。", "{0}有多少米长？", "用米表示{0}的长度。",
          "能不能算出{0}长多少米？", "查一下{0}的长度，换算成米。", "以米为单位，{0}有多长？", "帮我算算{0}长几米。",
          "请问{0}的长度是几米？", "我想知道{0}长多少米。")),
    Kind("two items", _two_items,
         ("What do {0} and {1} cost together?", "How much are {0} and {1} together?",
          "What is the price of {0} and {1} together?", "Find the total price of {0} and {1}.",
          "How much must one pay for {0} and {1}?", "What is the sum of the prices of {0} and {1}?",
          "{0} and {1}: how much is that in total?", "We need {0} and {1}. How much money is that?",
          "Add the prices of {0} and {1}.", "Somebody orders {0} and {1}. How much is the bill?",
          "I buy {0} and {1}. What do they cost together?"),
         ("{0}和{1}一共多少钱？", "买{0}和{1}要多少钱？", "{0}和{1}的总价是多少？", "算一下{0}和{1}的总价。",
          "{0}加{1}总共要付多少钱？", "请问{0}和{1}加起来多少钱？", "{0}、{1}各一个，应该付多少？",
          "把{0}和{1}的价格相加。", "有人订了{0}和{1}，总共多少钱？", "帮我算算{0}和{1}花多少钱。",
          "我想买{0}和{1}，一共多少钱？")),
    Kind("stock value", _stock_value,
         ("What is all the {0} in stock worth?", "What is the stock of {0} worth?",
          "How much is the stock of {0} worth?", "Find the value of all the {0} in stock.",
          "What would all the {0} in stock cost?", "Multiply the price of {0} by its stock.",
          "If all the {0} in stock is sold, how much money comes in?",
          "I need the total value of the {0} in stock.", "How much is the whole stock of {0} worth?",
          "What is the price of the entire stock of {0}?", "Tell me what the stock of {0} is worth."),
         ("库存的{0}一共值多少钱？", "{0}的库存值多少钱？", "全部{0}库存的总价是多少？", "算一下{0}库存的总价。",
          "库存的{0}全卖出能收多少钱？", "把{0}的价格乘以库存。", "请告诉我库存的{0}总共值多少。",
          "{0}的价格乘库存等于多少？", "帮我算算店里全部{0}值多少钱。", "店里所有的{0}总价是多少？",
          "我想知道{0}的库存值多少钱。")),
    Kind("wish", _wish,
         ("What do {1} of what {0} wants cost?", "How much are {1} of what {0} wants?",
          "What is the price of {1} of what {0} wants?", "{0} wants something. What do {1} of it cost?",
          "How much must one pay for {1} of what {0} wants?", "Find the total price of {1} of what {0} wants.",
          "What would {1} of the thing that {0} wants cost?",
          "{0} gets {1} of what they want. What do they owe?",
          "We need {1} of what {0} wants. How much money is that?",
          "Look up what {0} wants. How much are {1} of it?", "I buy {1} of what {0} wants. The price?"),
         ("{0}想要的东西买{1}个多少钱？", "买{1}个{0}想要的东西要多少钱？", "{0}想要的东西{1}个的总价是多少？",
          "{0}想要的东西来{1}个，总共多少钱？", "算一下{1}个{0}想要的东西的总价。",
          "{1}个{0}想要的东西应该付多少？", "先查{0}想要什么，{1}个要付多少钱？",
          "请问{0}想要的东西，{1}个多少钱？", "帮我算算{1}个{0}想要的东西花多少钱。",
          "按{0}想要的订{1}个，总共花多少？", "我买{1}个{0}想要的东西，要多少钱？")),
)  # fmt: skip
