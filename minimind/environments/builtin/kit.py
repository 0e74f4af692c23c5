"""All built-in tools, and the tools that --tools names."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from minimind.environments.builtin import upstream
from minimind.environments.builtin.calculator import calculate
from minimind.environments.builtin.dates import add_days, add_minutes, days_between, weekday
from minimind.environments.builtin.library import search
from minimind.environments.builtin.memory import recall, remember
from minimind.environments.builtin.table import look_up
from minimind.environments.builtin.units import convert
from minimind.environments.tools import ToolFunction, by_name, tool_of, user_tools

BUILTIN, UPSTREAM = "builtin", "upstream"  # what --tools calls them


@cache
def builtin_tools() -> tuple[ToolFunction, ...]:
    functions = (calculate, convert, add_days, days_between, weekday, add_minutes, remember, recall, look_up, search)
    return tuple(tool_of(function) for function in functions)


@cache
def upstream_tools() -> tuple[ToolFunction, ...]:
    functions = (
        upstream.calculate_math,
        upstream.unit_converter,
        upstream.get_current_weather,
        upstream.get_current_time,
        upstream.get_exchange_rate,
        upstream.translate_text,
    )
    return tuple(tool_of(function) for function in functions)


_KITS = {BUILTIN: builtin_tools, UPSTREAM: upstream_tools}


def named_tools(names: Iterable[str]) -> list[ToolFunction]:
    """Those of --tools: "builtin", "upstream", and "package.module:name" of one's own. ValueError, one line, naming the
    word."""
    found: list[ToolFunction] = []
    for name in names:
        try:
            found += _KITS[name]() if name in _KITS else user_tools(name)
            by_name(found)
        except ValueError as error:
            raise ValueError(f"--tools {error}") from None
    return found
