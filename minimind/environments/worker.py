"""A worker process for the user's tools, so that a tool that hangs or crashes harms nothing else.

`python -m minimind.environments.worker CHARACTERS module:name ...` reads one call per line from standard input and
writes one result per line, both as JSON. Its first line says that the tools are imported, or why they are not. A tool's
own output goes to standard error, and its standard input is empty. The process ends with its parent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from minimind.environments.tools import by_name, user_tools

_WATCH = 1.0  # seconds between looks at the parent


def main(paths: list[str], longest: int) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    calls, results = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        tools = by_name([tool for path in paths for tool in user_tools(path)])
    except ValueError as error:
        _say(results, {"error": str(error)})
        return
    _say(results, {"ready": sorted(tools)})
    for line in calls:
        call = json.loads(line)
        _say(results, run(tools[call["name"]], call["arguments"], call["state"], longest))


def run(tool: Any, arguments: dict[str, Any], state: dict[str, Any], longest: int) -> dict[str, Any]:
    """Run one call. Returns {"text": at most `longest` characters for the model, "cut": whether it was longer,
    "problem": "raised" or None, "state": the memory, unchanged if the tool raised}."""
    changed = json.loads(json.dumps(state))
    try:
        text, problem = tool(arguments, changed), None
        changed = json.loads(json.dumps(changed))
    except BaseException as error:  # user code may raise anything, SystemExit too
        text, problem, changed = described(error), "raised", state
    return {"text": text[:longest], "cut": len(text) > longest, "problem": problem, "state": changed}


def described(error: BaseException) -> str:
    """An exception as one line for the model."""
    words = " ".join(str(error).split())
    plain = isinstance(error, ValueError) and bool(words)
    return f"error: {words}" if plain else f"error: {type(error).__name__}: {words}".rstrip(": ")


def _say(results: Any, value: dict[str, Any]) -> None:
    results.write(json.dumps(value) + "\n")
    results.flush()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[2:], int(sys.argv[1]))
