"""A small memory of the conversation's own: names and what they stand for."""

from __future__ import annotations

from typing import Any

_MOST = 100  # names
_LONGEST = 200  # characters of a name or a value


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
