"""Packed batches of preference pairs: both answers of a pair lie side by side in one row."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np

from minimind.data.loader import Batch, PackedLoader
from minimind.data.rows import Pieces, segments
from minimind.data.store import Corpus
from minimind.data.weights import SIDE, Cuts


@dataclass(frozen=True, eq=False)
class PairBatch(Batch):
    """A Batch in which each side of a pair is a segment of its own.

    chosen, rejected: int64 [P], which segments of cu_seqlens are the answers of each pair. pairs: int64 [P], their
    numbers in the corpus. global_num_pairs: those of all ranks together, which is also global_weight.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    pairs: np.ndarray
    global_num_pairs: int


class PairLoader(PackedLoader):
    """PackedLoader over the pairs of `open_preferences`. As a row belongs to one micro-batch of one rank, so does a
    pair. One that is longer than a row is left out whole (`left_out` counts them): cut, its sides might no longer
    differ, and neither would end. Raises ValueError where none fits.
    """

    def __init__(
        self,
        view: Corpus,
        seq_len: int,
        rows: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        shortest = int(self._tokens(view).min())
        if 1 <= seq_len < shortest:
            raise ValueError(
                f"--seq-len {seq_len}: a row holds both answers of a pair, and the shortest pair has {shortest} tokens"
            )
        super().__init__(view, seq_len, rows, seed, shuffle, rank, world_size)

    @cached_property
    def cuts(self) -> Cuts:
        tokens = self._tokens(self.view)
        fits = tokens <= self.seq_len
        return Cuts(pairs=int(tokens[fits].sum()), left_out=int((~fits).sum()))

    @property
    def left_out(self) -> int:
        """Pairs longer than a row."""
        return self.cuts.left_out

    @property
    def num_pairs(self) -> int:
        """Pairs of one pass."""
        return self.view.num_documents - self.left_out

    @property
    def max_segments(self) -> int:
        """As in PackedLoader; a pair is two."""
        return 2 * super().max_segments

    def epoch_batches(self) -> Iterator[PairBatch]:
        return cast(Iterator[PairBatch], super().epoch_batches())

    @staticmethod
    def _tokens(view: Corpus, documents: np.ndarray | None = None) -> np.ndarray:
        """(input, target) positions that each pair takes; the one between its sides is no target."""
        return view.lengths(np.arange(view.num_documents) if documents is None else documents) - 1

    def _cut(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tokens = self._tokens(self.view, documents)
        which = np.flatnonzero(tokens <= self.seq_len)
        return which, np.zeros_like(which), tokens[which], self.view.bytes_of(documents)[which]

    def _assemble(self, batch: Pieces) -> PairBatch:
        whole = super()._assemble(batch)
        mine = batch.rows(np.arange(self.rank, batch.num_rows, self.world_size))
        sizes, is_piece = segments(mine, len(whole.documents), self.seq_len)
        starts = (sizes.cumsum() - sizes)[is_piece]
        second = np.flatnonzero(self.view.gather_codes(mine.address, mine.length) & SIDE)
        middles = starts + second - (mine.length.cumsum() - mine.length)
        bounds = np.sort(np.concatenate([whole.cu_seqlens, middles]))
        chosen = np.searchsorted(bounds, starts)
        places = np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))
        number = len(batch.document)
        return PairBatch(
            **vars(whole)
            | {
                "cu_seqlens": bounds.astype(np.int32),
                "position_ids": places.reshape(whole.input_ids.shape),
                "global_weight": float(number),
            },
            chosen=chosen,
            rejected=chosen + 1,
            pairs=mine.document,
            global_num_pairs=number,
        )
