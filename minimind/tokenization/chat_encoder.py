"""Encode conversations as token ids, with a mask of the tokens that the assistant wrote.

The mask is never guessed from the tokens. The place of an assistant turn follows from rendering the conversation up to
the turn and through it, or from the template's `{% generation %}` marks. Control tokens in the contents are marked
while rendering, so that a user who types "<|im_end|>" gets ordinary characters. Markup that is not a control token,
such as <think> and <tool_call>, is always encoded as its token, since reasoning data has it in the contents.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from minimind.tokenization.chat_template import MARKS, Message, marks_generation, parse_list, parse_messages
from minimind.tokenization.tokenizer import Tokenizer

FORMAT_VERSION = 1
MARKERS = ("<think>", "</think>", "<answer>", "</answer>")  # the loss on reasoning data may weigh them more
THINK, END_THINK, ANSWER, END_ANSWER = MARKERS
_MARKER = re.compile("|".join(map(re.escape, MARKERS)))
_GUARDS = [chr(code) for code in range(0xFDD0, 0xFDEE)]  # noncharacters: no text should hold them


@dataclass(frozen=True)
class TemplatePiece:
    """A part of a rendered conversation. trained: whether it is a target; control: whether names of control tokens in
    it are encoded as these tokens, or else as plain text."""

    text: str
    trained: bool
    control: bool = True


@dataclass(frozen=True, eq=False)
class EncodedChat:
    """An encoded conversation; all arrays are [length], the last three bool.

    trained: the assistant's tokens, including the token that ends its turn. markers: the trained tokens that are part
    of one of MARKERS. ends: the last token of each assistant turn.
    """

    ids: np.ndarray
    trained: np.ndarray
    markers: np.ndarray
    ends: np.ndarray


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template. Raises ValueError if it has none.

    variables: further variables of the template, such as enable_thinking.
    """

    def __init__(self, tokenizer: Tokenizer, **variables: Any) -> None:
        self.tokenizer, self.variables = tokenizer, variables
        self._template = tokenizer.require_chat_template()
        self._marked = marks_generation(self._template)
        control = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._eos = tokenizer.token_of(tokenizer.eos_token_id)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that determines the ids and masks of a conversation."""
        parts = [FORMAT_VERSION, self.tokenizer.fingerprint, self._template, sorted(self.variables.items())]
        parts += [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def pieces(self, messages: Sequence[Message]) -> list[TemplatePiece]:
        """The rendered conversation, up to the end of the last assistant turn that is trained on.

        Each assistant turn is trained on, from after the header of the generation prompt through its end token, except
        messages with "train": False (the template does not see this field). Raises ValueError if the template fails, no
        assistant turn is trained on, or the turns cannot be located.
        """
        parsed = _with_text(messages)
        text, spans, guard = self._guarded(parsed, self._spans)
        if not spans:
            raise ValueError("no assistant turn to train on")
        train = [message.get("train", True) for message in messages if message["role"] == "assistant"]
        if all(train):
            train = [True] * len(spans)
        elif len(train) != len(spans):
            raise ValueError(
                "chat template: {% generation %} does not mark each message of the assistant once, so that single "
                "messages cannot be left out of training"
            )
        elif not any(train):
            raise ValueError("every message of the assistant has weight 0; none is trained on")
        out, place = [], 0
        while not train[-1]:
            train.pop()
        for (start, stop), trained in zip(spans, train, strict=False):
            out += self._split(text[place:start], False, guard) + self._split(text[start:stop], trained, guard)
            place = stop
        return out

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | str | None = None) -> list[int]:
        """Token ids of a conversation, followed by the header of the assistant's next turn."""
        return self.encode([self.prompt_pieces(messages, tools)])[0].ids.tolist()

    def prompt_pieces(
        self, messages: Sequence[Message], tools: Sequence[Any] | str | None = None
    ) -> list[TemplatePiece]:
        """The text of `prompt`, before encoding."""

        def render(contents: list[Any]) -> tuple[str, list[tuple[int, int]]]:
            guarded_messages, guarded_tools = contents
            return self._render(guarded_messages, tools=guarded_tools, add_generation_prompt=True), []

        text, _, guard = self._guarded([_with_text(messages), parse_list(tools, "tools")], render)
        return self._split(text, False, guard)

    def encode(self, conversations: Sequence[Sequence[TemplatePiece]]) -> list[EncodedChat]:
        """Encode the pieces of several conversations at once, on all cores."""
        flat = [piece for pieces in conversations for piece in pieces]
        ids: list[np.ndarray] = [np.empty(0)] * len(flat)
        for control in (True, False):
            picked = [i for i, piece in enumerate(flat) if piece.control == control]
            texts = [flat[i].text for i in picked]
            mode: Any = True if control else "markup"
            for i, row in zip(picked, self.tokenizer.encode_batch(texts, allow_special=mode), strict=True):
                ids[i] = row
        rows, place = [], 0
        for pieces in conversations:
            rows.append(self._joined(pieces, ids[place : place + len(pieces)]))
            place += len(pieces)
        return rows

    def shorten(self, prompt: Sequence[Message], pieces: Sequence[TemplatePiece], excess: int) -> np.ndarray | None:
        """bool [tokens of `pieces`]: the tokens to keep so that `prompt`, with which `pieces` begins, loses at least
        `excess` tokens and is still a conversation.

        Whole exchanges (a question and its answer) are removed from the beginning, then the beginning of the first
        question that stays. System messages, headers, end tokens and the end of the last question stay. None if so many
        tokens cannot be removed, or the template does not render the prompt message by message.
        """
        text, spans = _exchanges(self._render, _with_text(prompt))
        if not spans or not "".join(piece.text for piece in pieces).startswith(text):
            return None
        parts, place = [], 0
        for piece in pieces:
            mode: Any = True if piece.control else "markup"
            parts.append(place + self.tokenizer.offsets(piece.text, allow_special=mode))
            place += len(piece.text)
        offsets = np.concatenate(parts)
        return _kept(spans, offsets[:, 0], offsets[:, 1], excess)

    def _joined(self, pieces: Sequence[TemplatePiece], ids: Sequence[np.ndarray]) -> EncodedChat:
        lengths = [len(row) for row in ids]
        trained = np.repeat([piece.trained for piece in pieces], lengths)
        markers, ends = np.zeros(len(trained), bool), trained.copy()
        ends[:-1] &= ~trained[1:]
        place = 0
        for piece, row in zip(pieces, ids, strict=True):
            if piece.trained and "<" in piece.text and _MARKER.search(piece.text):
                markers[place : place + len(row)] = self._in_marker(piece)
            place += len(row)
        return EncodedChat(np.concatenate(ids), trained, markers, ends)

    def _in_marker(self, piece: TemplatePiece) -> np.ndarray:
        """bool [tokens]: whether each token overlaps one of MARKERS. <answer> is several tokens, and the first and last
        may hold more characters."""
        mode: Any = True if piece.control else "markup"
        offsets = self.tokenizer.offsets(piece.text, allow_special=mode)
        inside = np.zeros(len(offsets), bool)
        for match in _MARKER.finditer(piece.text):
            inside |= (offsets[:, 0] < match.end()) & (offsets[:, 1] > match.start())
        return inside

    def _split(self, text: str, trained: bool, guard: str) -> list[TemplatePiece]:
        """The pieces of a rendered text; a single one if no content holds the name of a control token."""
        if not text:
            return []
        if guard not in text or not guard:
            return [TemplatePiece(text, trained)]
        pieces, place = [], 0
        for match in self._control.finditer(text):
            pieces += [TemplatePiece(text[place : match.start()].replace(guard, ""), trained, control=False)]
            pieces += [TemplatePiece(match.group(), trained)]
            place = match.end()
        pieces.append(TemplatePiece(text[place:].replace(guard, ""), trained, control=False))
        return [piece for piece in pieces if piece.text]

    def _guarded(
        self, contents: list[Any], render: Callable[[list[Any]], tuple[str, list[tuple[int, int]]]]
    ) -> tuple[str, list[tuple[int, int]], str]:
        """(text, spans, guard) of `render`. If a content holds the name of a control token, a noncharacter (the guard)
        breaks that name, so that all remaining names are the template's. Without the guard the text is the plain
        one."""
        if not any(self._control.search(text) for text in _strings(contents)):
            return *render(contents), ""
        everything = "".join(_strings(contents))
        guard = next((g for g in _GUARDS if g not in everything), None)
        if guard is None:
            raise ValueError(
                "a content holds the name of a control token and every noncharacter U+FDD0 to U+FDED; remove one"
            )
        text, spans = render(_map_strings(contents, lambda s: self._control.sub(lambda m: _broken(m[0], guard), s)))
        plain, _ = render(contents)
        if text.replace(guard, "") != plain:
            raise ValueError(
                "a content holds the name of a control token, and the chat template treats it as more than text"
            )
        return text, spans, guard

    def _spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """(text, its spans that the assistant wrote, end tokens included)."""
        if self._marked:
            return self._marked_spans(messages)
        text = self._render(messages)
        spans = []
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:k])
                after = text if k + 1 == len(messages) else self._render(messages[: k + 1])
                spans.append(self._answer(text, before, after, k))
        return text, spans

    def _answer(self, text: str, before: str, after: str, number: int) -> tuple[int, int]:
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"chat template: the whole conversation does not begin with the text of the first {number + 1} "
                "messages, so that answers cannot be located; mark them in the template with {% generation %}"
            )
        start = len(before) + len(self._header)
        if not after.startswith(self._header, len(before)):
            raise ValueError(
                f"chat template: message {number}, of the assistant, does not begin with {self._header!r} as its "
                "generation prompt does; mark the answers in the template with {% generation %}"
            )
        end = after.rfind(self._eos, start)
        if end < 0 or after[end + len(self._eos) :].strip():
            raise ValueError(
                f"chat template: message {number}, of the assistant, does not end with {self._eos!r}; "
                "mark the answers in the template with {% generation %}"
            )
        return start, end + len(self._eos)

    @cached_property
    def _header(self) -> str:
        """The generation prompt up to the first markup such as <think>: the model learns to write that itself, as
        upstream trains it, whether or not a prompt contains it."""
        question = [{"role": "user", "content": "?"}]
        plain, opened = self._render(question), self._render(question, add_generation_prompt=True)
        if not opened.startswith(plain) or opened == plain:
            raise ValueError(
                "chat template: add_generation_prompt adds nothing to the end, so that answers cannot be located; "
                "mark them in the template with {% generation %}"
            )
        header = opened[len(plain) :]
        markup = self.tokenizer.special_tokens.keys() - self.tokenizer.control_tokens.keys()
        return header[: min((header.find(m) for m in markup if m in header), default=len(header))]

    def _marked_spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        marked = self._render(messages, mark_generation=True)
        opening, closing = MARKS
        text, spans, start = "", [], 0
        for part in re.split(f"([{opening}{closing}])", marked):
            if part == opening:
                start = len(text)
            elif part == closing:
                spans.append((start, len(text)))
            else:
                text += part
        if text != self._render(messages):
            raise ValueError("chat template: a content holds one of the noncharacters U+FDEE and U+FDEF")
        # many templates do not mark the token that ends a turn; without it a model would never stop
        eos = self._eos
        spans = [(a, b + len(eos) if text.startswith(eos, b) else b) for a, b in spans]
        return text, [(a, b) for a, b in spans if b > a]

    def _render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, **self.variables, **variables)


