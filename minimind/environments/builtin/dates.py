"""Arithmetic with dates and times of day."""

from __future__ import annotations

import re
from datetime import date, timedelta

from minimind.data.builtin.facts import DAYS

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
