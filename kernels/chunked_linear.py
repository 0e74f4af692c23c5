"""What the losses of a linear head share: [N, V] logits that exist only a chunk of rows at a time.

    logits = x w^T            dx = dlogits w            dw = dlogits^T x                x [N, D], w [V, D]

The products are left to cuBLAS or oneDNN. A chunk's logits are scratch memory: a row function reads them and turns
them in place into the loss's gradient, from which dx and dw (summed in float32) follow (Liger, arXiv 2410.10989).
Rows that do not count are left out before the product (CCE, arXiv 2411.09009).

Every row function has two forms behind one signature, a Triton kernel of one program a row and PyTorch code, so the
losses run, in the same memory, where there is no Triton. A number that must not be used is NaN: a loss over targets
outside the vocabulary, or over more rows than the caller said there were.
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

# Bytes of one chunk's logits. On a CPU 512 rows of 6400 float32 numbers: 13 MB, which its cache holds.
LOGITS_BYTES = {"cpu": 512 * 6400 * 4, "cuda": 64 * 2**20}
# Of the rows. Above it all are computed: gathering them and scattering their gradient takes a GPU longer than the
# products of a few more rows, at 6400 x 768 about 6% of all of them (bandwidth against bf16 peak); a CPU 1%.
ALL_ROWS_ABOVE = {"cpu": 1.0, "cuda": 0.95}
ROWS_MULTIPLE = 64  # of a chunk, which is never smaller: whole tiles of the product, aligned rows


@dataclass(frozen=True)
class Config:
    whole: int  # a vocabulary that is no larger is one tile, and read once
    part: int  # logits in each tile of a larger one
    per_warp: int  # of them that one warp holds


CONFIGS = {80: Config(whole=8192, part=4096, per_warp=512)}


@jit
def load_logits(p_row, o_v, softcap, V: tl.constexpr, CAPPED: tl.constexpr):
    """One row's logits at o_v in float32, capped. Beyond V a number whose exp is 0 and whose product with 0 is 0."""
    b_z = tl.load(p_row + o_v, mask=o_v < V, other=0.0).to(tl.float32)  # [BLOCK_V], or one number
    if CAPPED:
        b_z = softcap * tanh(b_z / softcap)
    return tl.where(o_v < V, b_z, -1e30)


