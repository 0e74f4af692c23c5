"""Pack documents into rows of a fixed length, in a pseudo-random order that depends on (seed, epoch) alone.

A document is cut only if it is longer than a row. The pieces are placed by best-fit decreasing, as in "Fewer
Truncations Improve Language Modeling" (Ding et al. 2024, arXiv 2404.10830).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from minimind.data.corpus import Corpus

WINDOW_DOCUMENTS = 1 << 14
WINDOW_TOKENS = 1 << 22
CUT = 0.01  # the share of documents that may be longer than a row
_CHUNK = 1 << 18  # documents
_ROUNDS = 6
_MIN_HALF_BITS = 4  # a smaller domain has too few orders to look random

# int64 documents -> (index among them, start, length, bytes counted) of each piece, int64
Cut = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


def cut_documents(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of each piece, int64 [pieces], in the order of the documents.

    A document of n tokens has n - 1 (input, target) pairs. Piece (d, s, l) has inputs d[s:s+l] and targets
    d[s+1:s+l+1], l <= seq_len, so that each pair is in exactly one piece. A document of fewer than 2 tokens has none.
    """
    pairs = np.maximum(np.asarray(lengths, np.int64) - 1, 0)
    counts = -(-pairs // seq_len)
    document = np.repeat(np.arange(len(pairs)), counts)
    start = (np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)) * seq_len
    return document, start, np.minimum(pairs[document] - start, seq_len)


def assign_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [pieces]: the row of each piece, no row longer than `capacity`; rows are numbered from 0 without gaps.

    The pieces are placed longest first, each into the row with the least room that holds it. Deterministic. Raises
    ValueError if a piece is empty or longer than `capacity`.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} cannot be packed into {capacity}")
    order = np.argsort(-lengths, kind="stable")
    whole = int(np.searchsorted(-lengths[order], -capacity, side="right"))  # each of these fills a row
    rows = np.empty(len(lengths), np.int64)
    rows[order[:whole]] = np.arange(whole)
    rows[order[whole:]] = _place(lengths[order[whole:]].tolist(), capacity, whole)
    return rows


def _place(lengths: list[int], capacity: int, next_row: int) -> list[int]:
    """The row of each of the descending `lengths`. Bit r of `room` is set if some row has room for r tokens."""
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left
    room = 0
    placed = []
    for length in lengths:
        fitting = room >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                room ^= 1 << left
        else:
            left, row, next_row = capacity, next_row, next_row + 1
        placed.append(row)
        left -= length
        if left:
            open_rows[left].append(row)
            room |= 1 << left
    return placed


