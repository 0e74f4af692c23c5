"""The built-in tools of agents: arithmetic, units, dates and times, a memory, a table of goods, a search over facts.

All are exact and deterministic, need no network, and reject inputs that would take long.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from fractions import Fraction
from functools import cache
from typing import Any

from minimind.data.builtin.chat import CAPITALS, DAYS

_LONGEST = 200  # characters of an expression, or of a name or value to remember
_MOST_BITS = 256  # of an intermediate result
_SAME = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**", "（": "(", "）": ")", ",": None})
_TWO: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ONE: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression."""
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression is longer than {_LONGEST} characters")
    try:
        tree = ast.parse(expression.translate(_SAME).strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"not an arithmetic expression: {expression}") from None
    return number_text(_value(tree.body))


def number_text(value: Fraction) -> str:
    """Write a whole number in full, any other with at most ten significant digits."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.10g}"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _ONE:
        return _ONE[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _TWO:
            try:
                return _bounded(Fraction(_TWO[type(node.op)](left, right)))
            except ZeroDivisionError:
                raise ValueError("division by zero") from None
    raise ValueError("only numbers, brackets and + - * / // % ** are known")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("an exponent must be a whole number")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    if abs(exponent) * max(_bits(base), 1) > _MOST_BITS and base not in (0, 1, -1):
        raise ValueError("the number is too large")
    return Fraction(base ** int(exponent))


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > 2 * _MOST_BITS:
        raise ValueError("the number is too large")
    return value


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length() - 1


# Each unit's size in the first of its kind, and its names.
_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "length": {
        "1": ("m", "metre", "metres", "meter", "meters", "米"), "1000": ("km", "kilometre", "kilometres", "kilometer",
        "kilometers", "千米", "公里"), "0.01": ("cm", "centimetre", "centimetres", "centimeter", "centimeters", "厘米"),
        "0.001": ("mm", "millimetre", "millimetres", "millimeter", "millimeters", "毫米"),
        "0.0254": ("inch", "inches", "英寸"), "0.3048": ("foot", "feet", "英尺"), "0.9144": ("yard", "yards", "码"),
        "1609.344": ("mile", "miles", "英里"),
    },
    "mass": {
        "1": ("g", "gram", "grams", "克"), "1000": ("kg", "kilogram", "kilograms", "千克", "公斤"),
        "0.001": ("mg", "milligram", "milligrams", "毫克"), "1000000": ("t", "tonne", "tonnes", "吨"),
        "28.349523125": ("ounce", "ounces", "盎司"), "453.59237": ("pound", "pounds", "磅"),
    },
    "volume": {
        "1": ("l", "litre", "litres", "liter", "liters", "升"),
        "0.001": ("ml", "millilitre", "millilitres", "milliliter", "milliliters", "毫升"),
        "3.785411784": ("gallon", "gallons", "加仑"),
    },
    "time": {
        "1": ("s", "second", "seconds", "秒"), "60": ("min", "minute", "minutes", "分钟"),
        "3600": ("h", "hour", "hours", "小时"), "86400": ("day", "days", "天"), "604800": ("week", "weeks", "周"),
    },
}  # fmt: skip
_TEMPERATURES = {
    "c": "c", "celsius": "c", "°c": "c", "摄氏度": "c", "f": "f", "fahrenheit": "f", "°f": "f", "华氏度": "f",
    "k": "k", "kelvin": "k", "开尔文": "k",
}  # fmt: skip
_UNITS = {
    name: (kind, Fraction(size)) for kind, sizes in _KINDS.items() for size, names in sizes.items() for name in names
}


def convert(value: float, unit: str, to: str) -> str:
    """A value in another unit."""
    amount, source, target = Fraction(str(value)), unit.strip().lower(), to.strip().lower()
    if source in _TEMPERATURES and target in _TEMPERATURES:
        return number_text(_temperature(amount, _TEMPERATURES[source], _TEMPERATURES[target]))
    for name in (source, target):
        if name not in _UNITS and name not in _TEMPERATURES:
            raise ValueError(f"the unit {name} is not known")
    if source not in _UNITS or target not in _UNITS or _UNITS[source][0] != _UNITS[target][0]:
        raise ValueError(f"{source} cannot be turned into {target}")
    return number_text(amount * _UNITS[source][1] / _UNITS[target][1])


def _temperature(value: Fraction, source: str, target: str) -> Fraction:
    zero, degree = Fraction("273.15"), Fraction(9, 5)
    kelvin = {"k": value, "c": value + zero, "f": (value - 32) / degree + zero}[source]
    return {"k": kelvin, "c": kelvin - zero, "f": (kelvin - zero) * degree + 32}[target]


_TIME = re.compile(r"(\d{1,2}):(\d{2})")


def add_days(date: str, days: int) -> str:
    """The date so many days after a date YYYY-MM-DD."""
    try:
        return (_date(date) + timedelta(days)).isoformat()
    except OverflowError:
        raise ValueError("the calendar does not reach so far") from None


def days_between(start: str, end: str) -> int:
    """The number of days from one date to another."""
    return (_date(end) - _date(start)).days


def weekday(date: str) -> str:
    """The day of the week of a date YYYY-MM-DD."""
    return DAYS[_date(date).weekday()]


def add_minutes(time: str, minutes: int) -> str:
    """The time of day so many minutes after a time HH:MM."""
    found = _TIME.fullmatch(time.strip())
    if found is None or int(found[1]) > 23 or int(found[2]) > 59:
        raise ValueError(f"not a time HH:MM: {time}")
    total = (int(found[1]) * 60 + int(found[2]) + minutes) % (24 * 60)
    return f"{total // 60:02d}:{total % 60:02d}"


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"not a date YYYY-MM-DD: {text}") from None


_MOST = 100  # names


def remember(name: str, value: str, state: dict) -> str:
    """Keep a value under a name."""
    kept = _kept(state)
    if len(name) > _LONGEST or len(value) > _LONGEST:
        raise ValueError(f"a name or a value may have {_LONGEST} characters")
    if name not in kept and len(kept) >= _MOST:
        raise ValueError(f"{_MOST} names are kept already")
    kept[name] = value
    return "kept"


def recall(name: str, state: dict) -> str:
    """The value kept under a name."""
    kept = _kept(state)
    if name not in kept:
        raise ValueError(f"nothing is kept under {name}")
    return str(kept[name])


def _kept(state: dict[str, Any]) -> dict[str, Any]:
    return state.setdefault("memory", {})


# English name, Chinese name; price in yuan, weight in grams, pieces in stock
GOODS = (
    ("apple", "苹果", 4, 180, 62), ("pear", "梨", 3, 170, 48), ("banana", "香蕉", 2, 120, 95),
    ("orange", "橙子", 5, 200, 71), ("lemon", "柠檬", 6, 90, 33), ("mango", "芒果", 12, 310, 24),
    ("melon", "甜瓜", 18, 1400, 15), ("peach", "桃子", 7, 150, 56), ("plum", "李子", 1, 60, 88),
    ("grape", "葡萄", 16, 500, 29), ("bread", "面包", 9, 400, 41), ("cheese", "奶酪", 35, 250, 18),
    ("milk", "牛奶", 8, 1030, 52), ("egg", "鸡蛋", 1, 55, 240), ("rice", "大米", 28, 5000, 37),
    ("tea", "茶叶", 45, 100, 66), ("coffee", "咖啡", 52, 250, 43), ("sugar", "白糖", 11, 1000, 59),
    ("salt", "食盐", 3, 500, 77), ("pepper", "胡椒", 14, 50, 31), ("honey", "蜂蜜", 38, 450, 22),
    ("butter", "黄油", 24, 200, 27), ("soap", "肥皂", 5, 110, 84), ("candle", "蜡烛", 4, 80, 91),
    ("pen", "钢笔", 19, 25, 64), ("pencil", "铅笔", 2, 8, 310), ("book", "书", 33, 620, 46),
    ("cup", "杯子", 15, 340, 53), ("plate", "盘子", 13, 560, 39), ("spoon", "勺子", 6, 45, 120),
    ("knife", "刀", 29, 95, 34), ("lamp", "台灯", 89, 1250, 12), ("chair", "椅子", 145, 4800, 9),
    ("table", "桌子", 380, 16000, 4), ("clock", "钟", 76, 730, 17), ("umbrella", "雨伞", 58, 410, 21),
    ("bag", "书包", 99, 850, 26), ("shoe", "鞋子", 168, 690, 32), ("hat", "帽子", 42, 130, 44),
    ("towel", "毛巾", 21, 260, 73),
)  # fmt: skip
COLUMNS = {"price": 2, "weight": 3, "stock": 4, "价格": 2, "重量": 3, "库存": 4}
_ROWS = {name: row for row in GOODS for name in row[:2]}


def look_up(item: str, column: str) -> int:
    """Price, weight or stock of an item in the shop's table."""
    row = _ROWS.get(item.strip().lower())
    if row is None:
        raise ValueError(f"the table has no item {item}")
    if column.strip().lower() not in COLUMNS:
        raise ValueError(f"the table has no column {column}; choose from {', '.join(COLUMNS)}")
    return int(row[COLUMNS[column.strip().lower()]])


