"""The loss code of a token in a conversation: one byte in the token cache that says whether it is a target.

The low two bits are a class: NONE is no target, TARGET has weight 1, MARKER has a weight that is chosen when the data
is loaded. The bit TURN_END marks the last token of an assistant turn, after which a conversation may be cut. The bit
SIDE marks the first token of the second conversation of a preference pair.
"""

from dataclasses import dataclass

import numpy as np

from minimind.data.corpus import Corpus

NONE, TARGET, MARKER, SIDE, TURN_END = 0, 1, 2, 0x40, 0x80
_CLASS = 3
_CHUNK_TOKENS = 1 << 22


def loss_codes(trained: np.ndarray, markers: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint8 [tokens], from three bool [tokens]: the targets, the markers among them, and the ends of turns."""
    return (trained.astype(np.uint8) + (trained & markers)) | np.where(ends, TURN_END, 0).astype(np.uint8)


def class_of(code: np.ndarray) -> np.ndarray:
    """NONE, TARGET or MARKER of each code."""
    return code & _CLASS


@dataclass(frozen=True, eq=False)
class KeptPairs:
    """The beginning of each conversation that fits into a row.

    pairs: (input, target) pairs, int64 [n]; 0 if the first question, or with whole_answers the first answer, does not
    fit. num_bytes: int64 [n]. at_turn, inside: whether it is cut after a turn, or within the first answer; bool [n].
    """

    pairs: np.ndarray
    num_bytes: np.ndarray
    at_turn: np.ndarray
    inside: np.ndarray


def fit_conversations(view: Corpus, documents: np.ndarray, seq_len: int, whole_answers: bool = False) -> KeptPairs:
    """Cut each of `documents` to whole turns within seq_len pairs or, if no turn fits, within its first answer.

    A conversation that is cut counts bytes in proportion to the targets it keeps. whole_answers: leave out a
    conversation if no turn fits, since reasoning that is cut would teach the model never to finish it.
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
    """Counts over a corpus: pairs kept, and conversations cut after a turn, cut within an answer, and left out.
    whole_answers: as in `fit_conversations`."""

    pairs: int = 0
    at_turn: int = 0
    inside: int = 0
    left_out: int = 0
    whole_answers: bool = False

    @staticmethod
    def from_corpus(view: Corpus, seq_len: int, whole_answers: bool = False) -> "CutCounts":
        """Takes one pass over the index, and over the codes of conversations longer than a row."""
        total = CutCounts(whole_answers=whole_answers)
        step = max(1, _CHUNK_TOKENS * view.num_documents // max(1, view.num_tokens))
        for first in range(0, view.num_documents, step):
            documents = np.arange(first, min(first + step, view.num_documents))
            kept = fit_conversations(view, documents, seq_len, whole_answers)
            total = CutCounts(
                total.pairs + int(kept.pairs.sum()),
                total.at_turn + int(kept.at_turn.sum()),
                total.inside + int(kept.inside.sum()),
                total.left_out + int((kept.pairs == 0).sum()),
                whole_answers,
            )
        return total

    def __str__(self) -> str:
        reason = "answer does not fit" if self.whole_answers else "question alone is longer"
        parts = [
            f"{self.at_turn:,} cut after an earlier turn" if self.at_turn else "",
            f"{self.inside:,} cut within their first answer" if self.inside else "",
            f"{self.left_out:,} left out, as the first {reason}" if self.left_out else "",
        ]
        return ", ".join(part for part in parts if part)
