"""Shared parts of the losses over a linear head, whose [N, V] logits exist only one chunk of rows at a time.

    logits = x w^T            dx = dlogits w            dw = dlogits^T x                x [N, D], w [V, D]

cuBLAS or oneDNN compute the products. A chunk's logits are scratch memory: a row function reads them and overwrites
them with the loss's gradient, from which dx and dw (summed in float32) follow (Liger, arXiv 2410.10989). Rows that do
not count are dropped before the product (CCE, arXiv 2411.09009).

Each row function has two implementations with one signature: a Triton kernel with one program per row, and PyTorch
code that uses as little memory where there is no Triton. Results that must not be used are NaN: a loss over targets
outside the vocabulary, or over more rows than the caller's bound.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimind.kernels.triton_support import (
    FLOATS,
    check,
    check_tensors,
    config_for,
    jit,
    next_power_of_2,
    on_host,
    own_precision,
    tl,
)

# Bytes of one chunk's logits. On a CPU 512 rows of 6400 float32 numbers: 13 MB, which fit into its cache.
LOGITS_BYTES = {"cpu": 512 * 6400 * 4, "cuda": 64 * 2**20}
# If more than this share of the rows counts, all rows are computed. On a GPU, gathering rows and scattering their
# gradient takes as long as the products of about 6% of all rows at 6400 x 768 (bandwidth against bf16 peak); on a CPU
# it is 1%.
ALL_ROWS_ABOVE = {"cpu": 1.0, "cuda": 0.95}
ROWS_MULTIPLE = 64  # rows per chunk are a multiple of this: whole tiles of the product, aligned rows
IGNORED = -100  # targets of this value do not count


@dataclass(frozen=True)
class RowConfig:
    whole: int  # a vocabulary up to this size is one tile, which is read once
    part: int  # logits per tile of a larger vocabulary
    per_warp: int  # logits per warp


CONFIGS = {80: RowConfig(whole=8192, part=4096, per_warp=512)}


@jit
def load_logits(p_row, o_v, V: tl.constexpr):
    """One row's logits at o_v in float32. Beyond V: a finite number whose exp is 0."""
    b_z = tl.load(p_row + o_v, mask=o_v < V, other=0.0).to(tl.float32)  # [BLOCK_V], or one number
    return tl.where(o_v < V, b_z, -1e30)


