"""An object of the user's own, by the path of its module."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def named_object(path: str, kind: str, word: str = "") -> Any:
    """What stands at "package.module:name", found from the working directory or where Python looks for packages. kind:
    what it is; word: what stands before `path` where it is named. Both are for the ValueError, one line, where there is
    no such object."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{word}{path}: write {word}package.module:{kind}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: it may fail in any way
        raise ValueError(f"{word}{path}: cannot import {module_name} ({type(error).__name__}: {error})") from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"{word}{path}: {module_name} has no {kind} {name!r}") from None