@jit
def row_sums(
    p_row, b_inverse_t, softcap, V: tl.constexpr, BLOCK_V: tl.constexpr, CAPPED: tl.constexpr, MEAN: tl.constexpr
):
    """(last tile, max z, s = sum exp d, sum d exp d) with d = (z - max z) / T, in one pass. Where one tile holds the
    row, the last tile is the row, and stays in registers."""
    o_tile = tl.arange(0, BLOCK_V)
    b_z = tl.zeros([BLOCK_V], tl.float32)
    b_max = tl.cast(-1e30, tl.float32)
    b_sum = tl.cast(0.0, tl.float32)
    b_mean = tl.cast(0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        b_z = load_logits(p_row, start + o_tile, softcap, V, CAPPED)  # [BLOCK_V]
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
def cap_slope(b_z, softcap):
    """d z / d raw of z = softcap * tanh(raw / softcap)."""
    b_tanh = tl.maximum(b_z, -softcap) / softcap  # numbers beyond V are far below -softcap
    return 1.0 - b_tanh * b_tanh


@jit
def tanh(b_x):
    """To float32: the hardware's own has 11 bits, and 1 - exp(-2x) loses what a small x has."""
    b_abs = tl.abs(b_x)
    b_e = tl.exp(-2.0 * b_abs)
    b_large = (1.0 - b_e) / (1.0 + b_e)
    b_sq = tl.minimum(b_abs, 0.25) * tl.minimum(b_abs, 0.25)
    b_series = 1.0 + b_sq * (-1 / 3 + b_sq * (2 / 15 + b_sq * (-17 / 315 + b_sq * (62 / 2835))))
    return tl.where(b_abs < 0.25, b_x * b_series, tl.where(b_x < 0, -b_large, b_large))


@jit
def expm1(b_x):
    """exp(x) - 1 for x <= 0, without the cancellation near 0."""
    b_near = tl.maximum(b_x, -0.1)
    b_series = b_near * (1.0 + b_near * (1 / 2 + b_near * (1 / 6 + b_near * (1 / 24 + b_near * (1 / 120)))))
    return tl.where(b_x > -0.1, b_series, tl.exp(b_x) - 1.0)


def row_tile(logits: Tensor) -> tuple[int, int]:
    """(BLOCK_V, num_warps) of a row kernel"""
    config = config_for(CONFIGS, logits.device)
    block_v = next_power_of_2(logits.shape[1])
    block_v = block_v if block_v <= config.whole else config.part
    return block_v, min(16, max(4, block_v // config.per_warp))


@dataclass(frozen=True)
class Rows:
    """Which rows are computed: the first `count` of `index` int64, or all of them. `nan_guard` is None or a float32
    scalar on the device: NaN if the caller's bound was too small, else 0."""

    total: int
    count: int
    index: Tensor | None = None
    nan_guard: Tensor | None = None

    def take(self, per_row: Tensor) -> Tensor:
        """per_row [..., total] -> [..., count]"""
        return per_row if self.index is None else per_row.index_select(-1, self.index)

    def chunk(self, x: Tensor, part: slice) -> Tensor:
        return x[part] if self.index is None else x.index_select(0, self.index[part])

    def put(self, values: Tensor) -> Tensor:
        """values [..., count] -> [..., total], 0 in the rows left out."""
        if self.index is None:
            return values
        return values.new_zeros(*values.shape[:-1], self.total).index_copy_(-1, self.index, values)

    def guarded(self, values: Tensor) -> Tensor:
        return values if self.nan_guard is None else values + self.nan_guard


def select_rows(keep: Tensor, num_targets: int | None) -> Rows:
    """The rows where `keep`, bool [N], in their order. num_targets: at most so many are kept; None: a CPU counts
    them, and elsewhere, where counting would wait for the device, all rows are computed, as they are where nearly all
    are kept."""
    total = keep.numel()
    if on_host(keep):
        kept = int(keep.sum())
        check(
            num_targets is None or num_targets >= kept,
            "num_targets is {}, but {} rows count; give at least that, or None",
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


def target_rows(targets: Tensor, loss_weights: Tensor | None, ignore_index: int, vocab: int) -> tuple[Tensor, Tensor]:
    """(targets within the vocabulary, float32 scale of each row): 0 where ignored, NaN where without meaning."""
    keep = targets != ignore_index
    inside = targets.clamp(0, vocab - 1)
    bad = keep & (inside != targets)
    if on_host(targets):
        check(
            not bool(bad.any()),
            "targets holds numbers outside 0..{} other than ignore_index ({})",
            vocab - 1,
            ignore_index,
        )
    scale = keep.float() if loss_weights is None else loss_weights.masked_fill(~keep, 0)
    return inside, scale.masked_fill(bad, float("nan"))


def chunk_rows(device: torch.device, row_bytes: int) -> int:
    rows = LOGITS_BYTES.get(device.type, LOGITS_BYTES["cuda"]) // row_bytes
    return max(ROWS_MULTIPLE, rows // ROWS_MULTIPLE * ROWS_MULTIPLE)


def logit_bytes(x: Tensor, kernels: bool) -> int:
    """The kernels work in x.dtype; the PyTorch forms make float32 of it."""
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
    """Call row_function(part, logits) for one chunk after another, `part` a slice of the rows that are computed and
    logits [R, V] in x.dtype, its own to overwrite. It returns dlogits [R, V] in x.dtype, which nothing looks at
    unless a gradient is needed. -> (dx [N, D] in x.dtype, dw [V, D] float32), of size 0 where not needed."""
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
    """a b of 16-bit matrices, to be added to a float32 sum: not rounded on the way, where there is a product for that
    (cuBLAS; PyTorch has none on a CPU)."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else torch.mm(a, b)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """float32 logits after the soft cap, if there is one; the given ones may be overwritten."""
    z = logits.float()
    return z.div_(softcap).tanh_().mul_(softcap) if softcap else z


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale, a float32 scalar, rounded once to dtype. As a scalar it would be rounded before the product
    with a bfloat16 gradient, and every number be off by the same part."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, scale.reshape(1), out=out)


def register_made_gradient(op: Any, arguments: int) -> None:
    """Fake and autograd of an op of so many arguments, x and weight first and need_dx and need_dw last, that returns
    (loss, dx, dw) as `run_chunks` makes them. dw stays float32 until it is scaled: a sum over tokens may be beyond
    float16."""

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


def normalised(total: Tensor, weight_sum: Tensor | None) -> Tensor:
    """total / weight_sum; nothing over nothing is 0."""
    if weight_sum is None:
        return total
    empty = (weight_sum == 0) & (total.detach() == 0)
    return total / weight_sum.detach().masked_fill(empty, 1.0)


def split_weight_sum(weight_sum: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """weight_sum = mantissa in [1, 2) times a power of two. The mantissa divides inside the loss, before its gradient
    is rounded, and the power after: that is exact, and float16 gradients keep their range. 0 is 1 times 0."""
    if weight_sum is None:
        return None, None
    weight_sum = weight_sum.detach()
    mantissa = (2 * torch.frexp(weight_sum).mantissa).masked_fill(weight_sum == 0, 1.0)
    return mantissa, weight_sum / mantissa


def check_head(
    kernels: bool, x: Tensor, weight: Tensor, num_targets: int | None, names: tuple[str, str] = ("x", "weight")
) -> None:
    """x [N, D] and weight [V, D], floating-point tensors of one device, which runs the chosen form."""
    pair = dict(zip(names, (x, weight), strict=True))
    if kernels:
        check_tensors(**pair)
    for name, tensor in pair.items():
        message = "{} is {}; these losses take float32, bfloat16 and float16"
        check(tensor.dtype in FLOATS, message, name, tensor.dtype)
        check(tensor.ndim == 2, "{} is {}, and should have two dimensions", name, list(tensor.shape))
    message = "{} is on {} and {} on {}; move them to one device"
    check(weight.device == x.device, message, names[1], weight.device, names[0], x.device)
    check(
        weight.shape[1] == x.shape[1] and weight.shape[0] > 0, "{} is {}, and {} {} needs [vocabulary, {}]",
        names[1], list(weight.shape), names[0], list(x.shape), x.shape[1],
    )  # fmt: skip
    message = "num_targets is {}; give a number of rows, or None"
    check(num_targets is None or num_targets >= 0, message, num_targets)


def check_per_row(x: Tensor, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            check(
                (tensor.shape, tensor.dtype, tensor.device) == (x.shape[:1], dtype, x.device),
                "{} is {} {} on {}, and should be {} [{}] on {}",
                name, tensor.dtype, list(tensor.shape), tensor.device, dtype, x.shape[0], x.device,
            )  # fmt: skip


def check_weight_sum(x: Tensor, weight_sum: Tensor | None) -> None:
    if weight_sum is not None:
        check(
            (weight_sum.ndim, weight_sum.dtype, weight_sum.device) == (0, torch.float32, x.device),
            "weight_sum is {} {} on {}, and should be a float32 scalar tensor on {}",
            weight_sum.dtype,
            list(weight_sum.shape),
            weight_sum.device,
            x.device,
        )