def _with_text(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The parsed messages without "train", with contents in parts joined: the parts could spell a control token."""
    parsed = parse_messages(messages)
    for message in parsed:
        message.pop("train", None)
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = (part if isinstance(part, str) else (part.get("text") or "") for part in content)
            message["content"] = "".join(parts)
    return parsed


def _broken(name: str, guard: str) -> str:
    return name[0] + guard + name[1:]


def _strings(value: Any) -> list[str]:
    """Every string in nested lists and objects, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    if isinstance(value, Sequence):
        return [text for part in value for text in _strings(part)]
    return []


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {_map_strings(k, function): _map_strings(v, function) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(part, function) for part in value]
    return value


class Exchange(NamedTuple):
    """Character positions in a rendered prompt: the beginning of a user message with its header, and the range
    first..last of its content."""

    begin: int
    first: int
    last: int


def _exchanges(
    render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]]
) -> tuple[str, list[Exchange]]:
    """(rendered prompt, its exchanges); no exchange if the template does not render the prompt message by message."""
    text = render(messages)
    spans: list[Exchange] = []
    for k, message in enumerate(messages):
        if message["role"] != "user":
            continue
        before, after = render(messages[:k]) if k else "", render(messages[: k + 1])
        content = (message.get("content") or "").strip()
        first = text.rfind(content, len(before), len(after))
        if not content or first < 0 or not (text.startswith(after) and after.startswith(before)):
            return text, []
        spans.append(Exchange(len(before), first, first + len(content)))
    if len(spans) > 1 and spans[0].begin == 0:  # text that the template puts before the first message stays
        header = text[spans[1].begin : spans[1].first]
        if not text.endswith(header, 0, spans[0].first):
            return text, []
        spans[0] = spans[0]._replace(begin=spans[0].first - len(header))
    return text, spans


def _kept(spans: Sequence[Exchange], begins: np.ndarray, ends: np.ndarray, excess: int) -> np.ndarray | None:
    """bool [tokens]: the tokens to keep so that at least `excess` are removed; None if so many cannot be removed.
    Token i covers the characters begins[i]..ends[i]."""
    keep = np.ones(len(begins), bool)
    for i, (begin, first, last) in enumerate(spans):
        content = np.flatnonzero((begins >= first) & (ends <= last))
        count = excess
        while count < len(content) and begins[content[count]] < ends[content[count] - 1]:
            count += 1  # not within a character of several tokens
        if count < len(content):
            keep[content[:count]] = False
            return keep
        if i + 1 == len(spans):
            return None
        removed = (begins >= begin) & (ends <= spans[i + 1].begin)
        keep[removed] = False
        excess -= int(removed.sum())
        if excess <= 0:
            return keep
    return None
