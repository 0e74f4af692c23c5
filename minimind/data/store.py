"""Tokenized sources in memory-mapped files, and a corpus over them.

A source's folder holds `tokens.bin`, its documents one after the other as uint16, and `documents.bin`, int64
[num_documents + 1, 2]: token and UTF-8 byte offset of each document, and the two totals. Conversations also have
`codes.bin`, a byte for each token that says what it is to the loss (weights.py). `meta.json`, written last, marks it
complete.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, DOCUMENTS, CODES, META = "tokens.bin", "documents.bin", "codes.bin", "meta.json"
TOKEN_BYTES, ENTRY_BYTES = 2, 16


@dataclass(frozen=True, eq=False)
class Source:
    """One tokenized file: `tokens` uint16 [num_tokens], `index` int64 [num_documents + 1, 2], of conversations also
    `codes` uint8 [num_tokens]."""

    path: Path
    key: str
    tokens: np.ndarray
    index: np.ndarray
    meta: dict[str, Any]
    codes: np.ndarray | None = None

    @classmethod
    def open(cls, folder: Path, path: Path, meta: dict[str, Any]) -> "Source":
        """Map the files of `folder`, which `meta` describes and whose sizes have been checked."""
        tokens = np.memmap(folder / TOKENS, dtype="<u2", mode="r")
        index = np.memmap(folder / DOCUMENTS, dtype="<i8", mode="r").reshape(-1, 2)
        codes = None
        if meta.get("weighted"):
            codes = np.memmap(folder / CODES, dtype=np.uint8, mode="r").view(np.ndarray)
        return cls(path, folder.name, tokens.view(np.ndarray), index.view(np.ndarray), meta, codes)


@dataclass(frozen=True, eq=False)
class _Slice:
    """Documents first..stop of a source."""

    source: Source
    first: int
    stop: int

    def total(self, column: int) -> int:
        return int(self.source.index[self.stop, column] - self.source.index[self.first, column])


class Corpus:
    """Documents of several sources in order, numbered from 0. Holds no token in memory.

    A document's address is the place of its first token in the concatenation of all its corpus' tokens.
    """

    def __init__(self, slices: Sequence[_Slice]) -> None:
        self._slices = [piece for piece in slices if piece.stop > piece.first]
        self._first_document = np.cumsum([0] + [s.stop - s.first for s in self._slices])
        self._first_token = np.cumsum([0] + [s.total(0) for s in self._slices])
        self.num_documents = int(self._first_document[-1])
        self.num_tokens = int(self._first_token[-1])
        self.num_bytes = sum(s.total(1) for s in self._slices)

    @classmethod
    def of(cls, sources: Sequence[Source]) -> "Corpus":
        """All documents of `sources`."""
        return cls([_Slice(source, 0, len(source.index) - 1) for source in sources])

    @property
    def sources(self) -> list[Source]:
        """The sources that have documents here."""
        return [piece.source for piece in self._slices]

    @property
    def weighted(self) -> bool:
        """Whether each token has a code that says what it is to the loss."""
        return any(piece.source.codes is not None for piece in self._slices)

    @property
    def identity(self) -> int:
        """63 bits that change with the texts, their order and their tokenization."""
        text = repr([(s.source.key, s.first, s.stop) for s in self._slices])
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def document(self, i: int) -> np.ndarray:
        """uint16 [tokens]: document `i`, from its bos to its eos token, without a copy."""
        piece, number = self._locate(i)
        index = piece.source.index
        return piece.source.tokens[index[number, 0] : index[number + 1, 0]]

    def locate(self, i: int) -> tuple[Path, int]:
        """File of document `i`, and the document's number in it, from 0."""
        piece, number = self._locate(i)
        return piece.source.path, number

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n]: tokens of each document, bos and eos included."""
        return self._differences(indices, 0)

    def bytes_of(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n]: UTF-8 bytes of each document's text."""
        return self._differences(indices, 1)

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n]: address of each document's first token."""
        out = np.empty(len(indices), np.int64)
        for s, where, numbers in self._by_slice(indices, self._first_document):
            piece = self._slices[s]
            base = self._first_token[s] - piece.source.index[piece.first, 0]
            out[where] = piece.source.index[numbers + piece.first, 0] + base
        return out

    def gather(self, addresses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """uint16 [sum(lengths)]: the runs of tokens at `addresses`, one after the other.

        A run lies within one document.
        """
        return self._gather(addresses, lengths, lambda source: source.tokens, np.uint16)

    def gather_codes(self, addresses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """uint8 [sum(lengths)]: the codes of `gather`'s tokens. Of a weighted corpus alone."""
        return self._gather(addresses, lengths, _codes_of, np.uint8)

    def codes(self, i: int) -> np.ndarray:
        """uint8 [tokens]: the codes of document `i`."""
        piece, number = self._locate(i)
        index = piece.source.index
        return _codes_of(piece.source)[index[number, 0] : index[number + 1, 0]]

    def _gather(
        self, addresses: np.ndarray, lengths: np.ndarray, array_of: Callable[[Source], np.ndarray], dtype: Any
    ) -> np.ndarray:
        ends = np.cumsum(lengths)
        out = np.empty(int(ends[-1]) if len(ends) else 0, dtype)
        for s, where, starts in self._by_slice(addresses, self._first_token):
            piece = self._slices[s]
            counts = lengths[where]
            run = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            first = starts + piece.source.index[piece.first, 0]
            values = array_of(piece.source)[run + np.repeat(first, counts)]
            if len(counts) == len(lengths):
                return values
            out[run + np.repeat((ends - lengths)[where], counts)] = values
        return out

    def split(self, fraction: float = 0.05, max_tokens: int = 1_000_000) -> "tuple[Corpus, Corpus]":
        """(train, held-out): held-out is the last `fraction` of each source's tokens, in whole documents.

        A source of two or more documents keeps at least one and gives at least one, until `max_tokens` are
        held out; when every source is a single document, the last one is held out. `fraction` 0 holds out
        nothing, which gives a corpus without documents. Raises ValueError when there is only one document.
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"--heldout must be a fraction from 0 to below 1, not {fraction}")
        if fraction == 0:
            return self, Corpus([])
        if self.num_documents < 2:
            raise ValueError(
                "the data is a single document, which cannot be split into training and held-out text; "
                "add documents (one per line in a .jsonl file) or pass --heldout 0"
            )
        share = min(fraction, max_tokens / self.num_tokens)
        held: list[_Slice] = []
        left = max_tokens
        for piece in self._slices:
            first = _cut(piece, share * piece.total(0))
            tail = _Slice(piece.source, first, piece.stop)
            if first < piece.stop and held and tail.total(0) > left:
                tail = _Slice(piece.source, piece.stop, piece.stop)
            left -= tail.total(0)
            held.append(tail)
        if all(tail.first == tail.stop for tail in held):
            last = self._slices[-1]
            held[-1] = _Slice(last.source, last.stop - 1, last.stop)
        train = [_Slice(p.source, p.first, tail.first) for p, tail in zip(self._slices, held, strict=True)]
        return Corpus(train), Corpus(held)

    def head(self, max_tokens: int) -> "Corpus":
        """The first documents of each source, about `max_tokens` in all; at least one document."""
        if self.num_tokens <= max_tokens:
            return self
        share = max_tokens / self.num_tokens
        heads = []
        for s in self._slices:
            target = int(s.source.index[s.first, 0]) + int(share * s.total(0))
            stop = bisect_left(s.source.index[:, 0], target + 1, s.first, s.stop + 1) - 1
            heads.append(_Slice(s.source, s.first, stop))
        if all(piece.first == piece.stop for piece in heads):
            s = self._slices[0]
            heads[0] = _Slice(s.source, s.first, s.first + 1)
        return Corpus(heads)

    def _locate(self, i: int) -> tuple[_Slice, int]:
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        s = int(np.searchsorted(self._first_document, i, side="right")) - 1
        piece = self._slices[s]
        return piece, piece.first + i - int(self._first_document[s])

    def _differences(self, indices: np.ndarray, column: int) -> np.ndarray:
        out = np.empty(len(indices), np.int64)
        for s, where, numbers in self._by_slice(indices, self._first_document):
            piece = self._slices[s]
            at = numbers + piece.first
            out[where] = piece.source.index[at + 1, column] - piece.source.index[at, column]
        return out

    def _by_slice(
        self, values: np.ndarray, firsts: np.ndarray
    ) -> Iterator[tuple[int, slice | np.ndarray, np.ndarray]]:
        """(slice number, places in `values`, values counted from the slice's first) of each slice hit."""
        values = np.asarray(values, np.int64)
        if len(self._slices) == 1:
            yield 0, slice(None), values
            return
        numbers = np.searchsorted(firsts, values, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            if len(where):
                s = int(numbers[where[0]])
                yield s, where, values[where] - firsts[s]


def _codes_of(source: Source) -> np.ndarray:
    assert source.codes is not None, f"{source.path}: has no loss weights"
    return source.codes


def _cut(piece: _Slice, tokens: float) -> int:
    """First document of the longest tail of `piece` within `tokens`; a document at least on each side."""
    if piece.stop - piece.first < 2:
        return piece.stop
    index = piece.source.index
    target = int(index[piece.stop, 0]) - int(tokens)
    first = bisect_left(index[:, 0], target, piece.first, piece.stop)
    return min(first, piece.stop - 1)
