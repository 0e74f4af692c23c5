"""Split a corpus into training and held-out documents by a hash of their text, so that copies stay on one side.

The documents with the lowest hashes are held out, up to the requested share of tokens. The choice does not depend on
the order of the documents, the seed or the tokenizer, and the held-out part is a random sample. The split reads the
hashes several times; memory is constant except for the indices of the documents that are held out or left out.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

from minimind.data.corpus import Corpus

MAX_TOKENS = 1_000_000  # most tokens held out: more would not change any printed digit of the loss
_BINS = 1 << 16  # histogram bins, indexed by the upper 16 bits of a hash
_CHUNK = 1 << 18  # documents whose hashes are read at once
_SORTED = 1 << 21  # documents whose hashes are sorted at once


def hash_texts(texts: Sequence[str]) -> np.ndarray:
    """uint64 [texts]. Among ten million different texts, two share a hash with a probability of 3 in a million."""
    digests = (blake2b(text.encode(), digest_size=8, person=b"minimind split").digest() for text in texts)
    return np.frombuffer(b"".join(digests), "<u8")


def split(
    corpus: Corpus,
    fraction: float = 0.05,
    max_tokens: int = MAX_TOKENS,
    dedupe: bool = False,
    left_out: np.ndarray | None = None,
) -> tuple[Corpus, Corpus]:
    """Return (train, held-out). Hold out `fraction` of the tokens, at most `max_tokens` but at least one text.

    dedupe: leave out copies of earlier documents on both sides; left_out: further documents to leave out, int64,
    ascending. The documents keep their order. `fraction` 0 returns an empty held-out corpus. Raises ValueError if all
    documents have the same text.
    """
    check_fraction(fraction)
    excluded = np.union1d(repeats(corpus) if dedupe else [], [] if left_out is None else left_out).astype(np.int64)
    digest = blake2b(excluded.tobytes(), digest_size=8).hexdigest() if len(excluded) else ""
    rule = f"hash {corpus.identity:x} {fraction} {max_tokens} {digest}"
    if corpus.num_documents and len(excluded) == corpus.num_documents:
        raise ValueError("--dedupe: every document of --data is also in --heldout-data, so nothing is left to train on")
    if fraction == 0:
        return corpus.without(excluded, rule) if len(excluded) else corpus, Corpus([])
    share = min(fraction, max_tokens / max(1, corpus.num_tokens))
    held = _lowest(corpus, excluded, share)
    if len(held) + len(excluded) == corpus.num_documents:
        raise ValueError(
            "the data is a single document or copies of one, which cannot be split into training and held-out text; "
            "add documents (one per line in a .jsonl file) or pass --heldout 0"
        )
    return corpus.without(np.union1d(held, excluded), rule), corpus.only(held, rule)


def split_tail(corpus: Corpus, fraction: float, max_tokens: int = MAX_TOKENS) -> tuple[Corpus, Corpus]:
    """Split as earlier versions did, so that their runs can resume."""
    check_fraction(fraction)
    return corpus.split_tail(fraction, max_tokens) if fraction else (corpus, Corpus([]))


def check_fraction(fraction: float) -> None:
    """Raise ValueError unless 0 <= `fraction` < 1."""
    if not 0 <= fraction < 1:
        raise ValueError(f"--heldout must be a fraction from 0 to below 1, not {fraction}")


def repeats(corpus: Corpus) -> np.ndarray:
    """int64, ascending: indices of the documents that are copies of earlier ones."""
    copies = []
    for numbers, hashes in _in_ranges(corpus):
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        copies.append(numbers[order][1:][same])
    return np.sort(np.concatenate(copies)) if copies else np.empty(0, np.int64)


def shared(corpus: Corpus, *others: Corpus) -> np.ndarray:
    """int64, ascending: indices of the documents of `corpus` whose text is also in `others`. Holds the hashes of
    `others` in memory."""
    other_hashes = np.unique(np.concatenate([other.hashes(0, other.num_documents) for other in others]))
    numbers = [first + np.flatnonzero(np.isin(hashes, other_hashes)) for first, hashes in _chunks(corpus)]
    return np.concatenate(numbers) if numbers else np.empty(0, np.int64)


def _lowest(corpus: Corpus, left_out: np.ndarray, share: float) -> np.ndarray:
    """int64, ascending: indices of the documents with the lowest hashes, except `left_out`: at most `share` of the
    tokens, but at least one text. Documents with the same hash stay together."""
    sums = np.zeros(_BINS)
    for first, hashes in _chunks(corpus):
        sums += np.bincount(_bins(hashes), _sizes(corpus, first, len(hashes), left_out), _BINS)
    limit = share * sums.sum()
    last = max(int(np.searchsorted(sums.cumsum(), limit, side="right")), int(np.flatnonzero(sums)[0]))
    below, numbers, keys, sizes = [], [], [], []
    for first, hashes in _chunks(corpus):
        size = _sizes(corpus, first, len(hashes), left_out)
        bins = _bins(hashes)
        below.append(first + np.flatnonzero((bins < last) & (size > 0)))
        at = np.flatnonzero((bins == last) & (size > 0))
        numbers.append(first + at)
        keys.append(hashes[at])
        sizes.append(size[at])
    number, key, size = (np.concatenate(part) for part in (numbers, keys, sizes))
    groups, of_group = np.unique(key, return_inverse=True)
    ends = sums[:last].sum() + np.bincount(of_group, size, len(groups)).cumsum()
    fitting = int(np.searchsorted(ends, limit, side="right"))
    if not fitting and not sum(map(len, below)):
        fitting = 1
    return np.sort(np.concatenate([*below, number[of_group < fitting]]))


def _bins(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(48)).astype(np.int64)


def _sizes(corpus: Corpus, first: int, count: int, left_out: np.ndarray) -> np.ndarray:
    """Tokens of each of `count` documents from index `first` on; 0 for those left out."""
    sizes = corpus.lengths(np.arange(first, first + count))
    begin, end = np.searchsorted(left_out, [first, first + count])
    sizes[left_out[begin:end] - first] = 0
    return sizes


def _chunks(corpus: Corpus) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of the first document, hashes) of each chunk of consecutive documents."""
    for first in range(0, corpus.num_documents, _CHUNK):
        yield first, corpus.hashes(first, min(first + _CHUNK, corpus.num_documents))


def _in_ranges(corpus: Corpus) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (document indices, hashes) of consecutive ranges of hash values, about _SORTED documents each."""
    parts = -(-corpus.num_documents // _SORTED)
    for part in range(parts):
        numbers, keys = [], []
        for first, hashes in _chunks(corpus):
            at = np.flatnonzero(_bins(hashes) * parts // _BINS == part)
            numbers.append(first + at)
            keys.append(hashes[at])
        yield np.concatenate(numbers), np.concatenate(keys)