_MAX_RESULTS = 2  # facts returned by a search
# By atomic number; in ELEMENTS_ZH each character is a name.
_NAMES = """
hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium magnesium aluminium silicon
phosphorus sulfur chlorine argon potassium calcium scandium titanium vanadium chromium manganese iron cobalt nickel
copper zinc gallium germanium arsenic selenium bromine krypton rubidium strontium yttrium zirconium niobium molybdenum
technetium ruthenium rhodium palladium silver cadmium indium tin antimony tellurium iodine xenon caesium barium
lanthanum cerium praseodymium neodymium promethium samarium europium gadolinium terbium dysprosium holmium erbium
thulium ytterbium lutetium hafnium tantalum tungsten rhenium osmium iridium platinum gold mercury thallium lead
bismuth polonium astatine radon francium radium actinium thorium protactinium uranium
"""
ELEMENTS = tuple(_NAMES.split())
ELEMENTS_ZH = (
    "氢氦锂铍硼碳氮氧氟氖钠镁铝硅磷硫氯氩钾钙钪钛钒铬锰铁钴镍铜锌镓锗砷硒溴氪铷锶钇锆铌钼锝钌铑钯银镉铟锡锑碲碘氙铯钡镧"
    "铈镨钕钷钐铕钆铽镝钬铒铥镱镥铪钽钨铼锇铱铂金汞铊铅铋钋砹氡钫镭锕钍镤铀"
)
# English and Chinese name, height in metres
MOUNTAINS = (
    ("Mount Everest", "珠穆朗玛峰", 8849), ("K2", "乔戈里峰", 8611), ("Lhotse", "洛子峰", 8516),
    ("Makalu", "马卡鲁峰", 8485), ("Annapurna", "安纳布尔纳峰", 8091), ("Denali", "迪纳利山", 6190),
    ("Kilimanjaro", "乞力马扎罗山", 5895), ("Elbrus", "厄尔布鲁士山", 5642), ("Mont Blanc", "勃朗峰", 4806),
    ("Mount Fuji", "富士山", 3776), ("Mount Etna", "埃特纳火山", 3403), ("Zugspitze", "楚格峰", 2962),
    ("Mount Olympus", "奥林匹斯山", 2917), ("Ben Nevis", "本尼维斯山", 1345), ("Mount Tai", "泰山", 1545),
    ("Huangshan", "黄山", 1864),
)  # fmt: skip
# English and Chinese name, length in kilometres
RIVERS = (
    ("Nile", "尼罗河", 6650), ("Amazon", "亚马孙河", 6400), ("Yangtze", "长江", 6300),
    ("Mississippi", "密西西比河", 3766),
    ("Yellow River", "黄河", 5464), ("Congo", "刚果河", 4700), ("Mekong", "湄公河", 4350), ("Volga", "伏尔加河", 3530),
    ("Danube", "多瑙河", 2850), ("Indus", "印度河", 3180), ("Ganges", "恒河", 2525), ("Rhine", "莱茵河", 1233),
    ("Seine", "塞纳河", 777), ("Thames", "泰晤士河", 346), ("Loire", "卢瓦尔河", 1006), ("Elbe", "易北河", 1094),
)  # fmt: skip


