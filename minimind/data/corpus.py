"""A corpus of documents over tokenized files, which are memory-mapped.

The folder of a tokenized file holds
    tokens.bin      uint16 [num_tokens], its documents one after the other
    documents.bin   int64 [num_documents + 1, 2], the token and UTF-8 byte offset of each document, and the two totals
    hashes.bin      uint64 [num_documents], a hash of each document's text, by which copies are found (split.py)
    codes.bin       uint8 [num_tokens], the loss code of each token (encoding.py); only of conversations and pairs
    meta.json       written last; marks the folder as complete
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, DOCUMENTS, CODES, META = "tokens.bin", "documents.bin", "codes.bin", "meta.json"
HASHES = "hashes.bin"
TOKEN_BYTES, ENTRY_BYTES, HASH_BYTES = 2, 16, 8


@dataclass(frozen=True, eq=False)
class TokenizedFile:
    """One tokenized file, with the arrays of its folder. codes: None if every token is a target. hashes: None in a
    read-only cache of an earlier version."""

    path: Path
    key: str
    tokens: np.ndarray
    index: np.ndarray
    meta: dict[str, Any]
    codes: np.ndarray | None = None
    hashes: np.ndarray | None = None

    @classmethod
    def open(cls, folder: Path, path: Path, meta: dict[str, Any]) -> "TokenizedFile":
        """Map the files of `folder`. `meta` describes them, and their sizes have been checked."""
        tokens = np.memmap(folder / TOKENS, dtype="<u2", mode="r")
        index = np.memmap(folder / DOCUMENTS, dtype="<i8", mode="r").reshape(-1, 2)
        codes = hashes = None
        if meta.get("weighted"):
            codes = np.memmap(folder / CODES, dtype=np.uint8, mode="r").view(np.ndarray)
        hash_file = folder / HASHES
        if hash_file.exists() and os.path.getsize(hash_file) == HASH_BYTES * (len(index) - 1):
            hashes = np.memmap(hash_file, dtype="<u8", mode="r").view(np.ndarray)
        return cls(path, folder.name, tokens.view(np.ndarray), index.view(np.ndarray), meta, codes, hashes)


@dataclass(frozen=True, eq=False)
class _Slice:
    """Documents first..stop of a file: all, only the `picked` ones, or all but the `left_out` ones. Both are int64
    document numbers in the file, ascending; `rule` describes how they were chosen."""

    source: TokenizedFile
    first: int
    stop: int
    picked: np.ndarray | None = None
    left_out: np.ndarray | None = None
    rule: str = ""

    @property
    def count(self) -> int:
        if self.picked is not None:
            return len(self.picked)
        return self.stop - self.first - (0 if self.left_out is None else len(self.left_out))

    def span(self, column: int) -> int:
        """Tokens (column 0) or bytes (1) from the first document to the last, including those that are left out."""
        return int(self.source.index[self.stop, column] - self.source.index[self.first, column])

    def total(self, column: int) -> int:
        """Tokens or bytes of the documents in the slice."""
        return int(self._totals[column])

    @cached_property
    def _totals(self) -> np.ndarray:
        if self.picked is not None:
            return self._sizes(self.picked).sum(0)
        spans = np.array([self.span(0), self.span(1)])
        return spans if self.left_out is None else spans - self._sizes(self.left_out).sum(0)

    def _sizes(self, numbers: np.ndarray) -> np.ndarray:
        """int64 [n, 2]: tokens and bytes of documents, by their numbers in the file."""
        index = self.source.index
        return index[numbers + 1] - index[numbers]

    def numbers(self, values: np.ndarray) -> np.ndarray:
        """int64: the numbers in the file of the slice's documents `values`, which count from 0."""
        if self.picked is not None:
            return self.picked[values]
        if self.left_out is None:
            return values + self.first
        return values + self.first + np.searchsorted(self._before, values, side="right")

    @cached_property
    def _before(self) -> np.ndarray:
        """The number of documents of the slice before each one that is left out."""
        assert self.left_out is not None
        return self.left_out - self.first - np.arange(len(self.left_out))

    def head(self, tokens: float) -> "_Slice":
        """The first documents, with at most `tokens` tokens in total."""
        index = self.source.index
        if self.picked is not None:
            count = int(np.searchsorted(self._sizes(self.picked)[:, 0].cumsum(), int(tokens), side="right"))
            return replace(self, picked=self.picked[:count])
        begin = int(index[self.first, 0])
        if self.left_out is None:
            stop = bisect_left(index[:, 0], begin + int(tokens) + 1, self.first, self.stop + 1) - 1
            return replace(self, stop=stop)
        left_out = self.left_out
        removed = np.concatenate([[0], self._sizes(left_out)[:, 0].cumsum()])

        def until(stop: int) -> int:
            return int(index[stop, 0]) - begin - int(removed[np.searchsorted(left_out, stop)])

        stops = range(self.first, self.stop + 1)
        stop = stops[bisect_left(stops, int(tokens) + 1, key=until) - 1]
        return replace(self, stop=stop, left_out=left_out[left_out < stop])

    def name(self) -> tuple[Any, ...]:
        plain = (self.source.key, self.first, self.stop)
        if self.picked is None and self.left_out is None:
            return plain
        return *plain, "only" if self.picked is not None else "without", self.count, self.rule