def row_length(lengths: np.ndarray, least: int, most: int, noun: str) -> tuple[int, str]:
    """(tokens of a row; the reason, in one line): the shortest power of two from `least` to `most` that cuts at most
    one document in a hundred.

    lengths: the tokens of a row that each document takes, int64 [documents]; noun: their name. A longer row costs
    little, since attention does not cross documents, but there are fewer rows to shuffle.
    """
    row = least
    while row < most and (lengths > row).mean() > CUT:
        row *= 2
    shares = {size: f"{(lengths > size).mean():.1%}" for size in (row // 2, row)}
    reason = f"--seq-len {row}: {shares[row]} of {len(lengths):,} {noun} are longer"
    if row > least:
        reason += f", {shares[row // 2]} than {row // 2}"
    elif row > 1:
        reason += "; shorter rows fill worse"
    return row, reason


def tokens_in_rows(corpus: Corpus) -> np.ndarray:
    """int64 [documents]: the (input, target) pairs of each document."""
    starts = range(0, corpus.num_documents, _CHUNK)
    parts = [corpus.lengths(np.arange(i, min(i + _CHUNK, corpus.num_documents))) - 1 for i in starts]
    return np.concatenate(parts)


def row_rule(corpus: Corpus, least: int, most: int, noun: str) -> Callable[[], tuple[int, str]]:
    """`row_length` of a corpus, to be called only if no flag sets the length."""
    return lambda: row_length(tokens_in_rows(corpus), least, most, noun)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces in the order of their rows: document, token address, length, bytes counted; int64 [pieces].

    Row r holds the pieces row_starts[r]:row_starts[r + 1].
    """

    document: np.ndarray
    address: np.ndarray
    length: np.ndarray
    num_bytes: np.ndarray
    row_starts: np.ndarray

    def rows(self, picked: np.ndarray) -> "Pieces":
        """Only the rows `picked`, in that order."""
        counts = self.row_starts[picked + 1] - self.row_starts[picked]
        ends = counts.cumsum()
        total = int(ends[-1]) if len(ends) else 0
        at = np.arange(total) + np.repeat(self.row_starts[picked] - (ends - counts), counts)
        starts = np.concatenate([[0], ends])
        return Pieces(self.document[at], self.address[at], self.length[at], self.num_bytes[at], starts)

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1


def segments(pieces: Pieces, rows: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(length, whether it is a piece) of each segment of `rows` rows. A segment is a piece or a padding tail."""
    row_of = np.repeat(np.arange(pieces.num_rows), np.diff(pieces.row_starts))
    tails = seq_len - np.bincount(row_of, weights=pieces.length, minlength=rows).astype(np.int64)
    padded = np.flatnonzero(tails)
    order = np.argsort(np.concatenate([row_of, padded]), kind="stable")  # a row's tail after its pieces
    lengths = np.concatenate([pieces.length, tails[padded]])
    return lengths[order], order < len(row_of)


def join(parts: list[Pieces]) -> Pieces:
    """The rows of `parts`, one after the other; at least one part."""
    if len(parts) == 1:
        return parts[0]
    sizes = np.cumsum([0] + [len(part.document) for part in parts])
    starts = [part.row_starts[:-1] + size for part, size in zip(parts, sizes, strict=False)]
    return Pieces(
        np.concatenate([part.document for part in parts]),
        np.concatenate([part.address for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([part.num_bytes for part in parts]),
        np.concatenate([*starts, sizes[-1:]]),
    )


class RowStream:
    """An endless stream of the packed rows of documents first..stop of `view`, with a position: epoch, window, row.

    An epoch visits the documents in a pseudo-random order, in windows of at most 16384 documents and about 2^22 tokens.
    A window is cut into pieces, packed into rows of `seq_len` and shuffled by rows, in constant memory.
    """

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
        """Windows of one epoch."""
        return -(-(self.stop - self.first) // self.window_documents)

    def take(self, count: int) -> Iterator[Pieces]:
        """Yield the next `count` rows, in parts. An epoch's last row is followed by the first of the next epoch."""
        while count:
            pieces = self.pieces(self.epoch, self.window)
            stop = min(self.row + count, pieces.num_rows)
            if stop > self.row:
                yield pieces.rows(np.arange(self.row, stop))
            count -= stop - self.row
            self.row = stop
            if stop == pieces.num_rows:
                self._advance()

    def state(self) -> dict[str, int]:
        """The position, for `load_state`."""
        return {"epoch": self.epoch, "window": self.window, "row": self.row}

    def load_state(self, state: dict[str, int]) -> None:
        """Go to the position of an earlier `state()`. Raises ValueError if there is no such position."""
        epoch, window, row = position = [state.get(name, -1) for name in ("epoch", "window", "row")]
        if min(position) < 0 or window >= self.num_windows or row > self.pieces(epoch, window).num_rows:
            raise ValueError(f"the checkpoint's position in the data is damaged: {state}")
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


class Permutation:
    """A pseudo-random bijection of 0..n-1, different for each `key`, in constant memory.

    A balanced Feistel network over the next power of four, with cycle walking: a value that falls outside is sent
    through again until it is inside (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """

    def __init__(self, n: int, *key: int) -> None:
        self.n = n
        self._half = np.uint64(max(_MIN_HALF_BITS, -(-(max(n, 1) - 1).bit_length() // 2)))
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        digest = blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The image of each of `values` (0..n-1), int64, in the shape of `values`."""
        out = self._network(np.asarray(values).astype(np.uint64))
        limit = np.uint64(self.n)
        outside = np.flatnonzero(out >= limit)
        while len(outside):
            out[outside] = self._network(out[outside])
            outside = outside[out[outside] >= limit]
        return out.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
