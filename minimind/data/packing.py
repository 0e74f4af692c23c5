"""Documents to next-token pieces, and pieces to rows of a fixed length with little padding.

Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv 2404.10830):
a document is cut only when it is longer than a row.
"""

import numpy as np


def cut_documents(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of each piece, int64 [pieces], in the order of the documents.

    A document of n tokens holds n - 1 (input, target) pairs. Piece (d, s, l) has inputs d[s:s+l] and targets
    d[s+1:s+l+1], l <= seq_len, so that each pair is in exactly one piece. Documents of fewer than 2 tokens
    have none.
    """
    pairs = np.maximum(np.asarray(lengths, np.int64) - 1, 0)
    counts = -(-pairs // seq_len)
    document = np.repeat(np.arange(len(pairs)), counts)
    start = (np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)) * seq_len
    return document, start, np.minimum(pairs[document] - start, seq_len)


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Rows of piece indices (int64, ascending), each piece once, no row longer than `capacity` in all.

    Pieces are placed longest first, each into the row with the least room that holds it. Deterministic.
    Raises ValueError on a piece that is empty or longer than `capacity`.
    """
    rows = assign_rows(lengths, capacity)
    order = np.argsort(rows, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(rows[order])) + 1) if len(order) else []


def assign_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [pieces]: the row of each piece, as `best_fit` has it; rows are numbered from 0 without gaps."""
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} cannot be packed into {capacity}")
    order = np.argsort(-lengths, kind="stable")
    whole = int(np.searchsorted(-lengths[order], -capacity, side="right"))  # these fill a row each
    rows = np.empty(len(lengths), np.int64)
    rows[order[:whole]] = np.arange(whole)
    rows[order[whole:]] = _place(lengths[order[whole:]].tolist(), capacity, whole)
    return rows


def _place(lengths: list[int], capacity: int, next_row: int) -> list[int]:
    """Row of each of the descending `lengths`; `room` has a bit set for every amount of room some row has."""
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
