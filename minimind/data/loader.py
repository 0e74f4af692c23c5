"""Load packed batches from a corpus, or from a mixture of several parts, in constant memory.

Their order depends only on the seed and the epoch. A batch may span windows and epochs, so that no row is dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from minimind.data.corpus import Corpus
from minimind.data.encoding import MARKER, NONE, TURN_END, class_of
from minimind.data.mixture import Mixture, PartSampler
from minimind.data.packing import Pieces, RowStream, cut_documents, join, segments

IGNORE_INDEX = -100
_CHUNK_TOKENS = 1 << 22  # in the conversations that are counted at once


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of packed documents; numpy arrays.

    input_ids, targets, position_ids: int64 [rows, seq_len]. Targets are -100 at padding, which has input 0;
    positions restart at 0 with every piece of a document and every padding tail.
    cu_seqlens: int32 [n + 1], the boundaries of segments in the flattened rows * seq_len tokens. Every piece and every
    padding tail is a segment, so that the boundaries include 0, rows * seq_len and the ends of all rows.
    num_targets: targets on this rank. global_num_targets: targets on all ranks.
    num_bytes: UTF-8 bytes of the text predicted on this rank. A document that was cut counts with its last piece.
    documents: the document numbers of each row, int64.
    loss_weights: float32 [rows, seq_len], 0 where there is no target; None if every target has weight 1.
    global_weight: the sum of the weights on all ranks; global_num_targets if loss_weights is None.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    num_targets: int
    global_num_targets: int
    num_bytes: int
    documents: list[np.ndarray]
    loss_weights: np.ndarray | None
    global_weight: float


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
        kept_targets = int(targets[:kept].sum()) if len(turns) or not whole_answers else 0
        pairs[i] = kept if kept_targets else 0
        num_bytes[i] = num_bytes[i] * kept_targets // int(targets.sum())
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


class PackedLoader:
    """Endless batches of `rows` rows of `seq_len` tokens from `view`; rank r gets rows r::world_size of each.

    The rows of all ranks together do not depend on `world_size`. If it does not divide `rows`, the later ranks get a
    last row of padding. Raises ValueError on sizes below 1 and on more ranks than rows.

    Conversations (a weighted `view`) stay whole, and only the assistant's tokens are targets. A conversation longer
    than a row is cut after its last turn that fits, or else within its first answer; `cuts` counts them.
    marker_weight: the weight of reasoning markers; other targets have weight 1.
    whole_answers: leave out a conversation if its first answer does not fit.
    mixture: draw rows from parts of the corpus by weight; set `horizon` before the first batch.
    """

    _segments_per_piece = 1

    def __init__(
        self,
        view: Corpus,
        seq_len: int,
        rows: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        marker_weight: float = 1.0,
        whole_answers: bool = False,
        mixture: Mixture | None = None,
    ) -> None:
        if seq_len < 1 or rows < 1:
            raise ValueError(f"seq_len={seq_len} and rows={rows} must both be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be from 0 to below world_size={world_size}")
        if rows < world_size:
            raise ValueError(f"a batch of {rows} rows cannot be shared by {world_size} ranks; use larger batches")
        if view.num_tokens <= view.num_documents:
            raise ValueError("the data has nothing to predict: no document is longer than one token")
        self.view, self.seq_len, self.rows, self.seed, self.shuffle = view, seq_len, rows, seed, shuffle
        self.marker_weight, self.whole_answers = marker_weight, whole_answers
        self.rank, self.world_size = rank, world_size
        self.mixture, self._draw = mixture, PartSampler(mixture) if mixture else None
        ranges = mixture.ranges if mixture else ((0, view.num_documents),)
        self.streams = [RowStream(view, a, b, seq_len, seed, shuffle, self._cut) for a, b in ranges]
        if view.weighted and not self.cuts.pairs:
            raise ValueError(f"--seq-len {seq_len}: every first question is longer; use longer rows")

    @property
    def epoch(self) -> int:
        """The epoch of the next row, from 0; the lowest of a mixture's parts."""
        return min(stream.epoch for stream in self.streams)

    @property
    def horizon(self) -> int:
        """Rows of the whole run, over which the weights of a mixture change; 0 without a mixture."""
        return self._draw.horizon if self._draw else 0

    @horizon.setter
    def horizon(self, rows: int) -> None:
        if self._draw:
            self._draw.horizon = rows

    @property
    def tokens_per_epoch(self) -> int:
        """(input, target) pairs in one epoch."""
        if self.view.weighted:
            return self.cuts.pairs
        return self.view.num_tokens - self.view.num_documents

    @cached_property
    def cuts(self) -> CutCounts:
        """The conversations that do not fit into a row."""
        return CutCounts.from_corpus(self.view, self.seq_len, self.whole_answers)

    @property
    def fill(self) -> float:
        """The share of positions that are not padding, measured on the first window."""
        first = join([stream.pieces(0, 0) for stream in self.streams])
        return float(first.length.sum()) / (first.num_rows * self.seq_len)

    @property
    def max_segments(self) -> int:
        """An estimate of the most segments, padding tails included, in a rank's share of a batch: a quarter more than
        the maximum over consecutive rows of the first window, limited by its fullest rows. Few batches have more."""
        counts = self._segments_of_rows(join([stream.pieces(0, 0) for stream in self.streams]))
        rows = -(-self.rows // self.world_size)
        span = self.world_size * (rows - 1) + 1  # rows of the stream among which a rank takes its share of a batch
        stream = np.resize(counts, len(counts) + span - 1)  # a batch may continue in the next epoch
        most = int(sliding_window_view(stream, span)[:, :: self.world_size].sum(1).max())
        fullest = np.sort(counts)[-rows:].sum() + max(0, rows - len(counts)) * counts.max()
        return min(most + most // 4, int(fullest))

    def next_batch(self) -> Batch:
        """The next batch. An epoch's last row is followed by the first of the next epoch."""
        counts = self._draw.rows(self.rows) if self._draw else [self.rows]
        parts = [part for stream, count in zip(self.streams, counts, strict=True) for part in stream.take(count)]
        return self._assemble(join(parts))

    def epoch_batches(self) -> Iterator[Batch]:
        """Yield the whole first epoch, with rows of padding in the last batch. The position of the loader stays."""
        rest: list[Pieces] = []
        windows = ((stream, window) for stream in self.streams for window in range(stream.num_windows))
        for stream, window in windows:
            pieces = join([*rest, stream.pieces(0, window)])
            whole = pieces.num_rows // self.rows * self.rows
            for first in range(0, whole, self.rows):
                yield self._assemble(pieces.rows(np.arange(first, first + self.rows)))
            rest = [pieces.rows(np.arange(whole, pieces.num_rows))]
        if rest[0].num_rows:
            yield self._assemble(rest[0])

    def state(self) -> dict[str, Any]:
        """The position in the stream of rows, and the identity of the data. JSON-able, the same on all ranks."""
        if self._draw is None:
            return self.streams[0].state() | self._identity()
        drawn = {"taken": self._draw.taken, "owed": list(self._draw.owed)}
        return drawn | {"places": [stream.state() for stream in self.streams]} | self._identity()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to the position of an earlier `state()`, which may be from another rank, world size or number of rows.

        Raises ValueError if the state is of other data, or of the same data packed differently.
        """
        for name, value in self._identity().items():
            saved = state.get(name)
            if saved != value:
                raise ValueError(
                    f"the checkpoint does not fit this data: {name} was {saved} and is {value} now; "
                    "resume with the same data and settings, or start a new run"
                )
        if self._draw is None:
            self.streams[0].load_state(state)
            return
        for stream, place in zip(self.streams, state["places"], strict=True):
            stream.load_state(place)
        self._draw.taken, self._draw.owed = state["taken"], list(state["owed"])

    def _identity(self) -> dict[str, Any]:
        view = self.view
        mixed = {"mixture": self.mixture.key()} if self.mixture else {}
        return {
            "data": view.identity,
            "documents": view.num_documents,
            "tokens": view.num_tokens,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "shuffle": int(self.shuffle),
            "window_documents": self.streams[0].window_documents,
            **mixed,
        }

    def _segments_of_rows(self, pieces: Pieces) -> np.ndarray:
        """The segments of each row; int64 [rows]."""
        row_of = np.repeat(np.arange(pieces.num_rows), np.diff(pieces.row_starts))
        filled = np.bincount(row_of, weights=pieces.length, minlength=pieces.num_rows)
        return self._segments_per_piece * np.diff(pieces.row_starts) + (filled < self.seq_len)

    def _cut(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(index in `documents`, start, length, bytes counted) of each piece; a conversation has at most one."""
        if self.view.weighted:
            kept = fit_conversations(self.view, documents, self.seq_len, self.whole_answers)
            which = np.flatnonzero(kept.pairs)
            return which, np.zeros_like(which), kept.pairs[which], kept.num_bytes[which]
        lengths = self.view.lengths(documents)
        which, start, length = cut_documents(lengths, self.seq_len)
        last = start + length == lengths[which] - 1
        return which, start, length, np.where(last, self.view.bytes_of(documents)[which], 0)

    def _assemble(self, batch: Pieces) -> Batch:
        """This rank's share of a global batch (which may be short of rows)."""
        own = batch.rows(np.arange(self.rank, batch.num_rows, self.world_size))
        rows = -(-self.rows // self.world_size)
        sizes, is_piece = segments(own, rows, self.seq_len)
        ends = sizes.cumsum()
        position_ids = np.arange(rows * self.seq_len) - np.repeat(ends - sizes, sizes)
        filled = np.repeat(is_piece, sizes)
        input_ids = np.zeros(rows * self.seq_len, np.int64)
        targets = np.full(rows * self.seq_len, IGNORE_INDEX, np.int64)
        input_ids[filled] = self.view.gather(own.address, own.length)
        targets[filled] = self.view.gather(own.address + 1, own.length)
        counted = _TargetCounts(int(own.length.sum()), int(batch.length.sum()), float(batch.length.sum()))
        if self.view.weighted:
            counted = self._weigh(own, batch, targets, filled)
        shape = (rows, self.seq_len)
        starts = np.append(own.row_starts, np.full(rows - own.num_rows, len(own.document)))
        return Batch(
            input_ids.reshape(shape),
            targets.reshape(shape),
            position_ids.reshape(shape),
            np.concatenate([[0], ends]).astype(np.int32),
            counted.num_targets,
            counted.global_num_targets,
            int(own.num_bytes.sum()),
            [own.document[a:b] for a, b in pairwise(starts)],
            None if counted.loss_weights is None else counted.loss_weights.reshape(shape),
            counted.global_weight,
        )

    def _weigh(self, own: Pieces, batch: Pieces, targets: np.ndarray, filled: np.ndarray) -> "_TargetCounts":
        """Remove the targets that are not the assistant's; count and weigh the others, on this rank and on all."""
        classes = class_of(self.view.gather_codes(own.address + 1, own.length))
        whole = class_of(self.view.gather_codes(batch.address + 1, batch.length))
        targets[filled] = np.where(classes == NONE, IGNORE_INDEX, targets[filled])
        number, markers = int(np.count_nonzero(whole)), int(np.count_nonzero(whole == MARKER))
        weights = None
        if self.marker_weight != 1:
            weights = np.zeros(len(targets), np.float32)
            weights[filled] = np.array([0, 1, self.marker_weight], np.float32)[classes]
        weight = number + markers * (self.marker_weight - 1)
        return _TargetCounts(int(np.count_nonzero(classes)), number, weight, weights)


@dataclass(frozen=True, eq=False)
class _TargetCounts:
    """Targets on this rank and on all, the weight on all, and the weights of this rank's tokens if they differ."""

    num_targets: int
    global_num_targets: int
    global_weight: float
    loss_weights: np.ndarray | None = None
