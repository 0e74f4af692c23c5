"""A folder for `ollama create`: model.gguf and a Modelfile, with the chat template in Go's template language.

The words around each turn are read off the tokenizer's own template, by rendering conversations of marks; put together
again they must give what the template renders, or the template is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minimind.config import ModelConfig
from minimind.export.hf import SAMPLING
from minimind.tokenization import Tokenizer

_SYSTEM, _USER, _REPLY, _RESULT = (
    {"role": role, "content": mark}
    for role, mark in (("system", "%SYS%"), ("user", "%USR%"), ("assistant", "%RPL%"), ("tool", "%RES%"))
)
_AGAIN = {"role": "user", "content": "%AGN%"}
_TOOLS = [{"type": "function", "function": {"name": f"%T{i}%"}} for i in "12"]
_NONE_OR_SOME: tuple[list[Any], ...] = ([], _TOOLS)
_CALL: dict[str, Any] = {"function": {"name": "%CAL%", "arguments": {"%KEY%": 1}}}
_CALLED = {"role": "assistant", "content": "%SAY%", "tool_calls": [_CALL, _CALL]}
_JSON = [json.dumps(x) for x in (*_TOOLS, _CALL["function"]["arguments"])]
_MARKED: tuple[list[dict[str, Any]], ...] = (
    [_USER], [_SYSTEM, _USER], [_USER, _REPLY, _AGAIN], [_SYSTEM, _USER, _REPLY, _AGAIN],
    [_USER, _CALLED, _RESULT, _REPLY, _AGAIN],
)  # fmt: skip

_GO_TEMPLATE = """\
{{- if .Tools }}@before_system@
{{- if .System }}{{ .System }}@joint@{{ end }}@before_tools@
{{- range $i, $tool := .Tools }}{{ if $i }}@between_tools@{{ end }}{{ $tool }}{{ end }}@after_tools@@after_system@
{{- else if .System }}@before_system@{{ .System }}@after_system@
{{- else }}@default_system@
{{- end }}
{{- range .Messages }}
{{- if eq .Role "user" }}@before_user@{{ .Content }}@after_user@
{{- else if eq .Role "assistant" }}@before_assistant@{{ .Content }}{{ $content := .Content }}
{{- range $i, $call := .ToolCalls }}{{ if or $content $i }}@before_call@{{ end }}@name@{{ $call.Function.Name }}
{{- ""}}@arguments@{{ $call.Function.Arguments }}@after_call@{{ end }}@after_assistant@
{{- else if eq .Role "tool" }}@before_result@{{ .Content }}@after_result@
{{- end }}
{{- end }}@opening@"""


@dataclass(frozen=True)
class Turns:
    """What stands before and after: a system, user, assistant and tool turn's text; the list of tools, after the
    system's text and `joint`; a call's arguments, after its name. default_system: the system turn where none is given.
    opening: the header of an answer. between_tools, before_call: between two of them, or after an answer's text."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    result: tuple[str, str]
    tools: tuple[str, str]
    call: tuple[str, str, str]
    default_system: str
    opening: str
    joint: str
    between_tools: str
    before_call: str

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = ()) -> str:
        """The conversation as the Modelfile's template writes it, an answer opened."""
        parts = []
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        if tools:
            offered = self.between_tools.join(map(json.dumps, tools))
            parts += [self.system[0], system, self.joint if system else "", self.tools[0], offered]
            parts += [self.tools[1], self.system[1]]
        else:
            parts += [self.system[0], system, self.system[1]] if system else [self.default_system]
        for message in messages:
            around = {"user": self.user, "assistant": self.assistant, "tool": self.result}.get(
                message["role"]
            )
            if around is not None:
                calls = [self._call(call["function"]) for call in message.get("tool_calls", ())]
                text = self.before_call.join(([message["content"]] if message["content"] else []) + calls)
                parts += [around[0], text, around[1]]
        return "".join([*parts, self.opening])

    def _call(self, function: dict[str, Any]) -> str:
        before, middle, after = self.call
        return f"{before}{function['name']}{middle}{json.dumps(function['arguments'])}{after}"

    def go_template(self) -> str:
        """The same in Go's text/template, on what ollama hands over (its docs/template.md)."""
        words = {
            "default_system": self.default_system, "opening": self.opening, "joint": self.joint,
            "between_tools": self.between_tools, "before_call": self.before_call, "name": self.call[0],
            "arguments": self.call[1], "after_call": self.call[2],
        }  # fmt: skip
        for turn in ("system", "tools", "user", "assistant", "result"):
            before, after = getattr(self, turn)
            words |= {f"before_{turn}": before, f"after_{turn}": after}
        return re.sub(r"@(\w+)@", lambda match: _quoted(words[match[1]]), _GO_TEMPLATE)


