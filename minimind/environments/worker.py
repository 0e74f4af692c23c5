"""A worker process for the user's tools, so that a tool that hangs or crashes harms nothing else.

`python -m minimind.environments.worker CHARACTERS SECONDS WORD ...` reads one call per line from standard input and
writes one result per line, both as JSON; a word is module:name or mcp:SERVER. Its first line says that the tools are
there, or why they are not. A tool's own output goes to standard error, and its standard input is empty. The process
ends with its parent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any

from minimind.environments.mcp import PREFIX, ServerGoneError, connected
from minimind.environments.tools import ToolFunction, ToolTimeoutError, by_name, user_tools

_WATCH = 1.0  # seconds between looks at the parent


def main(words: list[str], longest: int, seconds: float) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    calls, results = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    with ExitStack() as servers:
        try:
            tools = by_name([tool for word in words for tool in _loaded(word, seconds, servers)])
        except ValueError as error:
            _say(results, {"error": str(error)})
            return
        _say(results, {"ready": sorted(tools)})
        for line in calls:
            call = json.loads(line)
            _say(results, run(tools[call["name"]], call["arguments"], call["state"], longest, seconds))


def run(tool: Any, arguments: dict[str, Any], state: dict[str, Any], longest: int, seconds: float) -> dict[str, Any]:
    """Run one call. Returns {"text": at most `longest` characters for the model, "cut": whether it was longer,
    "problem": "raised", "timeout" or None, "state": the memory, unchanged if the tool failed}. seconds: the limit, for
    an error."""
    changed = json.loads(json.dumps(state))
    try:
        text, problem = tool(arguments, changed), None
        changed = json.loads(json.dumps(changed))
    except ToolTimeoutError:
        text, problem, changed = f"error: the tool took more than {seconds:g} s", "timeout", state
    except ServerGoneError:
        os._exit(1)  # the next process connects again
    except BaseException as error:  # user code may raise anything, SystemExit too
        text, problem, changed = described(error), "raised", state
    return {"text": text[:longest], "cut": len(text) > longest, "problem": problem, "state": changed}


def described(error: BaseException) -> str:
    """An exception as one line for the model."""
    words = " ".join(str(error).split())
    plain = isinstance(error, ValueError) and bool(words)
    return f"error: {words}" if plain else f"error: {type(error).__name__}: {words}".rstrip(": ")


def _loaded(word: str, seconds: float, servers: ExitStack) -> list[ToolFunction]:
    """The tools that `word` names; a connection to their server, if they have one, stays open as long as `servers`."""
    return servers.enter_context(connected(word, seconds)) if word.startswith(PREFIX) else user_tools(word)


def _say(results: Any, value: dict[str, Any]) -> None:
    results.write(json.dumps(value) + "\n")
    results.flush()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[3:], int(sys.argv[1]), float(sys.argv[2]))
