"""A Python function of one's own as a reward."""

from __future__ import annotations

import importlib
import os
import sys

from minimind.rewards.sample import Reward


def function_reward(path: str) -> Reward:
    """The function at "package.module:function", found from the working directory or where Python looks for packages.
    It takes a list of `Sample`s and returns as many numbers. ValueError where there is none."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"function={path}: write function=package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: it may fail in any way
        raise ValueError(
            f"function={path}: cannot import {module_name} ({type(error).__name__}: {error})"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"function={path}: {module_name} has no function {name!r}")
    return found
