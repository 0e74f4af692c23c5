"""Packed rows of a range of a corpus' documents, without end, in an order that is a function of (seed, epoch) alone.

An epoch visits the documents in a pseudo-random order, in windows of at most 16384 documents and about 2^22 tokens. A
window's documents are cut into pieces, packed into rows of `seq_len` and the rows shuffled, in constant memory.
"""

from collections.abc import Callable, Iterator

import numpy as np

from minimind.data.corpus import Corpus
from minimind.data.packing import assign_rows
from minimind.data.permutation import Permutation
from minimind.data.rows import Pieces

WINDOW_DOCUMENTS = 1 << 14
WINDOW_TOKENS = 1 << 22
_CHUNK = 1 << 18  # documents

# int64 documents -> (number among them, start, length, bytes counted) of each piece, int64
Cut = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


class RowStream:
    """The rows of documents first..stop of `view`, pass after pass, and a place among them: epoch, window, row."""

    def __init__(self, view: Corpus, first: int, stop: int, seq_len: int, seed: int, shuffle: bool, cut: Cut) -> None:
        self.view, self.first, self.stop = view, first, stop
        self.seq_len, self.seed, self.shuffle, self.cut = seq_len, seed, shuffle, cut
        mean = -(-self._tokens() // (stop - first))
        self.window_documents = max(1, min(WINDOW_DOCUMENTS, WINDOW_TOKENS // mean))
        self.epoch = self.window = self.row = 0
        self._packed: tuple[tuple[int, int], Pieces] | None = None

    def _tokens(self) -> int:
        if (self.first, self.stop) == (0, self.view.num_documents):
            return self.view.num_tokens
        starts = range(self.first, self.stop, _CHUNK)
        return sum(int(self.view.lengths(np.arange(i, min(i + _CHUNK, self.stop))).sum()) for i in starts)

    @property
    def num_windows(self) -> int:
        """Windows of one pass."""
        return -(-(self.stop - self.first) // self.window_documents)

    def take(self, count: int) -> Iterator[Pieces]:
        """The next `count` rows, in parts; after an epoch's last row comes the first of the next epoch."""
        while count:
            pieces = self.pieces(self.epoch, self.window)
            stop = min(self.row + count, pieces.num_rows)
            if stop > self.row:
                yield pieces.rows(np.arange(self.row, stop))
            count -= stop - self.row
            self.row = stop
            if stop == pieces.num_rows:
                self._advance()

    def place(self) -> dict[str, int]:
        return {"epoch": self.epoch, "window": self.window, "row": self.row}

    def go_to(self, state: dict[str, int]) -> None:
        """To what `place` gave; ValueError where there is no such place."""
        epoch, window, row = cursor = [state.get(name, -1) for name in ("epoch", "window", "row")]
        if min(cursor) < 0 or window >= self.num_windows or row > self.pieces(epoch, window).num_rows:
            raise ValueError(f"the checkpoint's place in the data is damaged: {state}")
        self.epoch, self.window, self.row = epoch, window, row

    def pieces(self, epoch: int, window: int) -> Pieces:
        """The rows of a window."""
        if self._packed is None or self._packed[0] != (epoch, window):
            self._packed = (epoch, window), self._pack(epoch, window)
        return self._packed[1]

    def _advance(self) -> None:
        self.row, self.window = 0, self.window + 1
        if self.window == self.num_windows:
            self.window, self.epoch = 0, self.epoch + 1

    def _pack(self, epoch: int, window: int) -> Pieces:
        count = self.stop - self.first
        begin = window * self.window_documents
        documents = np.arange(begin, min(begin + self.window_documents, count))
        if self.shuffle:
            documents = Permutation(count, self.seed, epoch)(documents)
        documents = documents + self.first
        which, start, length, num_bytes = self.cut(documents)
        row = assign_rows(length, self.seq_len)
        num_rows = int(row.max()) + 1 if len(row) else 0
        if self.shuffle:
            rank_of = np.random.default_rng([self.seed & (1 << 64) - 1, epoch, window]).permutation(num_rows)
        else:  # rows in the order of their first documents
            firsts = np.full(num_rows, len(row))
            np.minimum.at(firsts, row, np.arange(len(row)))
            rank_of = np.argsort(np.argsort(firsts))
        row = rank_of[row]
        order = np.argsort(row, kind="stable")
        starts = np.searchsorted(row[order], np.arange(num_rows + 1))
        address = self.view.addresses(documents)[which] + start
        return Pieces(documents[which][order], address[order], length[order], num_bytes[order], starts)
