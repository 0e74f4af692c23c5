"""Packed batches in an order that is a function of the seed and the passes alone, in constant memory.

Batches are taken from a stream of packed rows (row_stream.py), or of a mixture from several, and may span windows and
epochs, so that no row is ever dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from minimind.data.corpus import Corpus
from minimind.data.loss_mask import MARKER, NONE, CutCounts, class_of, fit
from minimind.data.mixture import Mixture, PartSampler
from minimind.data.packing import cut_documents
from minimind.data.row_stream import RowStream
from minimind.data.rows import Pieces, join, segments

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of packed documents; numpy arrays.

    input_ids, targets, position_ids: int64 [rows, seq_len]. Targets are -100 at padding, which has input 0;
    positions restart at 0 with every piece of a document and every padding tail.
    cu_seqlens: int32 [n + 1], boundaries over the flattened rows * seq_len tokens: every piece and every
    padding tail is a segment, so that it begins with 0, ends with rows * seq_len, and has every row boundary.
    num_targets: pairs trained on here. global_num_targets: those of all ranks together.
    num_bytes: UTF-8 bytes of text predicted here; a document that was cut counts where its last piece is.
    documents: for each row the numbers of its documents in the corpus, int64.
    loss_weights: float32 [rows, seq_len], 0 where there is no target; None where every target has weight 1.
    global_weight: the weights of all ranks together; without loss_weights global_num_targets.
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


class PackedLoader:
    """Batches of `rows` rows of `seq_len` over `view`, without end; rank r has rows r::world_size of each.

    The rows of all ranks together do not depend on `world_size`. When it does not divide `rows`, the later
    ranks get a last row of padding. Raises ValueError on sizes below 1 or more ranks than rows.

    Conversations (a weighted `view`) stay whole: one that is longer than a row is cut behind its last turn that
    fits, or else within its first answer (`cuts` counts them), and only the assistant's tokens are targets.
    marker_weight: the weight of those of reasoning markers; the others' is 1. whole_answers: leave a conversation
    out whose first answer does not fit. mixture: draw rows from parts of the corpus by weight; `horizon`, the rows of
    the whole run, is then set before the first batch.
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
        """Passes begun before the one the next row is from; of a mixture, over the part that had the fewest."""
        return min(stream.epoch for stream in self.streams)

    @property
    def horizon(self) -> int:
        """Rows of the whole run, by which the weights of a mixture change; 0 where it does not matter."""
        return self._draw.horizon if self._draw else 0

    @horizon.setter
    def horizon(self, rows: int) -> None:
        if self._draw:
            self._draw.horizon = rows

    @property
    def tokens_per_epoch(self) -> int:
        """(input, target) pairs of one pass."""
        if self.view.weighted:
            return self.cuts.pairs
        return self.view.num_tokens - self.view.num_documents

    @cached_property
    def cuts(self) -> CutCounts:
        """What of the conversations does not fit into a row."""
        return CutCounts.of(self.view, self.seq_len, self.whole_answers)

    @property
    def fill(self) -> float:
        """Share of a row's positions that hold tokens, the rest being padding; measured on the first window."""
        first = join([stream.pieces(0, 0) for stream in self.streams])
        return float(first.length.sum()) / (first.num_rows * self.seq_len)

    @property
    def max_segments(self) -> int:
        """About the most segments, padding tails among them, in a rank's share of a batch: a quarter more than any rows
        in a row of the first window have, and no more than its fullest rows. Rarely a later batch has more."""
        counts = self._segments_of_rows(join([stream.pieces(0, 0) for stream in self.streams]))
        rows = -(-self.rows // self.world_size)
        span = self.world_size * (rows - 1) + 1  # of the stream, where the rank's rows of a batch lie
        stream = np.resize(counts, len(counts) + span - 1)  # a batch may go on in the next pass
        most = int(sliding_window_view(stream, span)[:, :: self.world_size].sum(1).max())
        fullest = np.sort(counts)[-rows:].sum() + max(0, rows - len(counts)) * counts.max()
        return min(most + most // 4, int(fullest))

    def next_batch(self) -> Batch:
        """The next batch; after an epoch's last row come the first of the next epoch."""
        counts = self._draw.rows(self.rows) if self._draw else [self.rows]
        taken = [part for stream, count in zip(self.streams, counts, strict=True) for part in stream.take(count)]
        return self._assemble(join(taken))

    def epoch_batches(self) -> Iterator[Batch]:
        """One whole pass, the first epoch's; rows of padding fill the last batch. Leaves the cursor alone."""
        held: list[Pieces] = []
        windows = ((stream, window) for stream in self.streams for window in range(stream.num_windows))
        for stream, window in windows:
            held = [join([*held, stream.pieces(0, window)])]
            whole = held[0].num_rows // self.rows * self.rows
            for first in range(0, whole, self.rows):
                yield self._assemble(held[0].rows(np.arange(first, first + self.rows)))
            held = [held[0].rows(np.arange(whole, held[0].num_rows))]
        if held[0].num_rows:
            yield self._assemble(held[0])

    def state(self) -> dict[str, Any]:
        """The place in the stream of rows, and what it is a place in. JSON-able, the same on all ranks."""
        if self._draw is None:
            return self.streams[0].place() | self._identity()
        drawn = {"taken": self._draw.taken, "owed": list(self._draw.owed)}
        return drawn | {"places": [stream.place() for stream in self.streams]} | self._identity()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to the place that `state()` gave, also on another rank, number of ranks or number of rows.

        Raises ValueError when it is a place in other data, or in the same data packed differently.
        """
        for name, mine in self._identity().items():
            theirs = state.get(name)
            if theirs != mine:
                raise ValueError(
                    f"the checkpoint does not fit this data: {name} was {theirs} and is {mine} now; "
                    "resume with the same data and settings, or start a new run"
                )
        if self._draw is None:
            self.streams[0].go_to(state)
            return
        for stream, place in zip(self.streams, state["places"], strict=True):
            stream.go_to(place)
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
        """How many segments each row has; int64 [rows]."""
        row_of = np.repeat(np.arange(pieces.num_rows), np.diff(pieces.row_starts))
        filled = np.bincount(row_of, weights=pieces.length, minlength=pieces.num_rows)
        return self._segments_per_piece * np.diff(pieces.row_starts) + (filled < self.seq_len)

    def _cut(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(number in `documents`, start, length, bytes counted) of each piece; a conversation is one or none."""
        if self.view.weighted:
            kept = fit(self.view, documents, self.seq_len, self.whole_answers)
            which = np.flatnonzero(kept.pairs)
            return which, np.zeros_like(which), kept.pairs[which], kept.num_bytes[which]
        lengths = self.view.lengths(documents)
        which, start, length = cut_documents(lengths, self.seq_len)
        last = start + length == lengths[which] - 1
        return which, start, length, np.where(last, self.view.bytes_of(documents)[which], 0)

    def _assemble(self, batch: Pieces) -> Batch:
        """This rank's share of a global batch (which may be short of rows)."""
        mine = batch.rows(np.arange(self.rank, batch.num_rows, self.world_size))
        rows = -(-self.rows // self.world_size)
        sizes, is_piece = segments(mine, rows, self.seq_len)
        ends = sizes.cumsum()
        position_ids = np.arange(rows * self.seq_len) - np.repeat(ends - sizes, sizes)
        filled = np.repeat(is_piece, sizes)
        input_ids = np.zeros(rows * self.seq_len, np.int64)
        targets = np.full(rows * self.seq_len, IGNORE_INDEX, np.int64)
        input_ids[filled] = self.view.gather(mine.address, mine.length)
        targets[filled] = self.view.gather(mine.address + 1, mine.length)
        counted = _TargetCounts(int(mine.length.sum()), int(batch.length.sum()), float(batch.length.sum()))
        if self.view.weighted:
            counted = self._weigh(mine, batch, targets, filled)
        shape = (rows, self.seq_len)
        starts = np.append(mine.row_starts, np.full(rows - mine.num_rows, len(mine.document)))
        return Batch(
            input_ids.reshape(shape),
            targets.reshape(shape),
            position_ids.reshape(shape),
            np.concatenate([[0], ends]).astype(np.int32),
            counted.num_targets,
            counted.global_num_targets,
            int(mine.num_bytes.sum()),
            [mine.document[a:b] for a, b in pairwise(starts)],
            None if counted.loss_weights is None else counted.loss_weights.reshape(shape),
            counted.global_weight,
        )

    def _weigh(self, mine: Pieces, batch: Pieces, targets: np.ndarray, filled: np.ndarray) -> "_TargetCounts":
        """Take what is not the assistant's out of `targets`; count and weigh the rest, of all ranks too."""
        classes = class_of(self.view.gather_codes(mine.address + 1, mine.length))
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
    """Targets of this rank and of all, the weight of all, and the weights where they differ."""

    num_targets: int
    global_num_targets: int
    global_weight: float
    loss_weights: np.ndarray | None = None
