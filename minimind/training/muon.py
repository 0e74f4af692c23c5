"""Muon: the momentum of each matrix with its singular values brought near 1 (Jordan et al. 2024).

    m <- m + (1 - mu) (g - m);  u = g + mu (m - g);  w <- w (1 - lr decay) - 0.2 lr sqrt(max(rows, columns)) NS(u)

The factor gives an update the size of AdamW's, so that one `lr` serves both (Moonlight, arXiv 2502.16982). This is what
torch.optim.Muon computes with adjust_lr_fn="match_rms_adamw", and their state dicts are compatible.

Three variants are off by default here. `row_beta`: each row of the orthogonal factor is divided by the running root
mean square of its elements, and the factor becomes 0.2 lr, so that all rows move alike (NorMuon, arXiv 2510.05491;
there the whole update is scaled to that size afterwards). `cautious`: a weight decays only where the update also moves
it towards zero (arXiv 2510.12402). `block`: the shorter side of a matrix is cut into blocks, each of which is
orthogonalised by itself in a share of the time; the update's Frobenius norm stays the same (as MuonBP's blocks, arXiv
2510.16981, but at every step).

Matrices of one shape are batched. Under FSDP each matrix has one owner: the ranks send it their rows, of all matrices
in one exchange, and get them back in a second one (section 2.3 there). So a rank computes only its share, and 4 bytes
per element cross the network.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from minimind.utils.spans import span

_A, _B, _C = 3.4445, -4.7750, 2.0315  # Jordan's quintic: steep at 0, and bounded
TORCHS_ITERATIONS, _EPS = 5, 1e-7
# Of pretraining on a CPU, where five iterations over whole matrices are a quarter of a step; blocks where they were
# measured, in runs with a depth warm-up (docs/recipe.md).
CPU_ITERATIONS, CPU_BLOCK = 3, 256
RMS = 0.2  # root mean square of an update at rate 1: about AdamW's

# Elements of a batch. On a GPU 64 MB of bf16, small beside the model. On a CPU what a core's cache holds: larger
# matrices took a fifth less time one by one than in a batch (docs/LOG.md).
_BATCH, _BATCH_ON_CPU = 1 << 25, 1 << 18


class Muon(torch.optim.Optimizer):
    """params: float32 matrices [m, n] or stacks of them [E, m, n]; under FSDP all on one mesh.

    rows: for parameters that pack several matrices, such as q, k and v, the rows of each; they add up to m, also in
      every matrix of a stack. By default [m, n] is one matrix, and a stack has E.
    batch_elements: elements of a batch; a larger matrix is a batch of its own. None: what suits the device.
    row_beta: decay of the mean squares of rows, from 0 to below 1. None: rows are not scaled.
    cautious: decay a weight only where the update moves it towards zero.
    iterations: of Newton-Schulz.
    block: cut the shorter side of each matrix into as many equal blocks as have at least this many rows or columns; 0:
      whole matrices.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        rows: Mapping[nn.Parameter, Sequence[int]] | None = None,
        batch_elements: int | None = None,
        row_beta: float | None = None,
        cautious: bool = False,
        iterations: int = TORCHS_ITERATIONS,
        block: int = 0,
    ) -> None:
        self.row_beta, self.cautious, self.block = row_beta, cautious, block
        # the keys of torch.optim.Muon: checkpoints of either load into the other
        fixed = {"nesterov": True, "ns_coefficients": (_A, _B, _C), "eps": _EPS, "ns_steps": iterations,
                 "adjust_lr_fn": "match_rms_adamw"}  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, **fixed})
        self.rows = {id(p): tuple(parts) for p, parts in (rows or {}).items()}
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        self.batch_elements = batch_elements or (_BATCH_ON_CPU if on_cpu else _BATCH)
        self._plans: dict[tuple[int, ...], MuonPlan] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameters in self._portions([p for p in group["params"] if p.grad is not None]):
                self._step(parameters, group)

    def _portions(self, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The parameters in groups that are updated together: all at once, or on a CPU as many as the cache holds."""
        if not parameters or parameters[0].device.type != "cpu" or isinstance(parameters[0], DTensor):
            return [parameters] if parameters else []
        portions: list[list[nn.Parameter]] = []
        room = 0
        for parameter in sorted(parameters, key=lambda p: p.shape):
            if parameter.numel() > room:
                portions, room = [*portions, []], self.batch_elements
            portions[-1].append(parameter)
            room -= parameter.numel()
        return portions

    def _step(self, parameters: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        plan = self._plan(parameters)
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights = [_rows(_local(p)) for p in parameters]
        gradients = [_rows(_local(p.grad).contiguous()) for p in parameters if p.grad is not None]
        means = [_rows(_local(self.state[p]["momentum_buffer"])) for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        updates = list(torch._foreach_lerp(gradients, means, momentum))
        orthogonalise(updates, plan, group["ns_steps"], self.block)
        if self.row_beta is not None:
            self._scale_rows(parameters, updates, self.row_beta)
        if self.cautious:
            for weight, update in zip(weights, updates, strict=True):
                weight.addcmul_(weight, (weight * update > 0).to(weight.dtype), value=-lr * decay)
        else:
            torch._foreach_mul_(weights, 1 - lr * decay)
        if self.row_beta is not None:
            torch._foreach_add_(weights, updates, alpha=-lr * RMS)
            return
        for scale, pieces in plan.by_scale.items():
            torch._foreach_add_(take(weights, pieces), take(updates, pieces), alpha=-lr * scale)

    def _scale_rows(self, parameters: list[nn.Parameter], updates: list[Tensor], beta: float) -> None:
        """Divide each row of the updates by the running root mean square of its elements, which begins with the first
        update's. A row lies on one rank."""
        for parameter, update in zip(parameters, updates, strict=True):
            squares, state = update.square().mean(1, keepdim=True), self.state[parameter]
            if "row_squares" not in state:
                state["row_squares"] = torch.zeros_like(parameter[..., :1])
                _rows(_local(state["row_squares"])).copy_(squares)
            means = _rows(_local(state["row_squares"])).lerp_(squares, 1 - beta)
            update.div_(means.sqrt().clamp_(min=_EPS))

    def _plan(self, parameters: list[nn.Parameter]) -> MuonPlan:
        key = tuple(id(p) for p in parameters)
        if key not in self._plans:
            parts = [self.rows.get(id(p)) for p in parameters]
            self._plans[key] = MuonPlan.from_parameters(parameters, parts, self.batch_elements)
        return self._plans[key]


def orthogonalise(updates: list[Tensor], plan: MuonPlan, iterations: int, block: int = 0) -> None:
    """Replace each matrix in `updates`, float32 [rows, columns], or each of its blocks by its orthogonal factor. All
    ranks call it."""
    flat = updates[0].new_empty(sum(plan.sent), dtype=_working_dtype(updates[0].device))
    torch._foreach_copy_(cut(flat, plan.own_rows), take(updates, plan.own_rows))
    with exchange(flat, plan) as stacks:
        for stack in stacks:
            blocks = blocks_of(stack, block)
            packed = blocks.contiguous()  # a copy where columns are cut
            newton_schulz_(packed.flatten(0, -3) if packed.ndim > 2 else packed, iterations)
            if packed is not blocks:
                blocks.copy_(packed)
    torch._foreach_copy_(take(updates, plan.own_rows), cut(flat, plan.own_rows))


def blocks_of(matrices: Tensor, block: int) -> Tensor:
    """A view [..., blocks, p, q] of matrices [..., m, n] whose shorter side is cut into as many equal blocks as have at
    least `block` rows or columns; the matrices themselves where that is one or `block` is 0."""
    m, n = matrices.shape[-2:]
    short = min(m, n)
    count = next((k for k in range(short // block, 1, -1) if short % k == 0), 1) if block else 1
    if count == 1:
        return matrices
    if m <= n:
        return matrices.unflatten(-2, (count, m // count))
    return matrices.unflatten(-1, (count, n // count)).movedim(-2, -3)


@functools.cache
def _working_dtype(device: torch.device) -> torch.dtype:
    """bf16; float32 on GPUs without bf16 instructions. fp16 would lose small gradients before they are normalised."""
    without = device.type == "mps" or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0))
    return torch.float32 if without else torch.bfloat16


def newton_schulz_(matrices: Tensor, iterations: int) -> None:
    """Replace each matrix U S V^T, [m, n] or [K, m, n], by U S' V^T. Each iteration brings S nearer to 1, from the
    largest values down. S' is from 0.66 to 1.2 where S is above 0.0015 of the Frobenius norm and there are five
    iterations, as in torch.optim.Muon. With fewer, S is divided by the Schatten 4-norm, which is a closer bound of its
    largest value and costs no product; then that is S above 0.017 of it with three, 0.005 with four."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    multiply_add = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for i in range(iterations):
        gram = x.mT @ x if tall else x @ x.mT  # of the shorter side
        if i == 0 and iterations < TORCHS_ITERATIONS:
            square = gram.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
            x, gram = x / square.sqrt(), gram / square
        polynomial = multiply_add(gram, gram, gram, beta=_B, alpha=_C)
        factors = (x, polynomial) if tall else (polynomial, x)
        x = multiply_add(x, *factors, beta=_A, out=matrices if i == iterations - 1 else None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows(tensor: Tensor) -> Tensor:
    """A view [rows, columns] that merges the leading dimensions of a stack."""
    return tensor.view(-1, tensor.shape[-1])


@dataclass(frozen=True)
class Matrix:
    """A matrix in parameter number `parameter`: `rows` rows from `first` on, counted over the whole stack."""

    parameter: int
    first: int
    rows: int
    columns: int

    @property
    def scale(self) -> float:
        """Factor that gives the update the root mean square of AdamW's, about 0.2."""
        return RMS * math.sqrt(max(self.rows, self.columns))

    @property
    def cost(self) -> int:
        """Operations of orthogonalising it, up to a constant factor."""
        short, long = sorted((self.rows, self.columns))
        return short * short * (2 * long + short)


@dataclass(frozen=True)
class RowRange:
    """Rows start..stop of tensor number `tensor` in a list of tensors [rows, columns]."""

    tensor: int
    start: int
    stop: int
    columns: int

    @property
    def elements(self) -> int:
        return (self.stop - self.start) * self.columns


@dataclass(frozen=True)
class MuonPlan:
    """Which matrices this rank orthogonalises, and which rows it sends for that.

    own_rows: this rank's rows of the parameters, matrix by matrix in the order of their owners; by_scale: the same
    grouped by the scale of the update. sent, received: elements to and from each rank. owned: the matrices that this
    rank orthogonalises; arrivals: the rows of these that each rank holds, rank by rank. batches: (K, m, n) of each
    batch of `owned`.
    """

    group: dist.ProcessGroup | None
    own_rows: list[RowRange]
    by_scale: dict[float, list[RowRange]]
    sent: list[int]
    received: list[int]
    owned: list[RowRange]
    arrivals: list[RowRange]
    batches: list[tuple[int, int, int]]

    @staticmethod
    def from_parameters(
        parameters: Sequence[Tensor], rows: Sequence[Sequence[int] | None], batch_elements: int
    ) -> MuonPlan:
        """rows: for each parameter, the rows of the matrices in it (in a stack, in every expert), or None for a single
        matrix. Raises ValueError if a parameter cannot be divided that way."""
        group, rank, world = _processes(parameters[0])
        matrices = [m for i, p in enumerate(parameters) for m in matrices_of(i, p.shape, rows[i])]
        cuts = [_Cut(p, world) for p in parameters]
        shares = share_out(matrices, world)
        own_rows = [[cuts[m.parameter].held(m, rank) for m in share] for share in shares]
        owned = shares[rank]
        arrivals = [[cuts[m.parameter].place(i, m, r) for i, m in enumerate(owned)] for r in range(world)]
        by_scale: dict[float, list[RowRange]] = {}
        for matrix, piece in zip(chain(*shares), chain(*own_rows), strict=True):
            by_scale.setdefault(matrix.scale, []).append(piece)
        return MuonPlan(
            group=group,
            own_rows=list(chain(*own_rows)),
            by_scale=by_scale,
            sent=[sum(p.elements for p in pieces) for pieces in own_rows],
            received=[sum(p.elements for p in pieces) for pieces in arrivals],
            owned=[RowRange(i, 0, m.rows, m.columns) for i, m in enumerate(owned)],
            arrivals=list(chain(*arrivals)),
            batches=batches_of(owned, batch_elements),
        )

    def stacks(self, owned: Tensor) -> list[Tensor]:
        """Views of each batch in the flat `owned`: [K, m, n], or [m, n] where K is 1."""
        parts = owned.split([math.prod(shape) for shape in self.batches])
        return [part.view(shape).squeeze(0) for part, shape in zip(parts, self.batches, strict=True)]


@contextmanager
def exchange(flat: Tensor, plan: MuonPlan) -> Iterator[list[Tensor]]:
    """Yields the batches that this rank orthogonalises in place. flat: this rank's rows in the order of plan.own_rows;
    afterwards it holds the results."""
    if plan.group is None:
        yield plan.stacks(flat)
        return
    received = flat.new_empty(sum(plan.received))
    owned = flat.new_empty(sum(piece.elements for piece in plan.owned))
    with span("communication"):
        dist.all_to_all_single(received, flat, plan.received, plan.sent, group=plan.group)
    parts, places = cut(received, plan.arrivals), take(cut(owned, plan.owned), plan.arrivals)
    copy(places, parts)
    yield plan.stacks(owned)
    copy(parts, places)
    with span("communication"):
        dist.all_to_all_single(flat, received, plan.sent, plan.received, group=plan.group)


def cut(flat: Tensor, pieces: Sequence[RowRange]) -> list[Tensor]:
    """Views [rows, columns] of the pieces, which follow one another in `flat`."""
    parts = flat.split([piece.elements for piece in pieces])
    return [part.view(-1, piece.columns) for part, piece in zip(parts, pieces, strict=True)]


def take(tensors: Sequence[Tensor], pieces: Sequence[RowRange]) -> list[Tensor]:
    """Views of the rows `pieces` of `tensors`."""
    return [tensors[piece.tensor][piece.start : piece.stop] for piece in pieces]


def copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:  # a rank may own nothing
        torch._foreach_copy_(to, source)


def matrices_of(number: int, shape: Sequence[int], rows: Sequence[int] | None = None) -> list[Matrix]:
    """The matrices in parameter `number`, from top to bottom. Raises ValueError if `rows` do not add up."""
    if len(shape) not in (2, 3):
        raise ValueError(f"Muon takes matrices and stacks of matrices, not a tensor of shape {tuple(shape)}")
    *experts, height, columns = shape
    rows = rows or [height]
    if sum(rows) != height:
        raise ValueError(f"matrices of {tuple(rows)} rows do not make up one of shape {(height, columns)}")
    counts = list(rows) * math.prod(experts)
    return [Matrix(number, sum(counts[:i]), count, columns) for i, count in enumerate(counts)]


def share_out(matrices: Sequence[Matrix], ranks: int) -> list[list[Matrix]]:
    """The matrices of each rank, ordered by shape: the costliest one left goes to the rank with the least work."""
    shares: list[list[Matrix]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for matrix in sorted(matrices, key=lambda m: -m.cost):
        rank = load.index(min(load))
        shares[rank].append(matrix)
        load[rank] += matrix.cost
    return [sorted(share, key=_shape) for share in shares]


def batches_of(matrices: Sequence[Matrix], elements: int) -> list[tuple[int, int, int]]:
    """(K, m, n) of each batch of `matrices`, which are ordered by shape; a batch of several has at most `elements`."""
    batches = []
    for (m, n), same in groupby(matrices, key=_shape):
        left, most = len(list(same)), max(1, elements // (m * n))
        batches += [(min(most, left - done), m, n) for done in range(0, left, most)]
    return batches


def _shape(matrix: Matrix) -> tuple[int, int]:
    return matrix.rows, matrix.columns


def _processes(parameter: Tensor) -> tuple[dist.ProcessGroup | None, int, int]:
    """(group, rank, size) of the processes that share the parameter."""
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
        """The rows of the rank's shard that belong to the matrix."""
        start, stop, row = self._overlap(matrix, rank)
        return RowRange(matrix.parameter, row, row + stop - start, matrix.columns)

    def place(self, number: int, matrix: Matrix, rank: int) -> RowRange:
        """The rows of the matrix that the rank holds, as rows of tensor `number`."""
        start, stop, _ = self._overlap(matrix, rank)
        return RowRange(number, start, stop, matrix.columns)

    def _overlap(self, matrix: Matrix, rank: int) -> tuple[int, int, int]:
        """(first row, end) of the overlap in the matrix, and the first row's position in the rank's shard."""
        begin = min(self.size, rank * self.chunk)
        height = (min(self.size, begin + self.chunk) - begin) * self.rows
        block = matrix.first // (self.size * self.rows)  # a matrix lies in one block
        top = (block * self.size + begin) * self.rows
        start, stop = max(matrix.first, top), min(matrix.first + matrix.rows, top + height)
        if stop <= start:
            return 0, 0, 0
        return start - matrix.first, stop - matrix.first, block * height + start - top