def read_turns(tokenizer: Tokenizer) -> Turns:
    """What the chat template puts around turns; ValueError where it is more than turn after turn."""

    def render(*messages: Any, **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, **options)

    try:
        turns = _read_turns(render)
    except ValueError as error:
        raise ValueError(
            f"--to ollama: this chat template cannot be taken apart into turns ({error}); {_OTHERWISE}"
        ) from None
    for messages in _MARKED:
        for tools in _NONE_OR_SOME:
            wanted = render(*messages, tools=tools or None, add_generation_prompt=True)
            if turns.render(messages, tools) != wanted:
                raise ValueError(
                    f"--to ollama: this chat template is more than turn after turn; {_OTHERWISE}"
                )
    return turns


def modelfile(config: ModelConfig, tokenizer: Tokenizer) -> str:
    """The Modelfile beside model.gguf."""
    stop = tokenizer.token_of(tokenizer.eos_token_id)
    parameters = {"num_ctx": config.max_position_embeddings, "stop": json.dumps(stop), **SAMPLING}
    return "\n".join(
        [
            "FROM ./model.gguf",
            f'TEMPLATE """{read_turns(tokenizer).go_template()}"""',
            *(f"PARAMETER {name} {value}" for name, value in parameters.items()),
            "",
        ]
    )


_OTHERWISE = "write --to gguf, which keeps the template itself, and a Modelfile by hand"


def _read_turns(render: Any) -> Turns:
    asked = render(_USER)
    start, after_user = _split(asked, "%USR%")
    before_user = _split(render(_USER, _AGAIN), "%USR%", "%AGN%")[1].removeprefix(after_user)
    before_system, between, _ = _split(render(_SYSTEM, _USER), "%SYS%", "%USR%")
    answered = render(_USER, _REPLY)
    reply = _split(answered.removeprefix(asked), "%RPL%")
    first, second, arguments = _JSON
    offered = _split(render(_USER, tools=_TOOLS), first, second, "%USR%")
    after_system = between.removesuffix(before_user)
    before_tools = offered[0].removeprefix(before_system)
    joint = _split(render(_SYSTEM, _USER, tools=_TOOLS), "%SYS%", first)[1].removesuffix(before_tools)
    called = _split(
        render(_USER, _CALLED).removeprefix(asked), "%SAY%", "%CAL%", arguments, "%CAL%", arguments
    )
    after_call = called[5].removesuffix(reply[1])
    before_call, head = _joint_and_head(called[1], called[3].removeprefix(after_call))
    return Turns(
        system=(before_system, after_system),
        user=(before_user, after_user),
        assistant=(reply[0], reply[1]),
        result=_pair(_split(render(_USER, _REPLY, _RESULT).removeprefix(answered), "%RES%")),
        tools=(before_tools, offered[2].removesuffix(before_user).removesuffix(after_system)),
        call=(head, called[2], after_call),
        default_system=start.removesuffix(before_user),
        opening=render(_USER, add_generation_prompt=True).removeprefix(asked),
        joint=joint,
        between_tools=offered[1],
        before_call=before_call,
    )


def _joint_and_head(after_text: str, after_call: str) -> tuple[str, str]:
    """A call is parted from what stands before it by white space, the same after text as after a call."""
    if after_text != after_call:
        raise ValueError("a call after text and one after a call differ")
    head = after_text.lstrip()
    return after_text.removesuffix(head), head


def _pair(parts: Sequence[str]) -> tuple[str, str]:
    before, after = parts
    return before, after


def _split(text: str, *marks: str) -> list[str]:
    """The text before, between and after the marks, each of them there once and in this order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(f"it leaves out {mark}")
        parts.append(before)
    return [*parts, text]


def _quoted(text: str) -> str:
    """A Go action that writes `text`, nothing for nothing. JSON's strings are Go's but for the escaped solidus."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
