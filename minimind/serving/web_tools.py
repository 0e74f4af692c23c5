"""The tools of the chat page: those that run here when the model calls them.

MINIMIND_TOOLS has the words of --tools as a JSON list; MINIMIND_RUN_UNASKED is not empty if calls run without asking.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from threading import Lock
from typing import Any

from minimind.environments.builtin import named_tools
from minimind.environments.running import ToolLimits, ToolRunner
from minimind.environments.turns import read_call
from minimind.serving.web_client import Call, ChatTurn

TOOLS_VARIABLE, YES_VARIABLE = "MINIMIND_TOOLS", "MINIMIND_RUN_UNASKED"
TURNS = 8  # of the model to one question, if nobody is asked
REFUSED = "error: the user does not allow this call"


class PageTools:
    """Runs calls of the page's visitors, one at a time. Raises ValueError, in one line, for unusable tools."""

    def __init__(self) -> None:
        named = named_tools(json.loads(os.environ.get(TOOLS_VARIABLE) or "[]"))
        self._runner, self._lock = ToolRunner(named, ToolLimits(workers=1)), Lock()
        self.asks = not os.environ.get(YES_VARIABLE)
        self.names = sorted(self._runner.tools)

    def schemas(self, names: Collection[str]) -> list[dict[str, Any]]:
        """Some of the tools, in OpenAI's form."""
        return [{"type": "function", "function": self._runner.tools[name].schema} for name in names]

    def run(self, calls: Sequence[Call], names: Collection[str], state: dict[str, Any]) -> list[ChatTurn]:
        """The results as turns. names: the tools on offer; state: the conversation's memory."""
        offered = {name: self._runner.tools[name].parameters for name in names}
        with self._lock:
            texts = [self._runner.run(read_call(each.name, each.arguments, offered), state).text for each in calls]
        return [ChatTurn("tool", text, call_id=call.id) for call, text in zip(calls, texts, strict=True)]


def may_go_on(turns: Sequence[ChatTurn]) -> bool:
    """Whether the model may call again unasked, after its turns to the last question."""
    since = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=0)
    return sum(turn.role == "assistant" for turn in turns[since:]) < TURNS
