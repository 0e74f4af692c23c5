"""The Modelfile for `ollama create`, with the chat template in Go's template language.

The text around each turn is found by rendering conversations of placeholders with the tokenizer's own template. The
result must render these conversations exactly as the template does, or the template is refused.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
# OpenAI's wrapping of a function, where a template writes it, is part of the text around the function.
_JSON = [json.dumps(x) for x in (*(tool["function"] for tool in _TOOLS), _CALL["function"]["arguments"])]
_MARKED: tuple[list[dict[str, Any]], ...] = (
    [_USER],
    [_SYSTEM, _USER],
    [_USER, _REPLY, _AGAIN],
    [_SYSTEM, _USER, _REPLY, _AGAIN],
    [_USER, _CALLED, _RESULT, _REPLY, _AGAIN],
)

# Lines that begin with a hash are left out if the template has no tools.
_GO_TEMPLATE = """\
#{{- if .Tools }}@before_system@
#{{- if .System }}{{ .System }}@joint@{{ end }}@before_tools@
#{{- range $i, $t := .Tools }}{{ if $i }}@between_tools@{{ end }}{{ $t.Function }}{{ end }}@after_tools@@after_system@
#{{- else }}
{{- if .System }}@before_system@{{ .System }}@after_system@{{ else }}@default_system@{{ end }}
#{{- end }}
{{- range .Messages }}
{{- if eq .Role "user" }}@before_user@{{ .Content }}@after_user@
{{- else if eq .Role "assistant" }}@before_assistant@{{ .Content }}
#{{- $content := .Content }}{{ range $i, $call := .ToolCalls }}{{ if or $content $i }}@before_call@{{ end }}
#{{- ""}}@name@{{ $call.Function.Name }}@arguments@{{ $call.Function.Arguments }}@after_call@{{ end }}
{{- ""}}@after_assistant@
#{{- else if eq .Role "tool" }}@before_result@{{ .Content }}@after_result@
{{- end }}
{{- end }}@opening@"""


@dataclass(frozen=True)
class Tools:
    """The template's text around tools. offered: before and after the list of tools, which follows the system message
    and `joint`. result: before and after a tool turn's text. call: before, between and after a call's name and
    arguments. between: between two tools. before_call: between a call and the text or call before it."""

    offered: tuple[str, str]
    result: tuple[str, str]
    call: tuple[str, str, str]
    joint: str
    between: str
    before_call: str


@dataclass(frozen=True)
class Turns:
    """The template's text around turns: before and after a system, user and assistant message. default_system: the
    system turn if a conversation has none. opening: the header of an answer. tools: None if the template has none."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    default_system: str
    opening: str
    tools: Tools | None

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = ()) -> str:
        """The conversation as the Modelfile's template renders it, with the header of an answer at the end."""
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        parts = [self.system[0], system, self.system[1]] if system else [self.default_system]
        if tools and self.tools is not None:
            offered = self.tools.between.join(json.dumps(tool["function"]) for tool in tools)
            before, after = self.tools.offered
            head = [self.system[0], system, self.tools.joint if system else ""]
            parts = [*head, before, offered, after, self.system[1]]
        around = {"user": self.user, "assistant": self.assistant}
        if self.tools is not None:
            around["tool"] = self.tools.result
        for message in messages:
            before, after = around.get(message["role"], ("", ""))
            if message["role"] in around:
                parts += [before, self._answer(message), after]
        return "".join([*parts, self.opening])

    def _answer(self, message: dict[str, Any]) -> str:
        """A turn's text and its calls, separated by `before_call`."""
        texts = [message["content"]] if message["content"] else []
        if self.tools is None:
            return "".join(texts)
        before, middle, after = self.tools.call
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], json.dumps(call["function"]["arguments"])
            texts.append(f"{before}{name}{middle}{arguments}{after}")
        return self.tools.before_call.join(texts)

    def go_template(self) -> str:
        """The same as `render` in Go's text/template, with ollama's variables (docs/template.md in its repository)."""
        words = {"default_system": self.default_system, "opening": self.opening}
        pairs = {"system": self.system, "user": self.user, "assistant": self.assistant}
        lines = [line for line in _GO_TEMPLATE.splitlines() if self.tools is not None or line[0] != "#"]
        if self.tools is not None:
            pairs |= {"tools": self.tools.offered, "result": self.tools.result}
            words |= dict(zip(("name", "arguments", "after_call"), self.tools.call, strict=True))
            words |= {"joint": self.tools.joint, "between_tools": self.tools.between}
            words |= {"before_call": self.tools.before_call}
        for turn, (before, after) in pairs.items():
            words |= {f"before_{turn}": before, f"after_{turn}": after}
        text = "\n".join(line.removeprefix("#") for line in lines)
        return re.sub(r"@(\w+)@", lambda match: _quoted(words[match[1]]), text)