class Corpus:
    """The documents of several tokenized files in order, numbered from 0. Holds no token in memory.

    A document's address is the place of its first token in the concatenation of all files, which includes documents
    that are not in the corpus.
    """

    def __init__(self, slices: Sequence[_Slice]) -> None:
        self._slices = [piece for piece in slices if piece.count]
        self._first_document = np.cumsum([0] + [s.count for s in self._slices])
        self._first_token = np.cumsum([0] + [s.span(0) for s in self._slices])
        self.num_documents = int(self._first_document[-1])
        self.num_tokens = sum(s.total(0) for s in self._slices)
        self.num_bytes = sum(s.total(1) for s in self._slices)

    @classmethod
    def from_files(cls, sources: Sequence[TokenizedFile]) -> "Corpus":
        """All documents of `sources`."""
        return cls([_Slice(source, 0, len(source.index) - 1) for source in sources])

    @property
    def sources(self) -> list[TokenizedFile]:
        """The files that have documents in this corpus."""
        return [piece.source for piece in self._slices]

    @property
    def weighted(self) -> bool:
        """Whether the tokens have loss codes (encoding.py)."""
        return any(piece.source.codes is not None for piece in self._slices)

    @property
    def identity(self) -> int:
        """63 bits that depend on the texts, their order and their tokenization."""
        text = repr([piece.name() for piece in self._slices])
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def document(self, i: int) -> np.ndarray:
        """uint16 [tokens]: document `i`, bos and eos included; a view."""
        piece, number = self._locate(i)
        index = piece.source.index
        return piece.source.tokens[index[number, 0] : index[number + 1, 0]]

    def locate(self, i: int) -> tuple[Path, int]:
        """The file of document `i`, and the document's number in it, from 0."""
        piece, number = self._locate(i)
        return piece.source.path, number

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n]: tokens of each document, bos and eos included."""
        return self._differences(indices, 0)

    def bytes_of(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n]: UTF-8 bytes of each document's text."""
        return self._differences(indices, 1)

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n]: the address of each document's first token."""
        out = np.empty(len(indices), np.int64)
        for s, where, numbers in self._by_slice(indices, self._first_document):
            piece = self._slices[s]
            base = self._first_token[s] - piece.source.index[piece.first, 0]
            out[where] = piece.source.index[piece.numbers(numbers), 0] + base
        return out

    def hashes(self, first: int, stop: int) -> np.ndarray:
        """uint64 [stop - first]: hashes of the texts of documents first..stop. Raises ValueError for a read-only cache
        of an earlier version, which has no hashes."""
        out = np.empty(stop - first, np.uint64)
        for s, where, numbers in self._by_slice(np.arange(first, stop), self._first_document):
            source = self._slices[s].source
            if source.hashes is None:
                raise ValueError(
                    f"{source.path}: its token cache is read-only and of an earlier version, without the hashes that "
                    "find copies of a text; choose another folder with --cache-dir"
                )
            out[where] = source.hashes[self._slices[s].numbers(numbers)]
        return out

    def only(self, numbers: np.ndarray, rule: str) -> "Corpus":
        """The documents `numbers` (int64, ascending) of a corpus without a selection. `rule` describes how they were
        chosen, for `identity`."""
        return Corpus([replace(s, picked=own, rule=rule) for s, own in self._shares(numbers)])

    def without(self, numbers: np.ndarray, rule: str) -> "Corpus":
        """All documents except `numbers`; otherwise like `only`."""
        return Corpus([replace(s, left_out=own, rule=rule) for s, own in self._shares(numbers)])

    def _shares(self, numbers: np.ndarray) -> Iterator[tuple[_Slice, np.ndarray]]:
        """Yield each slice with the `numbers` that lie in it, counted in its file."""
        assert all(s.picked is None and s.left_out is None for s in self._slices)
        parts = np.split(np.asarray(numbers, np.int64), np.searchsorted(numbers, self._first_document[1:-1]))
        for piece, first, own in zip(self._slices, self._first_document, parts, strict=False):
            yield piece, own - first + piece.first

    def range_of(self, paths: Collection[Path]) -> tuple[int, int]:
        """First and stop of the documents of `paths`, which are consecutive files of the corpus."""
        slices = [i for i, piece in enumerate(self._slices) if piece.source.path in paths]
        if not slices:
            return 0, 0
        return int(self._first_document[slices[0]]), int(self._first_document[slices[-1] + 1])

    def gather(self, addresses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """uint16 [sum(lengths)]: the tokens at `addresses`, `lengths` of each, one run after the other. A run lies
        within one document."""
        return self._gather(addresses, lengths, lambda source: source.tokens, np.uint16)

    def gather_codes(self, addresses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """uint8 [sum(lengths)]: the codes of the tokens of `gather`, for a weighted corpus."""
        return self._gather(addresses, lengths, _codes_of, np.uint8)

    def codes(self, i: int) -> np.ndarray:
        """uint8 [tokens]: the codes of document `i`."""
        piece, number = self._locate(i)
        index = piece.source.index
        return _codes_of(piece.source)[index[number, 0] : index[number + 1, 0]]

    def _gather(
        self, addresses: np.ndarray, lengths: np.ndarray, array_of: Callable[[TokenizedFile], np.ndarray], dtype: Any
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

    def split_tail(self, fraction: float, max_tokens: int) -> "tuple[Corpus, Corpus]":
        """(train, held-out) as in earlier versions, for their runs to resume: the last `fraction` of each file's tokens
        is held out, in whole documents, including copies of training documents.

        A file of two or more documents keeps at least one and gives at least one, until `max_tokens` are held out. If
        every file has a single document, the last one is held out. The corpus must have two or more documents.
        """
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
        """The first documents of each file, about `max_tokens` tokens in total; at least one document."""
        if self.num_tokens <= max_tokens:
            return self
        share = max_tokens / self.num_tokens
        heads = [s.head(share * s.total(0)) for s in self._slices]
        if not any(piece.count for piece in heads):
            first = self._slices[0]
            number = int(first.numbers(np.zeros(1, np.int64))[0])
            heads[0] = _Slice(first.source, number, number + 1)
        return Corpus(heads)

    def _locate(self, i: int) -> tuple[_Slice, int]:
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        s = int(np.searchsorted(self._first_document, i, side="right")) - 1
        piece = self._slices[s]
        return piece, int(piece.numbers(np.array([i - int(self._first_document[s])]))[0])

    def _differences(self, indices: np.ndarray, column: int) -> np.ndarray:
        out = np.empty(len(indices), np.int64)
        for s, where, numbers in self._by_slice(indices, self._first_document):
            piece = self._slices[s]
            at = piece.numbers(numbers)
            out[where] = piece.source.index[at + 1, column] - piece.source.index[at, column]
        return out

    def _by_slice(self, values: np.ndarray, firsts: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray, np.ndarray]]:
        """Yield, for each slice that `values` fall into: (slice number, places in `values`, values relative to the
        slice's first)."""
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


def _codes_of(source: TokenizedFile) -> np.ndarray:
    assert source.codes is not None, f"{source.path}: has no loss weights"
    return source.codes


def _cut(piece: _Slice, tokens: float) -> int:
    """The first document of the longest tail of `piece` within `tokens`; each side keeps at least one document."""
    if piece.stop - piece.first < 2:
        return piece.stop
    index = piece.source.index
    target = int(index[piece.stop, 0]) - int(tokens)
    first = bisect_left(index[:, 0], target, piece.first, piece.stop)
    return min(first, piece.stop - 1)
