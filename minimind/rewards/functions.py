"""A Python function of one's own as a reward."""

from __future__ import annotations

import importlib
import os
import sys
from numbers import Real
from typing import Any

import numpy as np

from minimind.rewards.base import Reward


def function_reward(path: str) -> Reward:
    """The function at "package.module:function", found from the working directory or where Python looks for packages.
    It takes a list of `Sample`s and returns as many numbers (`numbers_of`). ValueError where there is none."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"function={path}: write function=package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: it may fail in any way
        raise ValueError(f"function={path}: cannot import {module_name} ({type(error).__name__}: {error})") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"function={path}: {module_name} has no function {name!r}")
    return found


def numbers_of(said: Any, count: int) -> np.ndarray:
    """What a reward returned for `count` samples: float64 [count], None as NaN.

    said: a list or tuple, or an array or tensor of one dimension, of numbers; True is 1. ValueError, to stand behind
    the reward's name, for anything else.
    """
    values = said.tolist() if hasattr(said, "tolist") else said
    if not isinstance(values, list | tuple):
        raise ValueError(_wrong(f"{_shown(said)}, no list,", count))
    if len(values) != count:
        raise ValueError(_wrong(f"{len(values)} value{'' if len(values) == 1 else 's'}", count))
    return np.array([_number(value, count) for value in values])


def _number(value: Any, count: int) -> float:
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    if value is None:
        return float("nan")
    try:
        if isinstance(value, Real):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(_wrong(f"{_shown(value)}, no number,", count))


def _wrong(what: str, count: int) -> str:
    wanted = "a list of one number" if count == 1 else f"a list of {count} numbers, one for each"
    return f"returned {what} for {count} sample{'' if count == 1 else 's'}: it must return {wanted}"


def _shown(value: Any) -> str:
    """Its type and the beginning of what it is, in one line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # it is anybody's
        text = "that cannot be shown"
    kind = "" if value is None else f"{type(value).__name__} "
    return f"{kind}{text if len(text) <= 40 else f'{text[:40]}...'}"
