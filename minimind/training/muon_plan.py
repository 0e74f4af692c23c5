"""Which matrices Muon orthogonalises together, and under FSDP which rank does it.

Each matrix has one owner. The ranks send it their rows, of all matrices in one exchange, and get them back in a second
one (Moonlight, arXiv 2502.16982, section 2.3): a rank computes its share, and 4 bytes an element cross the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from minimind.utils.spans import span


@dataclass(frozen=True)
class Matrix:
    """Rows first..first + rows of parameter number `parameter`, the leading dimensions of a stack as one."""

    parameter: int
    first: int
    rows: int
    columns: int

    @property
    def scale(self) -> float:
        """What gives the update the root mean square of AdamW's, about 0.2."""
        return 0.2 * math.sqrt(max(self.rows, self.columns))

    @property
    def cost(self) -> int:
        short, long = sorted((self.rows, self.columns))
        return short * short * (2 * long + short)


@dataclass(frozen=True)
class RowRange:
    """Rows start..stop of number `tensor` in a list of [rows, columns]."""

    tensor: int
    start: int
    stop: int
    columns: int

    @property
    def elements(self) -> int:
        return (self.stop - self.start) * self.columns


@dataclass(frozen=True)
class MuonPlan:
    """mine: this rank's rows of the parameters, matrix by matrix in the order of their owners; by_scale: the same by
    the scale of the update. sent, received: elements to and from each rank. owned: the matrices of this rank, and
    arrivals: the rows of those that the ranks hold, rank by rank. batches: how `owned` is stacked, (K, m, n) each."""

    group: dist.ProcessGroup | None
    mine: list[RowRange]
    by_scale: dict[float, list[RowRange]]
    sent: list[int]
    received: list[int]
    owned: list[RowRange]
    arrivals: list[RowRange]
    batches: list[tuple[int, int, int]]

    @staticmethod
    def of(parameters: Sequence[Tensor], rows: Sequence[Sequence[int] | None], batch_elements: int) -> MuonPlan:
        """rows: of the matrices in each parameter, or in each expert of a stack; None: it is one. Raises ValueError."""
        group, rank, world = _processes(parameters[0])
        matrices = [m for i, p in enumerate(parameters) for m in matrices_of(i, p.shape, rows[i])]
        cuts = [_Cut(p, world) for p in parameters]
        shares = share_out(matrices, world)
        mine = [[cuts[m.parameter].held(m, rank) for m in share] for share in shares]
        owned = shares[rank]
        arrivals = [[cuts[m.parameter].place(i, m, r) for i, m in enumerate(owned)] for r in range(world)]
        by_scale: dict[float, list[RowRange]] = {}
        for matrix, piece in zip(chain(*shares), chain(*mine), strict=True):
            by_scale.setdefault(matrix.scale, []).append(piece)
        return MuonPlan(
            group=group,
            mine=list(chain(*mine)),
            by_scale=by_scale,
            sent=[sum(p.elements for p in pieces) for pieces in mine],
            received=[sum(p.elements for p in pieces) for pieces in arrivals],
            owned=[RowRange(i, 0, m.rows, m.columns) for i, m in enumerate(owned)],
            arrivals=list(chain(*arrivals)),
            batches=batches_of(owned, batch_elements),
        )

    def stacks(self, owned: Tensor) -> list[Tensor]:
        """The flat `owned` -> [K, m, n] of each batch, [m, n] where K is 1; views."""
        parts = owned.split([math.prod(shape) for shape in self.batches])
        return [part.view(shape).squeeze(0) for part, shape in zip(parts, self.batches, strict=True)]


@contextmanager
def exchange(mine: Tensor, plan: MuonPlan) -> Iterator[list[Tensor]]:
    """The stacks that this rank is to orthogonalise in place; at the end its own rows are in `mine`, flat as
    plan.mine."""
    if plan.group is None:
        yield plan.stacks(mine)
        return
    received = mine.new_empty(sum(plan.received))
    owned = mine.new_empty(sum(piece.elements for piece in plan.owned))
    with span("communication"):
        dist.all_to_all_single(received, mine, plan.received, plan.sent, group=plan.group)
    parts, places = cut(received, plan.arrivals), take(cut(owned, plan.owned), plan.arrivals)
    copy(places, parts)
    yield plan.stacks(owned)
    copy(parts, places)
    with span("communication"):
        dist.all_to_all_single(mine, received, plan.sent, plan.received, group=plan.group)