def read_turns(tokenizer: Tokenizer) -> Turns:
    """The text that the chat template puts around turns. ValueError if it is not a plain sequence of turns."""

    def render(*messages: Any, **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, **options)

    try:
        turns = _read_turns(render)
    except ValueError as error:
        raise ValueError(
            f"--to ollama: this chat template cannot be split into turns ({error}); {_OTHERWISE}"
        ) from None
    conversations = _MARKED if turns.tools is not None else _MARKED[:-1]  # the last one has calls
    for messages, tools in itertools.product(conversations, _NONE_OR_SOME):
        if turns.render(messages, tools) != render(*messages, tools=tools or None, add_generation_prompt=True):
            raise ValueError(f"--to ollama: this chat template is not a plain sequence of turns; {_OTHERWISE}")
    return turns


def modelfile(config: ModelConfig, tokenizer: Tokenizer) -> str:
    """The text of the Modelfile for model.gguf in the same folder."""
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


_OTHERWISE = "use --to gguf, which keeps the template itself, and write a Modelfile by hand"


def _read_turns(render: Any) -> Turns:
    question = render(_USER)
    start, after_user = _split(question, "%USR%")
    before_user = _split(render(_USER, _AGAIN), "%USR%", "%AGN%")[1].removeprefix(after_user)
    before_system, between, _ = _split(render(_SYSTEM, _USER), "%SYS%", "%USR%")
    turns = Turns(
        system=(before_system, between.removesuffix(before_user)),
        user=(before_user, after_user),
        assistant=_pair(_split(render(_USER, _REPLY).removeprefix(question), "%RPL%")),
        default_system=start.removesuffix(before_user),
        opening=render(_USER, add_generation_prompt=True).removeprefix(question),
        tools=None,
    )
    if render(_USER, tools=_TOOLS) == question:
        return turns
    return replace(turns, tools=_read_tools(render, turns))


def _read_tools(render: Any, turns: Turns) -> Tools:
    (before_system, after_system), before_user, after_reply = turns.system, turns.user[0], turns.assistant[1]
    first, second, arguments = _JSON
    question, answered = render(_USER), render(_USER, _REPLY)
    head, between, tail, _ = _split(render(_USER, tools=_TOOLS), first, second, "%USR%")
    before_tools = head.removeprefix(before_system)
    joint = _split(render(_SYSTEM, _USER, tools=_TOOLS), "%SYS%", first)[1].removesuffix(before_tools)
    marks = ("%SAY%", "%CAL%", arguments, "%CAL%", arguments)
    _, after_text, middle, after_first, _, end = _split(render(_USER, _CALLED).removeprefix(question), *marks)
    after_call = end.removesuffix(after_reply)
    before_call = after_text.lstrip()  # white space separates a call from the text before it
    if after_text != after_first.removeprefix(after_call):
        raise ValueError("a call after text and one after a call differ")
    return Tools(
        offered=(before_tools, tail.removesuffix(before_user).removesuffix(after_system)),
        result=_pair(_split(render(_USER, _REPLY, _RESULT).removeprefix(answered), "%RES%")),
        call=(before_call, middle, after_call),
        joint=joint,
        between=between,
        before_call=after_text.removesuffix(before_call),
    )


def _pair(parts: Sequence[str]) -> tuple[str, str]:
    before, after = parts
    return before, after


def _split(text: str, *marks: str) -> list[str]:
    """The text before, between and after the marks, which must occur in this order. ValueError if one is missing."""
    parts = []
    for mark in marks:
        before, separator, text = text.partition(mark)
        if not separator:
            raise ValueError(f"it leaves out {mark}")
        parts.append(before)
    return [*parts, text]


def _quoted(text: str) -> str:
    """A Go action that writes `text`; "" for an empty text. JSON strings are valid in Go except for the escaped \\/."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
