"""The forms of rows: ours, and those of other programs under --format.

    auto        {"text"}, {"conversations": [{"role", "content"}]} or {"chosen": [...], "rejected": [...]}, as upstream
    messages    OpenAI and Hugging Face: {"messages": [...]}; trl: {"prompt": [...], "completion": [...]}, of which the
                prompt is not learnt, and {"prompt": [...], "chosen": [...], "rejected": [...]}; OpenAI's preferences:
                {"input": {"messages", "tools"}, "preferred_output": [...], "non_preferred_output": [...]}
    sharegpt    ShareGPT and LLaMA-Factory: {"conversations": [{"from": "human", "value": ...}]}, in preferences also
                "chosen" and "rejected", a turn each
    alpaca      Stanford Alpaca and LLaMA-Factory: {"instruction", "input", "output", "history": [[question, answer]]},
                in preferences "chosen" and "rejected" for "output"

Beside them any form takes the fields of fields.py. A row of another form is an error that names the flag; it is never
guessed, as what a field means is not to be seen from its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from minimind.data.fields import (
    LEARNT,
    VERSION,
    Messages,
    check_row,
    cleaned,
    is_empty,
    listed,
    messages_of,
    with_row_fields,
)
from minimind.data.records import kind_of

FormatName = Literal["auto", "messages", "sharegpt", "alpaca"]
Row = dict[str, Any]
# "from" of ShareGPT's turns: upstream names of it, and LLaMA-Factory's.
SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
}
_BESIDE = ("system", "tools")


@dataclass(frozen=True)
class Form:
    """How the rows of a file are read. ignored: fields of rows and messages that are left out; checked: whether a field
    that would be lost is an error, and those of fields.py are used: runs that an earlier version began do neither."""

    name: FormatName = "auto"
    ignored: tuple[str, ...] = ()
    checked: bool = True

    def key(self) -> list[Any]:
        """For what is kept of rows read in this form."""
        return ["fields", VERSION, self.name, sorted(set(self.ignored))] if self.checked else []

    def ours(self, row: Row) -> Row:
        """The row in our own form, without ignored fields."""
        row = {name: value for name, value in row.items() if name not in self.ignored}
        if self.name == "auto":
            _refuse_foreign(row)
            return row
        return _CONVERTERS[self.name](row)

    def text(self, row: Row) -> str:
        """Of a row for pretraining."""
        if "text" not in row:
            raise ValueError(f'no field "text" (fields: {", ".join(list(row)[:4])[:80] or "none"})')
        text = row["text"]
        if not isinstance(text, str):
            raise ValueError(f'field "text" is {kind_of(text)}, not a string')
        if not text or text.isspace():
            raise ValueError('field "text" is empty')
        if self.checked:
            check_row(row, ("text", *self.ignored))
        return text

    def conversation(self, row: Row) -> Messages:
        """The messages; LEARNT says which are not learnt."""
        if not self.checked:
            return messages_of(row, "conversations")
        row = _without_copies(self.ours(row))
        messages = cleaned(messages_of(row, "conversations"), self.ignored)
        check_row(row, ("conversations", "loss_mask", *_BESIDE))
        return with_row_fields(messages, row)

    def pair(self, row: Row) -> tuple[Messages, Messages]:
        """The chosen messages and the rejected ones."""
        row = _without_copies(self.ours(row)) if self.checked else row
        chosen, rejected = (self._side(row, name) for name in ("chosen", "rejected"))
        if self.checked:
            check_row(row, ("chosen", "rejected", *_BESIDE))
        return chosen, rejected

    def prompt(self, row: Row) -> tuple[Messages, Any, Row]:
        """(the messages to answer, what the assistant's turn behind them says or None, all other fields)."""
        row = self.ours(row)
        messages = row.pop("conversations", None)
        said = None
        last = messages[-1] if isinstance(messages, list) and messages else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            said, messages = last.get("content"), messages[:-1]
            if not messages:
                raise ValueError("nothing stands before the assistant's turn, so that it answers nothing")
            cleaned([last], self.ignored)
        whole = row if messages is None else {"conversations": messages}
        asked = cleaned(messages_of(whole, "conversations"), self.ignored)
        asked = with_row_fields(asked, {name: row.pop(name, None) for name in _BESIDE})
        for message in asked:
            message.pop(LEARNT, None)  # nothing of a prompt is learnt
        return asked, said, row

    def texts(self, row: Row) -> list[Any]:
        """Every content of a row of any kind: strings, and values that the chat template writes as JSON."""
        row = _without_copies(self.ours(row))
        if "text" in row:
            return [self.text(row)]
        fields = [name for name in ("conversations", "chosen", "rejected") if name in row]
        if not fields:
            raise ValueError('none of the fields "text", "conversations", "chosen" and "rejected"')
        found = []
        for name in fields:
            messages = listed(row, name)
            wrong = next((m for m in messages if not isinstance(m, dict)), None)
            if wrong is not None:
                raise ValueError(f'field "{name}" holds {kind_of(wrong)}, not a message object')
            for message in cleaned(messages, self.ignored):
                found += [message.get(n) for n in ("content", "reasoning_content", "tools", "tool_calls")]
        check_row(row, (*fields, "loss_mask", "reference", *_BESIDE))
        return [*found, *(row.get(name) for name in (*_BESIDE, "reference"))]

    def _side(self, row: Row, name: str) -> Messages:
        try:
            messages = messages_of(row, name)
            if self.checked:
                messages = with_row_fields(cleaned(messages, self.ignored), row)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name in row else str(error)) from None
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{name}: the last message is of the {messages[-1]['role']}, not of the assistant")
        if LEARNT in messages[-1]:
            raise ValueError(f"{name}: its answer is said not to be learnt, so that nothing can be preferred")
        return messages


