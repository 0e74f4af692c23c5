"""What a token of a conversation is to the loss: one byte in the token cache, a float32 weight in a batch.

The byte's low two bits are a class: NONE is no target, TARGET has weight 1, MARKER a weight that is chosen when the
data is loaded. TURN_END is set on the last token of an assistant turn: a conversation may be cut behind it. SIDE is set
on the first token of the second conversation of a preference pair.
"""

from dataclasses import dataclass

import numpy as np

from minimind.data.corpus import Corpus

NONE, TARGET, MARKER, SIDE, TURN_END = 0, 1, 2, 0x40, 0x80
_CLASS = 3
_CHUNK_TOKENS = 1 << 22


def codes(trained: np.ndarray, markers: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint8 [tokens] of three bool [tokens]: what is a target, which targets are markers, where turns end."""
    return (trained.astype(np.uint8) + (trained & markers)) | np.where(ends, TURN_END, 0).astype(np.uint8)


def class_of(code: np.ndarray) -> np.ndarray:
    """NONE, TARGET or MARKER of each code."""
    return code & _CLASS


@dataclass(frozen=True, eq=False)
class KeptPairs:
    """What of each conversation fits into a row: pairs int64 [n], (input, target) pairs from its beginning; num_bytes
    int64 [n]; at_turn, inside bool [n]: cut behind a turn, or within the first answer. pairs 0: there is nothing to
    learn, as its first question alone, or with whole_answers its first answer, does not fit."""

    pairs: np.ndarray
    num_bytes: np.ndarray
    at_turn: np.ndarray
    inside: np.ndarray


def fit(view: Corpus, documents: np.ndarray, seq_len: int, whole_answers: bool = False) -> KeptPairs:
    """Cut each of `documents` to whole turns within seq_len pairs, or, if not one fits, within its first answer.

    A conversation cut short counts the bytes of its share of targets. whole_answers: one of which not one turn fits has
    nothing to learn: an answer that is cut would teach its beginning alone, of reasoning that it never ends.
    """
    pairs, num_bytes = view.lengths(documents) - 1, view.bytes_of(documents)
    at_turn, inside = np.zeros(len(pairs), bool), np.zeros(len(pairs), bool)
    for i in np.flatnonzero(pairs > seq_len):
        address = view.addresses(documents[i : i + 1]) + 1
        code = view.gather_codes(address, pairs[i : i + 1])
        targets = class_of(code) > NONE
        turns = np.flatnonzero(code[:seq_len] & TURN_END)
        at_turn[i], inside[i] = len(turns) > 0, len(turns) == 0
        kept = int(turns[-1]) + 1 if len(turns) else seq_len
        learnt = int(targets[:kept].sum()) if len(turns) or not whole_answers else 0
        pairs[i] = kept if learnt else 0
        num_bytes[i] = num_bytes[i] * learnt // int(targets.sum())
    return KeptPairs(pairs, num_bytes, at_turn, inside & (pairs > 0))


@dataclass(frozen=True)
class CutCounts:
    """Of a whole corpus: pairs kept; conversations cut behind a turn, within an answer, and left out. whole_answers: as
    `fit` has it."""

    pairs: int = 0
    at_turn: int = 0
    inside: int = 0
    left_out: int = 0
    whole_answers: bool = False

    @staticmethod
    def of(view: Corpus, seq_len: int, whole_answers: bool = False) -> "CutCounts":
        """One pass over the index, and over the codes of conversations longer than a row."""
        total = CutCounts(whole_answers=whole_answers)
        step = max(1, _CHUNK_TOKENS * view.num_documents // max(1, view.num_tokens))
        for first in range(0, view.num_documents, step):
            documents = np.arange(first, min(first + step, view.num_documents))
            kept = fit(view, documents, seq_len, whole_answers)
            total = CutCounts(
                total.pairs + int(kept.pairs.sum()),
                total.at_turn + int(kept.at_turn.sum()),
                total.inside + int(kept.inside.sum()),
                total.left_out + int((kept.pairs == 0).sum()),
                whole_answers,
            )
        return total

    def __str__(self) -> str:
        what = "answer does not fit" if self.whole_answers else "question alone is longer"
        parts = [
            f"{self.at_turn:,} cut behind an earlier turn" if self.at_turn else "",
            f"{self.inside:,} cut within their first answer" if self.inside else "",
            f"{self.left_out:,} left out, as the first {what}" if self.left_out else "",
        ]
        return ", ".join(part for part in parts if part)