@jit
def row_sums(p_row, b_inverse_t, V: tl.constexpr, BLOCK_V: tl.constexpr, MEAN: tl.constexpr):
    """(last tile, max z, s = sum exp d, sum d exp d) with d = (z - max z) / T, in one pass. If one tile holds the row,
    the last tile is the whole row and stays in registers."""
    o_tile = tl.arange(0, BLOCK_V)
    b_z = tl.zeros([BLOCK_V], tl.float32)
    b_max = tl.cast(-1e30, tl.float32)
    b_sum = tl.cast(0.0, tl.float32)
    b_mean = tl.cast(0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        b_z = load_logits(p_row, start + o_tile, V)  # [BLOCK_V]
        b_new = tl.maximum(b_max, tl.max(b_z, axis=0))
        b_shift = (b_max - b_new) * b_inverse_t
        b_d = (b_z - b_new) * b_inverse_t
        b_e = tl.exp(b_d)
        if MEAN:
            b_mean = tl.exp(b_shift) * (b_mean + b_shift * b_sum) + tl.sum(b_d * b_e, axis=0)
        b_sum = tl.exp(b_shift) * b_sum + tl.sum(b_e, axis=0)
        b_max = b_new
    return b_z, b_max, b_sum, b_mean


@jit
def store_zeros(p_row, V: tl.constexpr, BLOCK_V: tl.constexpr):
    o_tile = tl.arange(0, BLOCK_V)
    b_zero = tl.zeros([BLOCK_V], tl.float32).to(p_row.dtype.element_ty)
    for start in range(0, V, BLOCK_V):
        tl.store(p_row + start + o_tile, b_zero, mask=start + o_tile < V)


@jit
def expm1(b_x):
    """exp(x) - 1 for x <= 0, without cancellation near 0."""
    b_near = tl.maximum(b_x, -0.1)
    b_series = b_near * (1.0 + b_near * (1 / 2 + b_near * (1 / 6 + b_near * (1 / 24 + b_near * (1 / 120)))))
    return tl.where(b_x > -0.1, b_series, tl.exp(b_x) - 1.0)


def row_tile(logits: Tensor) -> tuple[int, int]:
    """(BLOCK_V, num_warps) of a row kernel."""
    config = config_for(CONFIGS, logits.device)
    block_v = next_power_of_2(logits.shape[1])
    block_v = block_v if block_v <= config.whole else config.part
    return block_v, min(16, max(4, block_v // config.per_warp))


@dataclass(frozen=True)
class Rows:
    """The rows to compute, out of `total`: `count` rows listed in `index` int64, or all. nan_guard: None or a float32
    scalar on the device that is NaN if the caller's bound was too small, else 0."""

    total: int
    count: int
    index: Tensor | None = None
    nan_guard: Tensor | None = None

    def take(self, per_row: Tensor) -> Tensor:
        """Values of the selected rows: [..., total] -> [..., count]."""
        return per_row if self.index is None else per_row.index_select(-1, self.index)

    def chunk(self, x: Tensor, part: slice) -> Tensor:
        """The selected rows of x [total, D] in `part`."""
        return x[part] if self.index is None else x.index_select(0, self.index[part])

    def put(self, values: Tensor) -> Tensor:
        """The inverse of `take`, with 0 in the other rows: [..., count] -> [..., total]."""
        if self.index is None:
            return values
        return values.new_zeros(*values.shape[:-1], self.total).index_copy_(-1, self.index, values)

    def guarded(self, values: Tensor) -> Tensor:
        """`values`, or NaN if the bound was too small."""
        return values if self.nan_guard is None else values + self.nan_guard


def select_rows(keep: Tensor, num_targets: int | None) -> Rows:
    """Select the rows where `keep`, bool [N], in order. num_targets: an upper bound of their number; None: on a CPU
    they are counted, elsewhere all rows are computed, since counting would wait for the device. All rows are also
    computed if nearly all are kept."""
    total = keep.numel()
    if on_host(keep):
        kept = int(keep.sum())
        check(
            num_targets is None or num_targets >= kept,
            "num_targets is {}, but {} rows count; give at least that many, or None",
            num_targets,
            kept,
        )
        if num_targets is None and keep.device.type == "cpu":
            num_targets = kept
    if num_targets is None or num_targets >= total:
        return Rows(total, total)
    if num_targets > total * ALL_ROWS_ABOVE.get(keep.device.type, ALL_ROWS_ABOVE["cuda"]):
        return Rows(total, total, nan_guard=_nan_guard(keep.sum(), num_targets))
    rank = keep.cumsum(0)
    place = torch.where(keep, rank - 1, rank[-1] + (~keep).cumsum(0) - 1)  # a stable partition
    index = torch.empty(total, dtype=torch.int64, device=keep.device)
    index.scatter_(0, place, torch.arange(total, device=keep.device))
    return Rows(total, num_targets, index[:num_targets], _nan_guard(rank[-1], num_targets))


def _nan_guard(kept: Tensor, num_targets: int) -> Tensor:
    nan_guard = torch.zeros((), dtype=torch.float32, device=kept.device)
    return nan_guard.masked_fill_(kept > num_targets, float("nan"))


def target_rows(targets: Tensor, loss_weights: Tensor | None, vocab: int) -> tuple[Tensor, Tensor]:
    """(targets clamped into the vocabulary, float32 scale of each row): 0 if ignored, NaN if outside the vocabulary."""
    keep = targets != IGNORED
    inside = targets.clamp(0, vocab - 1)
    bad = keep & (inside != targets)
    if on_host(targets):
        check(not bool(bad.any()), "targets has values outside 0..{} other than {}", vocab - 1, IGNORED)
    scale = keep.float() if loss_weights is None else loss_weights.masked_fill(~keep, 0)
    return inside, scale.masked_fill(bad, float("nan"))


def chunk_rows(device: torch.device, row_bytes: int) -> int:
    """Rows per chunk, for logits of row_bytes a row."""
    rows = LOGITS_BYTES.get(device.type, LOGITS_BYTES["cuda"]) // row_bytes
    return max(ROWS_MULTIPLE, rows // ROWS_MULTIPLE * ROWS_MULTIPLE)


def logit_bytes(x: Tensor, kernels: bool) -> int:
    """Bytes per logit: the kernels work in x.dtype, the PyTorch code in float32."""
    return x.element_size() if kernels else 4


def run_chunks(
    x: Tensor,
    weight: Tensor,
    rows: Rows,
    chunk: int,
    row_function: Callable[[slice, Tensor], Tensor],
    need_dx: bool = False,
    need_dw: bool = False,
) -> tuple[Tensor, Tensor]:
    """Call row_function(part, logits) for one chunk after another: `part` is a slice of the selected rows, and logits
    [R, V] in x.dtype may be overwritten. It returns dlogits [R, V] in x.dtype, which is used only if a gradient is
    needed. -> (dx [N, D] in x.dtype, dw [V, D] float32), each of size 0 if not needed."""
    w = weight.to(x.dtype)
    new = torch.empty if rows.index is None else torch.zeros
    dx = new(x.shape if need_dx else (0,), dtype=x.dtype, device=x.device)
    dw = torch.zeros(w.shape if need_dw else (0,), dtype=torch.float32, device=x.device)
    buffer = torch.empty(min(chunk, rows.count), w.shape[0], dtype=x.dtype, device=x.device)
    with own_precision(x.device):
        for start in range(0, rows.count, chunk):
            part = slice(start, min(start + chunk, rows.count))
            x_part = rows.chunk(x, part)
            dlogits = row_function(part, torch.matmul(x_part, w.t(), out=buffer[: part.stop - start]))
            if need_dx and rows.index is None:
                torch.mm(dlogits, w, out=dx[part])
            elif need_dx and rows.index is not None:
                dx.index_copy_(0, rows.index[part], torch.mm(dlogits, w))
            if need_dw and dlogits.dtype == dw.dtype:
                dw.addmm_(dlogits.t(), x_part)
            elif need_dw:
                dw += _product(dlogits.t(), x_part)
    return dx, dw


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of 16-bit matrices, to be added to a float32 sum. cuBLAS can return float32 without rounding; PyTorch cannot
    on a CPU."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else torch.mm(a, b)


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale, a float32 scalar, rounded once to dtype. PyTorch rounds a 0-D scale to bfloat16 before
    multiplying a bfloat16 gradient, which would bias every number by the same factor; so we pass it as [1]."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, scale.reshape(1), out=out)


def register_made_gradient(op: Any, arguments: int) -> None:
    """Register fake and autograd for an op that returns (loss, dx, dw) from `run_chunks`. Of its `arguments` arguments
    x and weight are first, need_dx and need_dw last. dw stays float32 until it is scaled, as a sum over tokens may
    overflow float16."""

    def fake(x, weight, *others):
        need_dx, need_dw = others[-2:]
        dx = x.new_empty(x.shape if need_dx else (0,))
        dw = weight.new_empty(weight.shape if need_dw else (0,), dtype=torch.float32)
        return x.new_empty((), dtype=torch.float32), dx, dw

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.dtypes, ctx.needed = (inputs[0].dtype, inputs[1].dtype), inputs[-2:]

    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * arguments
        pairs = zip(ctx.needed, ctx.saved_tensors, ctx.dtypes, strict=True)
        made = [scaled(grad, dloss, dtype) if needed else None for needed, grad, dtype in pairs]
        return *made, *(None,) * (arguments - 2)

    op.register_fake(fake)
    op.register_autograd(backward, setup_context=save)


def check_head(
    kernels: bool, x: Tensor, weight: Tensor, num_targets: int | None, names: tuple[str, str] = ("x", "weight")
) -> None:
    """ValueError unless x is [N, D] and weight [V, D], both floating-point and on one device that runs the kernels, if
    asked for."""
    pair = dict(zip(names, (x, weight), strict=True))
    if kernels:
        check_tensors(**pair)
    for name, tensor in pair.items():
        message = "{} is {}; these losses take float32, bfloat16 and float16"
        check(tensor.dtype in FLOATS, message, name, tensor.dtype)
        check(tensor.ndim == 2, "{} is {}; it must have two dimensions", name, list(tensor.shape))
    message = "{} is on {} and {} on {}; move them to one device"
    check(weight.device == x.device, message, names[1], weight.device, names[0], x.device)
    check(
        weight.shape[1] == x.shape[1] and weight.shape[0] > 0, "{} is {}; for {} {} it must be [vocabulary, {}]",
        names[1], list(weight.shape), names[0], list(x.shape), x.shape[1],
    )  # fmt: skip
    message = "num_targets is {}; give a number of rows, 0 or more, or None"
    check(num_targets is None or num_targets >= 0, message, num_targets)


def check_per_row(x: Tensor, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """ValueError unless each tensor has one number of `dtype` for each row of x."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check(
                (tensor.shape, tensor.dtype, tensor.device) == (x.shape[:1], dtype, x.device),
                "{} is {} {} on {}; it must be {} [{}] on {}",
                name, tensor.dtype, list(tensor.shape), tensor.device, dtype, x.shape[0], x.device,
            )  # fmt: skip
