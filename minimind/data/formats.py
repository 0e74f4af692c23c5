"""Read rows in our own format, and convert those of other programs (--format).

    auto        {"text"}, {"conversations": [{"role", "content"}]} or {"chosen": [...], "rejected": [...]}, as upstream
    messages    OpenAI and Hugging Face: {"messages": [...]}; trl: {"prompt": [...], "completion": [...]}, which trains
                on the completion only, and {"prompt": [...], "chosen": [...], "rejected": [...]}; OpenAI's preferences:
                {"input": {"messages", "tools"}, "preferred_output": [...], "non_preferred_output": [...]}
    sharegpt    ShareGPT and LLaMA-Factory: {"conversations": [{"from": "human", "value": ...}]}; preferences also have
                "chosen" and "rejected", one turn each
    alpaca      Stanford Alpaca and LLaMA-Factory: {"instruction", "input", "output", "history": [[question, answer]]};
                preferences have "chosen" and "rejected" instead of "output"

Rows of every format may also have the fields of fields.py. A row in another format is an error that names the flag. The
format is never guessed, since the name of a field does not tell its meaning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from minimind.data.fields import (
    TRAIN,
    VERSION,
    Messages,
    check_row,
    cleaned,
    is_empty,
    kind_of,
    listed,
    messages_of,
    with_row_fields,
)

FormatName = Literal["auto", "messages", "sharegpt", "alpaca"]
Row = dict[str, Any]
# "from" in ShareGPT's turns, including LLaMA-Factory's names.
SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
}
_ROW_FIELDS = ("system", "tools")


@dataclass(frozen=True)
class RowFormat:
    """The format of the rows of a file. ignored: fields of rows and messages to drop. checked: whether an unknown field
    is an error and the fields of fields.py are used; False only for runs that an earlier version began."""

    name: FormatName = "auto"
    ignored: tuple[str, ...] = ()
    checked: bool = True

    def key(self) -> list[Any]:
        """The part of a cache key that depends on the format."""
        return ["fields", VERSION, self.name, sorted(set(self.ignored))] if self.checked else []

    def converted(self, row: Row) -> Row:
        """The row in our own format, without ignored fields."""
        row = {name: value for name, value in row.items() if name not in self.ignored}
        if self.name == "auto":
            _refuse_foreign(row)
            return row
        return _CONVERTERS[self.name](row)

    def text(self, row: Row) -> str:
        """The text of a row for pretraining."""
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
        """The messages; TRAIN is False in those that are not trained on."""
        if not self.checked:
            return messages_of(row, "conversations")
        row = _without_copies(self.converted(row))
        messages = cleaned(messages_of(row, "conversations"), self.ignored)
        check_row(row, ("conversations", "loss_mask", *_ROW_FIELDS))
        return with_row_fields(messages, row)

    def pair(self, row: Row) -> tuple[Messages, Messages]:
        """The chosen messages and the rejected ones."""
        row = _without_copies(self.converted(row)) if self.checked else row
        chosen, rejected = (self._side(row, name) for name in ("chosen", "rejected"))
        if self.checked:
            check_row(row, ("chosen", "rejected", *_ROW_FIELDS))
        return chosen, rejected

    def prompt(self, row: Row) -> tuple[Messages, Any, Row]:
        """(the messages to answer, the content of the assistant's turn after them or None, all other fields)."""
        row = self.converted(row)
        messages = row.pop("conversations", None)
        answer = None
        last = messages[-1] if isinstance(messages, list) and messages else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            answer, messages = last.get("content"), messages[:-1]
            if not messages:
                raise ValueError("there is no message before the assistant's turn")
            cleaned([last], self.ignored)
        whole = row if messages is None else {"conversations": messages}
        prompt = cleaned(messages_of(whole, "conversations"), self.ignored)
        prompt = with_row_fields(prompt, {name: row.pop(name, None) for name in _ROW_FIELDS})
        for message in prompt:
            message.pop(TRAIN, None)  # a prompt is never trained on
        return prompt, answer, row

    def texts(self, row: Row) -> list[Any]:
        """Every content in a row of any kind: strings, and values that the chat template writes as JSON."""
        row = _without_copies(self.converted(row))
        if "text" in row:
            return [self.text(row)]
        fields = [name for name in ("conversations", "chosen", "rejected") if name in row]
        if not fields:
            raise ValueError('none of the fields "text", "conversations", "chosen" and "rejected"')
        contents = []
        for name in fields:
            messages = listed(row, name)
            wrong = next((m for m in messages if not isinstance(m, dict)), None)
            if wrong is not None:
                raise ValueError(f'field "{name}" holds {kind_of(wrong)}, not a message object')
            for message in cleaned(messages, self.ignored):
                contents += [message.get(n) for n in ("content", "reasoning_content", "tools", "tool_calls")]
        check_row(row, (*fields, "loss_mask", "reference", *_ROW_FIELDS))
        return [*contents, *(row.get(name) for name in (*_ROW_FIELDS, "reference"))]

    def _side(self, row: Row, name: str) -> Messages:
        try:
            messages = messages_of(row, name)
            if self.checked:
                messages = with_row_fields(cleaned(messages, self.ignored), row)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name in row else str(error)) from None
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{name}: the last message is of the {messages[-1]['role']}, not of the assistant")
        if TRAIN in messages[-1]:
            raise ValueError(f"{name}: a flag says not to train on its answer; remove the flag or the row")
        return messages