AUTO = Form()


def _refuse_foreign(row: Row) -> None:
    name = _foreign(row)
    if name is not None:
        raise ValueError(f"rows of this form are read with --format {name}")


def _foreign(row: Row) -> FormatName | None:
    """Which of the forms of others a row has, as far as can be told."""
    ours = row.get("conversations") or row.get("chosen")
    first = ours[0] if isinstance(ours, list) and ours else ours
    if isinstance(first, dict) and "from" in first and "role" not in first:
        return "sharegpt"
    if "text" in row or "conversations" in row:
        return None
    if isinstance(row.get("instruction"), str):
        return "alpaca"
    if isinstance(row.get("prompt"), list) or "preferred_output" in row or ("messages" in row and not ours):
        return "messages"
    return None


def _without_copies(row: Row) -> Row:
    """The row without what Hugging Face's sets say twice: a "prompt" that a user's message is, "messages" that are the
    chosen ones."""
    said = row.get("conversations") or row.get("chosen")
    asked = [m.get("content") for m in said if isinstance(m, dict)] if isinstance(said, list) else []
    copies = {"prompt": row.get("prompt") in asked, "messages": row.get("messages") == said}
    return {name: value for name, value in row.items() if not copies.get(name)}


def _from_messages(row: Row) -> Row:
    row = _without_copies(row)
    if "preferred_output" in row:
        asked = row.pop("input", None)
        if not isinstance(asked, dict):
            raise ValueError('no object "input" with the messages before "preferred_output"')
        check_row(asked, ("messages", "tools"))
        row["tools"] = asked.get("tools") or row.get("tools")
        before = listed(asked, "messages")
        for side, name in (("chosen", "preferred_output"), ("rejected", "non_preferred_output")):
            row[side] = before + listed(row, name)
            row.pop(name)
    elif "chosen" in row:
        before = listed(row, "prompt") if not is_empty(row.get("prompt")) else []
        row.pop("prompt", None)
        for side in ("chosen", "rejected"):
            row[side] = before + listed(row, side)
    elif "prompt" in row and "messages" not in row:
        before, said = listed(row, "prompt"), listed({"completion": [], **row}, "completion")
        row = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
        row["conversations"] = [_silent(m) if said else m for m in before] + said
    else:
        row["conversations"] = listed(row, "messages")
        row.pop("messages")
    return _each_message(row, _openai_message)


def _from_sharegpt(row: Row) -> Row:
    row = dict(row)
    if "chosen" in row:
        before = listed(row, "conversations") if "conversations" in row else []
        row.pop("conversations", None)
        for side in ("chosen", "rejected"):
            turns = row.get(side)
            row[side] = before + (turns if isinstance(turns, list) else [turns])
    else:
        listed(row, "conversations")
    return _each_message(row, _sharegpt_turn)


def _from_alpaca(row: Row) -> Row:
    row = dict(row)
    asked = [_string(row, "instruction"), _string(row, "input") if not is_empty(row.get("input")) else ""]
    before: Messages = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError('field "history" is no list of [question, answer]')
        before += [_said("user", pair[0]), _said("assistant", pair[1])]
    before.append(_said("user", "\n".join(part for part in asked if part)))
    if "chosen" in row:
        for side in ("chosen", "rejected"):
            row[side] = [*before, _said("assistant", _string(row, side))]
    else:
        answer = [_said("assistant", row.pop("output"))] if "output" in row else []
        row["conversations"] = before + answer
    for name in ("instruction", "input", "history"):
        row.pop(name, None)
    return row


def _each_message(row: Row, convert: Callable[[int, Any], Any]) -> Row:
    fields = ("conversations", "chosen", "rejected")
    return {k: [convert(i, m) for i, m in enumerate(v)] if k in fields else v for k, v in row.items()}


def _openai_message(number: int, message: Any) -> Any:
    """Contents in parts as one string, OpenAI's newer name of the system."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else kind_of(part)
                raise ValueError(f"message {number}: a part of its content is {kind}; only text can be learnt")
        content = "".join(part["text"] for part in content)
    role = "system" if message.get("role") == "developer" else message.get("role")
    return {**message, "role": role, "content": content}


def _sharegpt_turn(number: int, turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    more = {name: value for name, value in turn.items() if name not in ("from", "value")}
    speaker = turn.get("from")
    if speaker not in SPEAKERS or "role" in more or "content" in more:
        raise ValueError(
            f'message {number} has "from": {speaker!r}; --format sharegpt reads "from" ({", ".join(SPEAKERS)}) '
            'and "value"'
        )
    said = _said(SPEAKERS[speaker], turn.get("value"))
    if speaker == "function_call":
        said = {"role": "assistant", "content": "", "tool_calls": turn.get("value")}
    return said | more


def _silent(message: Any) -> Any:
    """A message of a prompt, which is not learnt."""
    spoken = isinstance(message, dict) and message.get("role") == "assistant"
    return {**message, LEARNT: False} if spoken else message


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _string(row: Row, name: str) -> str:
    if name not in row:
        raise ValueError(f'no field "{name}" (fields: {", ".join(list(row)[:4])[:80] or "none"})')
    if not isinstance(row[name], str):
        raise ValueError(f'field "{name}" is {kind_of(row[name])}, not a string')
    return row[name]


_CONVERTERS: dict[str, Callable[[Row], Row]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
}
