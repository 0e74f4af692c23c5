"""One matrix per expert over rows sorted by expert, on a CPU, as one operator that torch.compile does not look into.

    y[r] = x[r] W_e^T     dx[r] = dy[r] W_e     dW_e = sum over the expert's rows of dy^T x

On a CPU the boundaries are at hand, and one product for each expert fills the cores: `F.grouped_mm` does the same in
eager mode but cannot be compiled in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def _parts(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has some."""
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            yield expert, slice(start, end)


@torch.library.custom_op("minimind::expert_linear", mutates_args=(), device_types="cpu")
def _expert_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], weight.shape[1], dtype=x.dtype)
    for expert, rows in _parts(offsets):
        torch.mm(x[rows], weight[expert].t(), out=out[rows])
    return out


@torch.library.custom_op("minimind::expert_linear_dweight", mutates_args=(), device_types="cpu")
def _expert_linear_dweight(dout: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    dweight = torch.zeros(offsets.numel() - 1, dout.shape[1], x.shape[1], dtype=x.dtype)
    for expert, rows in _parts(offsets):
        torch.mm(dout[rows].t(), x[rows], out=dweight[expert])
    return dweight


@_expert_linear.register_fake
def _(x, weight, offsets):
    return x.new_empty(x.shape[0], weight.shape[1])


@_expert_linear_dweight.register_fake
def _(dout, x, offsets):
    return x.new_empty(offsets.numel() - 1, dout.shape[1], x.shape[1])


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, offsets = inputs
    need_dx, need_dweight = ctx.needs_input_grad[:2]  # frozen experts keep no x
    ctx.save_for_backward(x if need_dweight else None, weight if need_dx else None, offsets)


def _backward(ctx, dout):
    if dout is None:
        return None, None, None
    x, weight, offsets = ctx.saved_tensors
    dx = None if weight is None else _expert_linear(dout, weight.transpose(1, 2), offsets)
    return dx, None if x is None else _expert_linear_dweight(dout, x, offsets), None


_expert_linear.register_autograd(_backward, setup_context=_save)


def expert_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [R, K], sorted by expert; weight [E, N, K] in x.dtype; offsets int [E + 1]: expert e has the rows
    offsets[e] : offsets[e + 1], from 0 to R. All on a CPU -> [R, N] in x.dtype."""
    return _expert_linear(x, weight, offsets)
