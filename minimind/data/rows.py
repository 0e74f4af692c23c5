"""Packed rows: which pieces of which documents lie in which row."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces in the order of their rows: document, token address, length, bytes counted; int64 [pieces].

    Row r is the pieces row_starts[r]:row_starts[r + 1].
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
    """(length, whether it is a piece) of each segment of `rows` rows: the pieces and the padding tails."""
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
