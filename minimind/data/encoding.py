"""Recipes that turn rows of a file into documents, and documents into token ids and loss codes.

`TextRecipe` is for pretraining, `ConversationRecipe` for chats and `PreferenceRecipe` for pairs of answers. The cache
(cache.py) runs them.

The loss code of a token in a conversation is one byte in the token cache that says whether it is a target. The low two
bits are a class: NONE is no target, TARGET has weight 1, MARKER has a weight that is chosen when the data is loaded.
The bit TURN_END marks the last token of an assistant turn, after which a conversation may be cut. The bit SIDE marks
the first token of the second conversation of a preference pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from minimind.data.fields import Messages
from minimind.data.formats import AUTO, RowFormat
from minimind.data.reader import BadRows, Document, Position, iter_rows, read_documents, reason_of, reporter
from minimind.tokenization import ChatEncoder, Tokenizer
from minimind.tokenization.chat_encoder import EncodedChat, Message, TemplatePiece

DocumentT = TypeVar("DocumentT", bound=Document)
SIDES = ("chosen", "rejected")
NONE, TARGET, MARKER, SIDE, TURN_END = 0, 1, 2, 0x40, 0x80
_CLASS = 3


def loss_codes(trained: np.ndarray, markers: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint8 [tokens], from three bool [tokens]: the targets, the markers among them, and the ends of turns."""
    return (trained.astype(np.uint8) + (trained & markers)) | np.where(ends, TURN_END, 0).astype(np.uint8)


def class_of(code: np.ndarray) -> np.ndarray:
    """NONE, TARGET or MARKER of each code."""
    return code & _CLASS


@dataclass(frozen=True, eq=False)
class Encoded:
    """Documents one after the other: tokens uint16 [tokens], lengths int64 [documents], and codes uint8 [tokens], the
    loss code of each token, or None where every token is a target."""

    tokens: np.ndarray
    lengths: np.ndarray
    codes: np.ndarray | None = None


class Recipe(Protocol[DocumentT]):
    """Reads the documents of one kind of file and encodes them. `weighted`: whether `encode` returns codes."""

    @property
    def weighted(self) -> bool: ...
    @property
    def vocab_size(self) -> int: ...
    def key(self) -> list[Any]:
        """Everything that the tokens depend on besides the file."""

    def read(self, path: Path, on_bad_row: str, start: Position, bad: BadRows | None) -> Iterator[DocumentT]: ...
    def encode(self, documents: list[DocumentT]) -> Encoded: ...