AUTO = RowFormat()


def _refuse_foreign(row: Row) -> None:
    name = _foreign(row)
    if name is not None:
        raise ValueError(f"rows of this format are read with --format {name}")


def _foreign(row: Row) -> FormatName | None:
    """The format of another program that a row seems to have, or None."""
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
    """The row without fields that data sets on Hugging Face repeat: a "prompt" that is also the content of a message,
    and "messages" that equal the chosen ones."""
    messages = row.get("conversations") or row.get("chosen")
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    copies = {"prompt": row.get("prompt") in contents, "messages": row.get("messages") == messages}
    return {name: value for name, value in row.items() if not copies.get(name)}


def _from_messages(row: Row) -> Row:
    row = _without_copies(row)
    if "preferred_output" in row:
        prompt = row.pop("input", None)
        if not isinstance(prompt, dict):
            raise ValueError('no object "input" with the messages before "preferred_output"')
        check_row(prompt, ("messages", "tools"))
        row["tools"] = prompt.get("tools") or row.get("tools")
        before = listed(prompt, "messages")
        for side, name in (("chosen", "preferred_output"), ("rejected", "non_preferred_output")):
            row[side] = before + listed(row, name)
            row.pop(name)
    elif "chosen" in row:
        before = listed(row, "prompt") if not is_empty(row.get("prompt")) else []
        row.pop("prompt", None)
        for side in ("chosen", "rejected"):
            row[side] = before + listed(row, side)
    elif "prompt" in row and "messages" not in row:
        before, completion = listed(row, "prompt"), listed({"completion": [], **row}, "completion")
        row = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
        row["conversations"] = [_untrained(m) if completion else m for m in before] + completion
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
    question = [_string(row, "instruction"), _string(row, "input") if not is_empty(row.get("input")) else ""]
    before: Messages = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError('field "history" is not a list of [question, answer]')
        before += [_message("user", pair[0]), _message("assistant", pair[1])]
    before.append(_message("user", "\n".join(part for part in question if part)))
    if "chosen" in row:
        for side in ("chosen", "rejected"):
            row[side] = [*before, _message("assistant", _string(row, side))]
    else:
        answer = [_message("assistant", row.pop("output"))] if "output" in row else []
        row["conversations"] = before + answer
    for name in ("instruction", "input", "history"):
        row.pop(name, None)
    return row


def _each_message(row: Row, convert: Callable[[int, Any], Any]) -> Row:
    fields = ("conversations", "chosen", "rejected")
    return {k: [convert(i, m) for i, m in enumerate(v)] if k in fields else v for k, v in row.items()}


def _openai_message(number: int, message: Any) -> Any:
    """Join a content in parts into one string, and map the role "developer" to "system"."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else kind_of(part)
                raise ValueError(f"message {number}: a part of its content is {kind}; only text is supported")
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
    message = _message(SPEAKERS[speaker], turn.get("value"))
    if speaker == "function_call":
        message = {"role": "assistant", "content": "", "tool_calls": turn.get("value")}
    return message | more


def _untrained(message: Any) -> Any:
    """A message of a prompt, which is not trained on."""
    by_assistant = isinstance(message, dict) and message.get("role") == "assistant"
    return {**message, TRAIN: False} if by_assistant else message


def _message(role: str, content: Any) -> dict[str, Any]:
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
