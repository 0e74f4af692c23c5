"""What the chat template puts between an assistant's turn with calls and its next one, as token ids.

The ids of a conversation are appended to, never made again from its text: what is trained on is what was sampled. So
all that is needed of the template is what stands behind the token that ends the assistant's turn: the tool's messages
and the header of the next turn. It does not depend on what came before.

A tool's words are the world's. The names of special tokens in them, <|im_end|> as well as </tool_response>, are
ordinary characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from minimind.tokenization import Tokenizer

_GUARD = "\ufdd0"  # a noncharacter, which breaks the names of special tokens in what tools say
_ASKED = {"role": "user", "content": "?"}
_CALLED = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}


class ToolTurns:
    """thinking: the template's enable_thinking, None where it is not named. ValueError, one line, for a template that
    is none or does not render a conversation message by message."""

    def __init__(self, tokenizer: Tokenizer, thinking: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self._variables: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._eos = tokenizer.token_of(tokenizer.eos_token_id)
        text = self._render([_ASKED, _CALLED])
        end = text.rfind(self._eos)
        if end < 0:
            raise ValueError(f"chat template: an assistant's turn with a call does not end with {self._eos!r}")
        self._before, self._behind = text[: end + len(self._eos)], text[end + len(self._eos) :]
        self.text(["?"])

    def holds_special(self, text: str) -> bool:
        """Whether a text spells the name of a special token."""
        return self._special.search(text) is not None

    def text(self, results: Sequence[str]) -> str:
        """What follows the end of the assistant's turn, a message for each result, up to its next turn."""
        return self._following(results).replace(_GUARD, "")

    def ids(self, results: Sequence[str]) -> list[int]:
        """The same as token ids; `text` encoded, where no result spells a special token."""
        return self._encoded(self._following(results))

    def opening(self, system: str, tools: Sequence[Any]) -> list[int]:
        """The beginning of a conversation: its system message, with the tools on offer."""
        return self._encoded(self._render([{"role": "system", "content": self._guarded(system)}], tools=tools))

    def question(self, text: str) -> list[int]:
        """A user's message and the header of the assistant's turn, to stand behind `opening` or `closing`."""
        system = {"role": "system", "content": "?"}
        before = self._render([system])
        whole = self._render([system, {"role": "user", "content": self._guarded(text)}], add_generation_prompt=True)
        if not whole.startswith(before):
            raise ValueError("chat template: it renders a system message differently once a question follows")
        return self._encoded(whole[len(before) :])

    def closing(self, ended: bool) -> list[int]:
        """What stands behind an assistant's turn in front of the next question; ended: whether the turn's end token is
        there already."""
        return [*([] if ended else [self.tokenizer.eos_token_id]), *self._plain(self._behind)]

    def _guarded(self, text: str) -> str:
        """With a guard in the names of special tokens."""
        return self._special.sub(_broken, text.replace(_GUARD, "\ufffd"))

    def _encoded(self, text: str) -> list[int]:
        """A guarded text as token ids."""
        found: list[int] = []
        place = 0
        for special in self._special.finditer(text):
            found += self._plain(text[place : special.start()])
            found.append(self.tokenizer.special_tokens[special.group()])
            place = special.end()
        return found + self._plain(text[place:])

    def _following(self, results: Sequence[str]) -> str:
        """With a guard in the names of special tokens that the results spell."""
        guarded = [self._guarded(result) for result in results]
        messages = [{"role": "tool", "content": result} for result in guarded]
        text = self._render([_ASKED, _CALLED, *messages], add_generation_prompt=True)
        if not text.startswith(self._before):
            raise ValueError("chat template: it renders an assistant's turn differently once tools have answered")
        following = text[len(self._before) :]
        if any(result not in following for result in guarded):
            raise ValueError("chat template: it does not show a tool's words as they are")
        return following

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text.replace(_GUARD, ""), allow_special=False) if text else []

    def _render(self, messages: list[dict[str, Any]], **more: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, **self._variables, **more)


def _broken(name: re.Match[str]) -> str:
    return name[0][0] + _GUARD + name[0][1:]