@dataclass(frozen=True)
class TextRecipe:
    """Plain text becomes bos, text, eos. Names of special tokens in the text are encoded as plain text."""

    tokenizer: Tokenizer
    row_format: RowFormat = AUTO
    weighted = False

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def key(self) -> list[Any]:
        tokens = [self.tokenizer.fingerprint, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return [*tokens, *self.row_format.key()]

    def read(self, path: Path, on_bad_row: str, start: Position, bad: BadRows | None) -> Iterator[Document]:
        return read_documents(path, on_bad_row, start, bad, self.row_format)

    def encode(self, documents: list[Document]) -> Encoded:
        ids = self.tokenizer.encode_batch([document.text for document in documents], allow_special=False)
        texts = [np.asarray(row, np.uint16) for row in ids]
        lengths = np.array([len(row) for row in texts]) + 2
        ends = lengths.cumsum()
        tokens = np.empty(int(ends[-1]), np.uint16)
        inner = np.ones(len(tokens), bool)
        inner[ends - lengths] = inner[ends - 1] = False
        tokens[ends - lengths], tokens[ends - 1] = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        tokens[inner] = np.concatenate(texts)
        return Encoded(tokens, lengths)


@dataclass(frozen=True)
class ConversationDocument(Document):
    """text: the rendered conversation; num_bytes counts the trained bytes; pieces: the parts of the text."""

    pieces: Sequence[TemplatePiece] = ()


@dataclass(frozen=True)
class ConversationRecipe:
    """Conversations in upstream MiniMind's format, rendered by the chat template. Only the assistant's turns are
    targets.

    A row is {"conversations": [message, ...]}. A message has "role" (system, user, assistant or tool) and "content"; a
    system message may have "tools", an assistant message "reasoning_content" and "tool_calls". Tools and tool calls are
    JSON or strings of JSON. fields.py lists the other fields, formats.py the formats of other programs.
    """

    encoder: ChatEncoder
    row_format: RowFormat = AUTO
    weighted = True

    @property
    def vocab_size(self) -> int:
        return self.encoder.vocab_size

    def key(self) -> list[Any]:
        return ["conversations", 1, self.encoder.fingerprint, *self.row_format.key()]

    def read(self, path: Path, on_bad_row: str, start: Position, bad: BadRows | None) -> Iterator[ConversationDocument]:
        report = reporter(path, on_bad_row, bad)
        for line, end, row in iter_rows(path, start, report):
            try:
                pieces = self.encoder.pieces(self.row_format.conversation(row))
                text = _text_of(pieces)
                text.encode()
            except ValueError as error:
                report(line, reason_of(error))
                continue
            yield ConversationDocument(text, _trained_bytes(pieces), line, end, pieces)

    def encode(self, documents: list[ConversationDocument]) -> Encoded:
        rows = self.encoder.encode([document.pieces for document in documents])
        codes = [loss_codes(row.trained, row.markers, row.ends) for row in rows]
        return Encoded(_joined_ids(rows), np.array([len(row.ids) for row in rows]), np.concatenate(codes))


@dataclass(frozen=True)
class PairDocument(Document):
    """text: both rendered conversations; num_bytes counts the trained bytes; sides: the pieces of each; prompt: the
    messages that both begin with."""

    sides: tuple[Sequence[TemplatePiece], ...] = ()
    prompt: Sequence[Message] = ()


@dataclass(frozen=True)
class PreferenceRecipe:
    """Pairs of answers, one preferred to the other, in upstream MiniMind's format.

    A row is {"chosen": [message, ...], "rejected": [message, ...]}, with messages as in ConversationRecipe. Both sides
    end with the assistant, and the first message in which they differ is the assistant's, so that they answer the same
    prompt. As in upstream, all turns of the assistant are targets, including those that both sides share: these cancel
    in a difference of sums (dpo) and count in an average over tokens (ipo, simpo, orpo). "weight": 0 leaves a message
    out.

    A pair is one document in the token cache: the tokens of the chosen conversation, then those of the rejected one.
    The code SIDE marks the first token of the second.

    longest: the tokens of a row. The prompt of a longer pair is cut at its beginning, on both sides alike, so that the
    answers stay whole. The loader leaves out a pair whose answers alone are longer. None cuts nothing.
    share: whether a row stores the common prefix of both sides once.
    """

    encoder: ChatEncoder
    longest: int | None = None
    share: bool = True
    row_format: RowFormat = AUTO
    weighted = True

    @property
    def vocab_size(self) -> int:
        return self.encoder.vocab_size

    def key(self) -> list[Any]:
        whole = ["preferences", 1, self.encoder.fingerprint, *self.row_format.key()]
        return whole if self.longest is None else [*whole, "cut", 1, self.longest, self.share]

    def read(self, path: Path, on_bad_row: str, start: Position, bad: BadRows | None) -> Iterator[PairDocument]:
        report = reporter(path, on_bad_row, bad)
        for line, end, row in iter_rows(path, start, report):
            try:
                chosen, rejected = self.row_format.pair(row)
                shared = _check_prompt(chosen, rejected)
                sides = tuple(self._pieces(*side) for side in zip(SIDES, (chosen, rejected), strict=True))
                texts = [_text_of(pieces) for pieces in sides]
                text = "".join(texts)
                text.encode()
                if texts[0] == texts[1]:
                    raise ValueError("chosen and rejected are the same, so that neither can be preferred")
            except ValueError as error:
                report(line, reason_of(error))
                continue
            yield PairDocument(text, sum(map(_trained_bytes, sides)), line, end, sides, chosen[:shared])

    def encode(self, documents: list[PairDocument]) -> Encoded:
        rows = self.encoder.encode([side for document in documents for side in document.sides])
        if self.longest is not None:
            for i, document in enumerate(documents):
                rows[2 * i : 2 * i + 2] = self._shortened(document, rows[2 * i], rows[2 * i + 1], self.longest)
        codes = [loss_codes(row.trained, row.markers, row.ends) for row in rows]
        for first in codes:
            first[0] = NONE  # no token before it predicts it
        for second in codes[1::2]:
            second[0] = SIDE
        lengths = np.array([len(row.ids) for row in rows]).reshape(-1, 2).sum(1)
        return Encoded(_joined_ids(rows), lengths, np.concatenate(codes))

    def _shortened(
        self, pair: PairDocument, chosen: EncodedChat, rejected: EncodedChat, longest: int
    ) -> list[EncodedChat]:
        """Both sides, with the prompt cut so that the pair has at most `longest` tokens if that is possible."""
        sides = [chosen, rejected]
        common = common_tokens(chosen.ids, rejected.ids, chosen.trained, rejected.trained)
        excess = row_tokens(len(chosen.ids), len(rejected.ids), common if self.share else 0) - longest
        if excess <= 0:
            return sides
        keep = self.encoder.shorten(pair.prompt, pair.sides[0], excess if self.share else -(-excess // 2))
        if keep is None:
            return sides
        removed = np.flatnonzero(~keep)
        if removed[-1] >= common:  # the template renders the same prompt in two ways
            return sides
        return [
            replace(side, **{name: np.delete(array, removed) for name, array in vars(side).items()}) for side in sides
        ]

    def _pieces(self, name: str, messages: Messages) -> list[TemplatePiece]:
        try:
            return self.encoder.pieces(messages)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def common_tokens(a: np.ndarray, b: np.ndarray, codes_a: np.ndarray, codes_b: np.ndarray) -> int:
    """Length of the prefix of two sides, `a` and `b`, that a row may store once.

    The prefix has equal ids and equal codes. It leaves out its own last token, which has a different target in each
    side, and at least two tokens of the shorter side.
    """
    shorter = min(len(a), len(b))
    differs = (a[:shorter] != b[:shorter]) | (codes_a[:shorter] != codes_b[:shorter])
    equal = int(differs.argmax()) if differs.any() else shorter
    return max(0, min(equal - 1, shorter - 2))


def row_tokens(chosen: Any, rejected: Any, shared: Any) -> Any:
    """Tokens of a row that a pair takes, given the tokens of each side: the last token of a side predicts nothing."""
    return chosen + rejected - 2 - shared


def _text_of(pieces: Sequence[TemplatePiece]) -> str:
    return "".join(piece.text for piece in pieces)


def _trained_bytes(pieces: Sequence[TemplatePiece]) -> int:
    return sum(len(piece.text.encode()) for piece in pieces if piece.trained)


def _joined_ids(rows: Sequence[EncodedChat]) -> np.ndarray:
    return np.concatenate([row.ids for row in rows]).astype(np.uint16)


def _check_prompt(chosen: Messages, rejected: Messages) -> int:
    """The number of messages that both sides begin with. Raises ValueError if they answer different prompts."""
    both = zip(chosen, rejected, strict=False)
    shared = min(len(chosen), len(rejected))
    number = next((i for i, (a, b) in enumerate(both) if a != b), shared)
    roles = [side[number]["role"] for side in (chosen, rejected) if number < len(side)]
    if any(role != "assistant" for role in roles):
        raise ValueError(
            f"chosen and rejected first differ in message {number}, of the {roles[0]}; both must answer the same prompt"
        )
    return number
