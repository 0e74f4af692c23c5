"""Conversations in upstream MiniMind's format, to learn the assistant's part of.

A row of a .jsonl file (plain, .gz or .zst) is {"conversations": [message, ...]}; a message has "role" (system, user,
assistant or tool) and "content", a system message perhaps "tools", an assistant's perhaps "reasoning_content" and
"tool_calls"; tools and tool calls are JSON or strings of JSON. fields.py says what else a row may have, forms.py in
which other forms it may come.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from minimind.data import loss_mask as weights
from minimind.data.build import PART_BYTES
from minimind.data.cache import open_cached
from minimind.data.corpus import Corpus
from minimind.data.forms import AUTO, Form
from minimind.data.reader import iter_rows
from minimind.data.recipes import Encoded, Vocabulary
from minimind.data.records import BadRows, Document, Position, reason_of, reporter


class ChatPiece(Protocol):
    """A part of a rendered conversation, and whether the assistant is to learn it."""

    @property
    def text(self) -> str: ...
    @property
    def trained(self) -> bool: ...


class EncodedChat(Protocol):
    """ids, and bool arrays of the same length: minimind.tokenization.conversation says what each means."""

    ids: np.ndarray
    trained: np.ndarray
    markers: np.ndarray
    ends: np.ndarray


class ChatEncoder(Vocabulary, Protocol):
    """What is needed of minimind.tokenization.ChatEncoder."""

    def pieces(self, messages: Sequence[Any]) -> Sequence[Any]: ...
    def encode(self, conversations: Sequence[Any]) -> Sequence[Any]: ...
    def shorten(self, prompt: Sequence[Any], pieces: Sequence[Any], excess: int) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Conversation(Document):
    """text: the rendered conversation, of which num_bytes are learnt; pieces: its parts."""

    pieces: Sequence[Any] = ()


@dataclass(frozen=True)
class Conversations:
    """The recipe of conversations: rendered by the chat template, targets in the assistant's turns alone."""

    encoder: ChatEncoder
    form: Form = AUTO
    weighted = True

    @property
    def vocabulary(self) -> Vocabulary:
        return self.encoder

    def key(self) -> list[Any]:
        return ["conversations", 1, self.encoder.fingerprint, *self.form.key()]

    def read(self, path: Path, on_bad_row: str, start: Position, bad: BadRows | None) -> Iterator[Conversation]:
        report = reporter(path, on_bad_row, bad)
        for line, end, row in iter_rows(path, start, report):
            try:
                pieces = self.encoder.pieces(self.form.conversation(row))
                text = "".join(piece.text for piece in pieces)
                text.encode()
                learnt = sum(len(piece.text.encode()) for piece in pieces if piece.trained)
            except ValueError as error:
                report(line, reason_of(error))
                continue
            yield Conversation(text, learnt, line, end, pieces)

    def encode(self, documents: list[Conversation]) -> Encoded:
        rows = self.encoder.encode([document.pieces for document in documents])
        parts = [weights.codes(row.trained, row.markers, row.ends) for row in rows]
        tokens = np.concatenate([row.ids for row in rows]).astype(np.uint16)
        return Encoded(tokens, np.array([len(row.ids) for row in rows]), np.concatenate(parts))


def open_conversations(
    paths: Sequence[str | Path],
    encoder: ChatEncoder,
    cache_dir: str | Path | None = None,
    on_bad_row: str = "error",
    console: Console | None = None,
    part_bytes: int = PART_BYTES,
    form: Form = AUTO,
) -> Corpus:
    """The conversations of `paths` as tokens with loss weights; the cache is that of `open_corpus`, its errors too.

    A conversation ends with its last assistant turn. Raises ValueError, naming file:line, also on a conversation
    without an assistant turn, an unknown role or field, an empty message, and tools that are not JSON.
    """
    recipe = Conversations(encoder, form)
    return open_cached(paths, recipe, (".jsonl",), cache_dir, on_bad_row, console, part_bytes)
