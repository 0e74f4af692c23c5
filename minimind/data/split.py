"""Which documents are held out: a hash of each one's text decides, so that copies of a text stay on one side.

Those with the lowest hashes are held out, as many as the share of tokens that is asked for has room for. So the choice
does not depend on the order of the documents, on the seed or on the tokenizer, and the held-out part is like the rest
wherever a file's last rows are not. Everything is done in passes over the hashes, in constant memory but for the
numbers of the documents that are held out or left out.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

from minimind.data.corpus import Corpus

MAX_TOKENS = 1_000_000  # held out at most: a loss over more is not surer in any digit that is printed
_BINS = 1 << 16  # by the upper bits of a hash
_CHUNK = 1 << 18  # documents
_SORTED = 1 << 21  # documents whose hashes are sorted at once


def hash_texts(texts: Sequence[str]) -> np.ndarray:
    """uint64 [texts]. Of ten million texts, two that differ have one hash with a probability of 3 in a million."""
    digests = (blake2b(text.encode(), digest_size=8, person=b"minimind split").digest() for text in texts)
    return np.frombuffer(b"".join(digests), "<u8")


def split(
    corpus: Corpus,
    fraction: float = 0.05,
    max_tokens: int = MAX_TOKENS,
    dedupe: bool = False,
    known: np.ndarray | None = None,
) -> tuple[Corpus, Corpus]:
    """(train, held-out): `fraction` of the tokens, at most `max_tokens`, but at least one text, is held out.

    dedupe: leave out every document whose text an earlier one has, on both sides; known: others to leave out, int64,
    ascending. The documents keep their order. `fraction` 0 holds out nothing, which gives a corpus without documents.
    Raises ValueError when all documents have one text.
    """
    check(fraction)
    again = np.union1d(repeats(corpus) if dedupe else [], [] if known is None else known).astype(np.int64)
    told = blake2b(again.tobytes(), digest_size=8).hexdigest() if len(again) else ""
    rule = f"hash {corpus.identity:x} {fraction} {max_tokens} {told}"
    if corpus.num_documents and len(again) == corpus.num_documents:
        raise ValueError("--dedupe: every document of --data is also in --heldout-data, so nothing is left to train on")
    if fraction == 0:
        return corpus.without(again, rule) if len(again) else corpus, Corpus([])
    share = min(fraction, max_tokens / max(1, corpus.num_tokens))
    held = _lowest(corpus, again, share)
    if len(held) + len(again) == corpus.num_documents:
        raise ValueError(
            "the data is a single document, or many times the same, which cannot be split into training and held-out "
            "text; add documents (one per line in a .jsonl file) or pass --heldout 0"
        )
    return corpus.without(np.union1d(held, again), rule), corpus.only(held, rule)


def split_tail(corpus: Corpus, fraction: float, max_tokens: int = MAX_TOKENS) -> tuple[Corpus, Corpus]:
    """The split of earlier versions, for their runs to go on with."""
    check(fraction)
    return corpus.split_tail(fraction, max_tokens) if fraction else (corpus, Corpus([]))


def check(fraction: float) -> None:
    """ValueError for a share that cannot be held out."""
    if not 0 <= fraction < 1:
        raise ValueError(f"--heldout must be a fraction from 0 to below 1, not {fraction}")


def repeats(corpus: Corpus) -> np.ndarray:
    """int64, ascending: the documents whose text an earlier one has."""
    found = []
    for numbers, hashes in _in_ranges(corpus):
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        found.append(numbers[order][1:][same])
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)


def shared(corpus: Corpus, *others: Corpus) -> np.ndarray:
    """int64, ascending: the documents of `corpus` whose text is in one of `others`, whose hashes are held in memory."""
    theirs = np.unique(np.concatenate([_hashes(other) for other in others]))
    found = [first + np.flatnonzero(np.isin(hashes, theirs)) for first, hashes in _chunks(corpus)]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _lowest(corpus: Corpus, left_out: np.ndarray, share: float) -> np.ndarray:
    """int64, ascending: the documents with the lowest hashes that have `share` of the tokens or a little less, all
    documents of a hash or none, `left_out` aside; at least one."""
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
        mine = np.flatnonzero((bins == last) & (size > 0))
        numbers.append(first + mine)
        keys.append(hashes[mine])
        sizes.append(size[mine])
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
    """Tokens of each document from `first` on; 0 for those left out."""
    sizes = corpus.lengths(np.arange(first, first + count))
    begin, end = np.searchsorted(left_out, [first, first + count])
    sizes[left_out[begin:end] - first] = 0
    return sizes


def _hashes(corpus: Corpus) -> np.ndarray:
    return corpus.hashes(0, corpus.num_documents)


def _chunks(corpus: Corpus) -> Iterator[tuple[int, np.ndarray]]:
    """(first document, hashes) of one part of the documents after the other."""
    for first in range(0, corpus.num_documents, _CHUNK):
        yield first, corpus.hashes(first, min(first + _CHUNK, corpus.num_documents))


def _in_ranges(corpus: Corpus) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(documents, their hashes), of one range of hashes after the other: about _SORTED documents each."""
    parts = -(-corpus.num_documents // _SORTED)
    for part in range(parts):
        numbers, found = [], []
        for first, hashes in _chunks(corpus):
            mine = np.flatnonzero(_bins(hashes) * parts // _BINS == part)
            numbers.append(first + mine)
            found.append(hashes[mine])
        yield np.concatenate(numbers), np.concatenate(found)