@cache
def facts() -> tuple[str, ...]:
    """All facts, one sentence each."""
    sentences = []
    for number, (name, chinese) in enumerate(zip(ELEMENTS, ELEMENTS_ZH, strict=True), 1):
        sentences += [f"The atomic number of {name} is {number}.", f"{chinese}的原子序数是{number}。"]
    for name, chinese, height in MOUNTAINS:
        sentences += [f"{name} is {height} metres high.", f"{chinese}高{height}米。"]
    for name, chinese, length in RIVERS:
        sentences += [f"The {name} is {length} kilometres long.", f"{chinese}长{length}千米。"]
    for country, (capital, chinese, capital_zh) in CAPITALS.items():
        sentences += [f"The capital of {country} is {capital}.", f"{chinese}的首都是{capital_zh}。"]
    return tuple(sentences)


def search(query: str) -> str:
    """Facts about chemical elements, mountains, rivers and capitals."""
    words = Counter(_words(query))
    rarity, indexed = _index()
    scores = [sum(rarity[word] for word in words if word in fact) / math.sqrt(len(fact)) for fact in indexed]
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:_MAX_RESULTS]
    results = [facts()[i] for i in best if scores[i] > scores[best[0]] / 2]
    if not results:
        raise ValueError("nothing was found")
    return "\n".join(results)


@cache
def _index() -> tuple[dict[str, float], list[frozenset[str]]]:
    """The inverse document frequency of each word, and the words of each fact."""
    indexed = [frozenset(_words(fact)) for fact in facts()]
    counts = Counter(word for words in indexed for word in words)
    return {word: math.log(len(indexed) / count) for word, count in counts.items()}, indexed


def _words(text: str) -> list[str]:
    """Lower-case Latin words, single Chinese characters and Chinese character bigrams."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    for run in re.findall(r"[\u4e00-\u9fff]+", text):
        words += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
    return words