def cut(flat: Tensor, pieces: Sequence[RowRange]) -> list[Tensor]:
    """[rows, columns] of each piece, one behind the other in `flat`; views."""
    parts = flat.split([piece.elements for piece in pieces])
    return [part.view(-1, piece.columns) for part, piece in zip(parts, pieces, strict=True)]


def take(tensors: Sequence[Tensor], pieces: Sequence[RowRange]) -> list[Tensor]:
    """Those rows of `tensors`; views."""
    return [tensors[piece.tensor][piece.start : piece.stop] for piece in pieces]


def copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:  # a rank may own nothing
        torch._foreach_copy_(to, source)


def matrices_of(number: int, shape: Sequence[int], rows: Sequence[int] | None = None) -> list[Matrix]:
    """The matrices in parameter `number`, one under the other. Raises ValueError."""
    if len(shape) not in (2, 3):
        raise ValueError(f"Muon takes matrices and stacks of matrices, not a tensor of shape {tuple(shape)}")
    *experts, height, columns = shape
    rows = rows or [height]
    if sum(rows) != height:
        raise ValueError(f"matrices of {tuple(rows)} rows do not make up one of shape {(height, columns)}")
    counts = list(rows) * math.prod(experts)
    return [Matrix(number, sum(counts[:i]), count, columns) for i, count in enumerate(counts)]


def share_out(matrices: Sequence[Matrix], ranks: int) -> list[list[Matrix]]:
    """The matrices of each rank, ordered by shape: the costliest left goes to the rank with the least to do."""
    shares: list[list[Matrix]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for matrix in sorted(matrices, key=lambda m: -m.cost):
        rank = load.index(min(load))
        shares[rank].append(matrix)
        load[rank] += matrix.cost
    return [sorted(share, key=_shape) for share in shares]


def batches_of(matrices: Sequence[Matrix], elements: int) -> list[tuple[int, int, int]]:
    """(K, m, n) of each batch of the matrices, which are ordered by shape; none has more than `elements` and K > 1."""
    batches = []
    for (m, n), same in groupby(matrices, key=_shape):
        left, most = len(list(same)), max(1, elements // (m * n))
        batches += [(min(most, left - done), m, n) for done in range(0, left, most)]
    return batches


def _shape(matrix: Matrix) -> tuple[int, int]:
    return matrix.rows, matrix.columns


def _processes(parameter: Tensor) -> tuple[dist.ProcessGroup | None, int, int]:
    """(group, rank, size) of those that hold a shard of it each."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.shape[-1] == 1:
        return None, 0, 1
    mesh = parameter.device_mesh
    return mesh.get_group(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1), mesh.shape[-1]


class _Cut:
    """How FSDP shards a parameter: torch.chunk of one dimension, the last shards shorter or empty."""

    def __init__(self, parameter: Tensor, world: int) -> None:
        placement = parameter.placements[-1] if isinstance(parameter, DTensor) else Shard(0)
        dim = placement.dim if isinstance(placement, Shard) else -1
        if not 0 <= dim < parameter.ndim - 1:
            raise ValueError(f"Muon needs whole rows: a tensor of {tuple(parameter.shape)} is cut by {placement}")
        self.blocks, self.size = math.prod(parameter.shape[:dim]), parameter.shape[dim]
        self.rows = math.prod(parameter.shape[dim + 1 : -1])  # in one step of the dimension
        self.chunk = -(-self.size // world)

    def held(self, matrix: Matrix, rank: int) -> RowRange:
        """Which rows of the rank's shard belong to the matrix."""
        start, stop, row = self._overlap(matrix, rank)
        return RowRange(matrix.parameter, row, row + stop - start, matrix.columns)

    def place(self, number: int, matrix: Matrix, rank: int) -> RowRange:
        """Which rows of the matrix, number `number` in a list, the rank holds."""
        start, stop, _ = self._overlap(matrix, rank)
        return RowRange(number, start, stop, matrix.columns)

    def _overlap(self, matrix: Matrix, rank: int) -> tuple[int, int, int]:
        """(first row, row behind the last) in the matrix, and the first one's row in the rank's shard."""
        begin = min(self.size, rank * self.chunk)
        height = (min(self.size, begin + self.chunk) - begin) * self.rows
        block = matrix.first // (self.size * self.rows)  # a matrix lies in one block
        top = (block * self.size + begin) * self.rows
        start, stop = max(matrix.first, top), min(matrix.first + matrix.rows, top + height)
        if stop <= start:
            return 0, 0, 0
        return start - matrix.first, stop - matrix.first, block * height + start - top
