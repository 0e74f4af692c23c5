"""How a file of pretraining text becomes documents, and documents tokens; conversations are in conversations.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from minimind.data.forms import AUTO, Form
from minimind.data.reader import read_documents
from minimind.data.records import BadRows, Document, Position

DocumentT = TypeVar("DocumentT", bound=Document)


class Vocabulary(Protocol):
    """What the token cache has to know of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


class Encoder(Vocabulary, Protocol):
    """What is needed of a tokenizer for text."""

    @property
    def bos_token_id(self) -> int: ...
    @property
    def eos_token_id(self) -> int: ...
    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> Sequence[npt.ArrayLike]: ...


@dataclass(frozen=True, eq=False)
class Encoded:
    """Documents one after the other: tokens uint16 [tokens], lengths int64 [documents]; codes uint8 [tokens] says
    what each token is to the loss (weights.py), None where all are targets alike."""

    tokens: np.ndarray
    lengths: np.ndarray
    codes: np.ndarray | None = None


class Recipe(Protocol[DocumentT]):
    """Reads the documents of a kind of file and encodes them. `weighted`: whether `encode` gives codes."""

    @property
    def weighted(self) -> bool: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    def key(self) -> list[Any]:
        """What the tokens depend on besides the file."""

    def read(self, path: Path, on_bad_row: str, start: Position, bad: BadRows | None) -> Iterator[DocumentT]: ...
    def encode(self, documents: list[DocumentT]) -> Encoded: ...


@dataclass(frozen=True)
class Texts:
    """Documents of plain text: bos, text, eos. Special tokens written in the text are plain text."""

    tokenizer: Encoder
    form: Form = AUTO
    weighted = False

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer

    def key(self) -> list[Any]:
        tokens = [self.tokenizer.fingerprint, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return [*tokens, *self.form.key()]

    def read(self, path: Path, on_bad_row: str, start: Position, bad: BadRows | None) -> Iterator[Document]:
        return read_documents(path, on_bad_row, start, bad, self.form)

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
