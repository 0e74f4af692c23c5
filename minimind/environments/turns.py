"""Turns with tools: reading the calls of a reply, and the token ids between that turn and the next one.

The chat template writes a call as <tool_call>{"name": ..., "arguments": {...}}</tool_call>.

New ids are appended to those of a conversation, which is never encoded again from its text, so training sees exactly
the sampled ids. Only the template's text after the token that ends the assistant's turn is needed: the tool messages
and the header of the next turn. This text does not depend on earlier turns.

Tool output is untrusted. Names of special tokens in it, <|im_end|> as well as </tool_response>, are encoded as ordinary
characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from minimind.rewards.rules import misfit, parse_json
from minimind.tokenization import Tokenizer

Problem = Literal["malformed", "unknown", "arguments", "raised", "timeout", "died"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
_LONGEST = 60  # an error repeats at most this many characters of the model's text


@dataclass(frozen=True)
class ParsedCall:
    """A call that a model wrote. problem: the mistake that keeps it from being run, else None; error: the same in
    words, for the model."""

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | None = None
    error: str = ""


def read_calls(text: str, offered: Mapping[str, Mapping[str, Any]]) -> list[ParsedCall]:
    """The calls of a reply in their order, without those inside its reasoning. offered: the JSON schema of each tool's
    arguments, by tool name. An opening or closing mark without its partner counts as a malformed call."""
    said = text.rpartition("</think>")[2]
    calls = [_read(found, offered) for found in _CALL.findall(said)]
    rest = _CALL.sub("", said)
    if OPEN in rest or CLOSE in rest:
        calls.append(_wrong("malformed", "a call that is not closed, or not opened"))
    return calls


def read_call(name: str, arguments: str, offered: Mapping[str, Mapping[str, Any]]) -> ParsedCall:
    """A call as an API has it, with its arguments as JSON text."""
    try:
        value = parse_json(arguments) if arguments.strip() else {}
    except ValueError:
        return _wrong("malformed", f"the arguments are not JSON: {_shown(arguments)}", name)
    return _checked(name, value, offered)


def without_calls(text: str) -> str:
    """The text of a reply without its calls."""
    return _CALL.sub("", text).strip()


def _read(text: str, offered: Mapping[str, Mapping[str, Any]]) -> ParsedCall:
    try:
        value = parse_json(text)
    except ValueError:
        return _wrong("malformed", f"the call is not JSON: {_shown(text)}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or set(value) - {"name", "arguments"}:
        return _wrong("malformed", 'a call is {"name": ..., "arguments": {...}}')
    return _checked(value["name"], value.get("arguments", {}), offered)


def _checked(name: str, arguments: Any, offered: Mapping[str, Mapping[str, Any]]) -> ParsedCall:
    if name not in offered:
        return _wrong("unknown", f"there is no tool {_shown(name)}; choose from {', '.join(offered) or 'none'}", name)
    wrong = misfit(arguments, {"type": "object"} | dict(offered[name]), "arguments")
    if wrong is not None:
        return _wrong("arguments", wrong, name)
    return ParsedCall(name, arguments)


def _wrong(problem: Problem, error: str, name: str = "") -> ParsedCall:
    return ParsedCall(name, {}, problem, f"error: {error}")


def _shown(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}..."


_GUARD = "\ufdd0"  # a noncharacter, inserted into names of special tokens in tool output
_QUESTION = {"role": "user", "content": "?"}
_EXAMPLE_CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}


class ToolTurns:
    """Encodes the messages between an assistant's turns. thinking: the template variable enable_thinking; None leaves
    it undefined. Raises ValueError, one line, if the template is invalid or does not render a conversation message by
    message."""

    def __init__(self, tokenizer: Tokenizer, thinking: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self._variables: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._eos = tokenizer.token_of(tokenizer.eos_token_id)
        text = self._render([_QUESTION, _EXAMPLE_CALL])
        end = text.rfind(self._eos)
        if end < 0:
            raise ValueError(f"chat template: an assistant's turn with a call does not end with {self._eos!r}")
        self._before, self._after = text[: end + len(self._eos)], text[end + len(self._eos) :]
        self.text(["?"])

    def holds_special(self, text: str) -> bool:
        """Whether `text` contains the name of a special token."""
        return self._special.search(text) is not None

    def text(self, results: Sequence[str]) -> str:
        """The text after the end of the assistant's turn: a message for each result and the header of the next turn."""
        return self._following(results).replace(_GUARD, "")

    def ids(self, results: Sequence[str]) -> list[int]:
        """The ids of `text(results)`, with names of special tokens in the results as ordinary characters."""
        return self._encoded(self._following(results))

    def opening(self, system: str, tools: Sequence[Any]) -> list[int]:
        """Ids of the beginning of a conversation: its system message, with the tools on offer."""
        return self._encoded(self._render([{"role": "system", "content": self._guarded(system)}], tools=tools))

    def question(self, text: str) -> list[int]:
        """Ids of a user's message and the header of the assistant's turn, to append to `opening` or `closing`."""
        system = {"role": "system", "content": "?"}
        before = self._render([system])
        whole = self._render([system, {"role": "user", "content": self._guarded(text)}], add_generation_prompt=True)
        if not whole.startswith(before):
            raise ValueError("chat template: it renders a system message differently if a question follows")
        return self._encoded(whole[len(before) :])

    def closing(self, ended: bool) -> list[int]:
        """Ids between an assistant's turn and the next question; ended: whether the turn already has its end token."""
        return [*([] if ended else [self.tokenizer.eos_token_id]), *self._plain(self._after)]

    def _guarded(self, text: str) -> str:
        """`text` with the guard inserted into names of special tokens."""
        return self._special.sub(_broken, text.replace(_GUARD, "\ufffd"))

    def _encoded(self, text: str) -> list[int]:
        """Token ids of a guarded text."""
        ids: list[int] = []
        position = 0
        for special in self._special.finditer(text):
            ids += self._plain(text[position : special.start()])
            ids.append(self.tokenizer.special_tokens[special.group()])
            position = special.end()
        return ids + self._plain(text[position:])

    def _following(self, results: Sequence[str]) -> str:
        """As `text`, with the guard inserted into names of special tokens in the results."""
        guarded = [self._guarded(result) for result in results]
        messages = [{"role": "tool", "content": result} for result in guarded]
        text = self._render([_QUESTION, _EXAMPLE_CALL, *messages], add_generation_prompt=True)
        if not text.startswith(self._before):
            raise ValueError("chat template: it renders an assistant's turn differently if tool results follow")
        following = text[len(self._before) :]
        if any(result not in following for result in guarded):
            raise ValueError("chat template: it changes the text of a tool result")
        return following

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text.replace(_GUARD, ""), allow_special=False) if text else []

    def _render(self, messages: list[dict[str, Any]], **more: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, **self._variables, **more)


def _broken(name: re.Match[str]) -> str:
    return name[0][0] + _GUARD + name[0][1:]
