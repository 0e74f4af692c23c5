"""Tools and tasks that come with the program, deterministic and without a network; here, the sets that --tools names.

"builtin" are our own tools (tools.py). "upstream" are the six simulated tools that upstream's agent_rl.jsonl offers,
with upstream's names, arguments and values (trainer/train_agent.py), from which its "gt" is made: its rows could not be
checked with other weather. Two things differ. A city, a pair of currencies or a text that the tool does not know is an
error here, while upstream makes up a value, which teaches a model that it may ask for anything. And arithmetic is
parsed here (tools.py), while upstream evaluates it as code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from minimind.environments.builtin.tools import (
    add_days,
    add_minutes,
    calculate,
    convert,
    days_between,
    look_up,
    recall,
    remember,
    search,
    weekday,
)
from minimind.environments.mcp import PREFIX, mcp_tools
from minimind.environments.tools import ToolFunction, by_name, tool_of, user_tools

BUILTIN, UPSTREAM = "builtin", "upstream"  # words of --tools


@cache
def builtin_tools() -> tuple[ToolFunction, ...]:
    functions = (calculate, convert, add_days, days_between, weekday, add_minutes, remember, recall, look_up, search)
    return tuple(tool_of(function) for function in functions)


@cache
def upstream_tools() -> tuple[ToolFunction, ...]:
    functions = (
        calculate_math,
        unit_converter,
        get_current_weather,
        get_current_time,
        get_exchange_rate,
        translate_text,
    )
    return tuple(tool_of(function) for function in functions)


_KITS = {BUILTIN: builtin_tools, UPSTREAM: upstream_tools}


def named_tools(names: Iterable[str]) -> list[ToolFunction]:
    """The tools of --tools: "builtin", "upstream", the user's at "package.module:name", or "mcp:COMMAND or URL" of an
    MCP server. Raises ValueError, one line that names the word, if there are none or two have one name."""
    found: list[ToolFunction] = []
    for name in names:
        try:
            found += _KITS[name]() if name in _KITS else (mcp_tools if name.startswith(PREFIX) else user_tools)(name)
            by_name(found)
        except ValueError as error:
            raise ValueError(f"--tools {error}") from None
    return found


_WEATHER = {
    "北京": (28, "晴"), "上海": (15, "多云"), "广州": (32, "闷热"), "深圳": (30, "晴"), "杭州": (22, "阴"),
    "成都": (18, "小雨"), "武汉": (25, "多云"), "南京": (20, "晴"), "西安": (16, "大风"), "重庆": (26, "阴"),
    "tokyo": (12, "晴"), "new york": (8, "多云"), "london": (5, "小雨"), "paris": (10, "阴"), "sydney": (25, "晴朗"),
}  # fmt: skip
_HOURS = {
    "asia/shanghai": "14:30", "america/new_york": "01:30", "europe/london": "06:30", "asia/tokyo": "15:30",
    "europe/paris": "07:30", "australia/sydney": "17:30",
}  # fmt: skip
_RATES = {
    "USD CNY": 7.21, "EUR CNY": 7.85, "GBP CNY": 9.12, "JPY CNY": 0.048, "USD EUR": 0.92, "USD GBP": 0.79,
    "CNY JPY": 20.83, "AUD CNY": 4.72,
}  # fmt: skip
_UNITS = {
    "km miles": 0.621371, "miles km": 1.60934, "kg pounds": 2.20462, "pounds kg": 0.453592, "meters feet": 3.28084,
    "feet meters": 0.3048, "celsius fahrenheit": 1.8, "fahrenheit celsius": 0.5556,
}  # fmt: skip
_WORDS = {
    ("你好世界", "english"): "Hello World", ("good morning", "chinese"): "早上好",
    ("今天天气真好", "english"): "The weather is nice today", ("i love programming", "chinese"): "我喜欢编程",
    ("机器学习很有趣", "english"): "Machine learning is interesting", ("happy birthday", "chinese"): "生日快乐",
}  # fmt: skip


def calculate_math(expression: str) -> dict:
    """The value of an arithmetic expression."""
    return {"result": calculate(expression)}


def unit_converter(value: float, from_unit: str, to_unit: str) -> dict:
    """A value in another unit."""
    factor = _known(_UNITS, f"{from_unit.strip().lower()} {to_unit.strip().lower()}", "conversion")
    return {"result": round(value * factor, 4)}


def get_current_weather(location: str) -> dict:
    """Weather in a city."""
    degrees, sky = _known(_WEATHER, location.strip().lower(), "city")
    return {"city": location, "temperature": f"{degrees}°C", "humidity": "65%", "condition": sky}


def get_current_time(timezone: str = "Asia/Shanghai") -> dict:
    """Date and time in a time zone."""
    return {"datetime": f"2025-03-07 {_known(_HOURS, timezone.strip().lower(), 'time zone')}:00", "timezone": timezone}


def get_exchange_rate(from_currency: str, to_currency: str) -> dict:
    """What a currency is worth in another."""
    pair = f"{from_currency.strip().upper()} {to_currency.strip().upper()}"
    return {"from": from_currency, "to": to_currency, "rate": _known(_RATES, pair, "pair of currencies")}


def translate_text(text: str, target_language: str) -> dict:
    """A text in another language."""
    key = text.strip().lower(), target_language.strip().lower()
    return {"translated_text": _known(_WORDS, key, "text and language")}


def _known(table: Mapping[Any, Any], key: Any, kind: str) -> Any:
    if key not in table:
        raise ValueError(f"the {kind} {key if isinstance(key, str) else ' '.join(key)} is not known")
    return table[key]
