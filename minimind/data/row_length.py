"""How long a row has to be for the data: the shortest that cuts at most one document in a hundred."""

from collections.abc import Callable

import numpy as np

from minimind.data.corpus import Corpus

CUT = 0.01  # share of documents that may be longer than a row
_CHUNK = 1 << 18


def row_length(lengths: np.ndarray, least: int, most: int, what: str) -> tuple[int, str]:
    """(tokens of a row: a power of two from `least` to `most`; what the data says to it, in one line).

    lengths: tokens that each document takes of a row, int64 [documents]; what: their name. A longer row costs nothing
    but a shorter queue of rows to shuffle, as attention does not cross documents, and fewer of them fill it worse.
    """
    row = least
    while row < most and (lengths > row).mean() > CUT:
        row *= 2
    shares = {size: f"{(lengths > size).mean():.1%}" for size in (row // 2, row)}
    reason = f"--seq-len {row}: {shares[row]} of {len(lengths):,} {what} are longer"
    if row > least:
        reason += f", {shares[row // 2]} than {row // 2}"
    elif row > 1:
        reason += "; shorter rows fill worse"
    return row, reason


def tokens_in_rows(corpus: Corpus) -> np.ndarray:
    """int64 [documents]: (input, target) pairs of each document."""
    starts = range(0, corpus.num_documents, _CHUNK)
    parts = [corpus.lengths(np.arange(i, min(i + _CHUNK, corpus.num_documents))) - 1 for i in starts]
    return np.concatenate(parts)


def row_rule(corpus: Corpus, least: int, most: int, what: str) -> Callable[[], tuple[int, str]]:
    """`row_length` of a corpus, to be asked when nothing else says."""
    return lambda: row_length(tokens_in_rows(corpus), least, most, what)
