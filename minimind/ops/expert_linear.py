"""Linear layers of experts over rows sorted by expert, on a CPU, as one operator opaque to torch.compile.

    y[r] = x[r] W_e^T     dx[r] = dy[r] W_e     dW_e = sum over the expert's rows of dy^T x

On a CPU the boundaries can be read, and one product per expert keeps all cores busy. `F.grouped_mm` does the same in
eager mode, but cannot be compiled in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from minimind.kernels.triton_support import own_precision

_MULTIPLE = 64  # the number of rows in a product is a multiple of this


@dataclass(frozen=True)
class _Part:
    """An expert's rows, and a window around them whose size is a multiple of 64 (or all rows, if there are fewer).

    The number of rows of an expert changes with every layer and step, and oneDNN compiles code for each new number: 192
    times in a step of minimind2-moe. Multiples of 64 limit that to a few.
    """

    expert: int
    rows: slice
    window: slice

    @property
    def inner(self) -> slice:
        """The expert's rows relative to the window."""
        return slice(self.rows.start - self.window.start, self.rows.stop - self.window.start)


def _parts(offsets: Tensor) -> Iterator[_Part]:
    """The experts that have rows, in order."""
    bounds = offsets.tolist()
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            size = min(-(-(stop - start) // _MULTIPLE) * _MULTIPLE, bounds[-1])
            first = min(start, bounds[-1] - size)
            yield _Part(expert, slice(start, stop), slice(first, first + size))


@torch.library.custom_op("minimind::expert_linear", mutates_args=(), device_types="cpu")
def _expert_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], weight.shape[1], dtype=x.dtype)
    with own_precision(x.device):
        for part in _parts(offsets):
            matrix = weight[part.expert].t()
            if part.window.start == part.rows.start:  # later experts overwrite the further rows
                torch.mm(x[part.window], matrix, out=out[part.window])
            else:
                out[part.rows] = torch.mm(x[part.window], matrix)[part.inner]
    return out


@torch.library.custom_op("minimind::expert_linear_dweight", mutates_args=(), device_types="cpu")
def _expert_linear_dweight(dout: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    dweight = torch.zeros(offsets.numel() - 1, dout.shape[1], x.shape[1], dtype=x.dtype)
    for part in _parts(offsets):
        a, b = dout[part.window], x[part.window]
        if part.window != part.rows:  # zeros in the narrower factor mask the other experts' rows
            if a.shape[1] < b.shape[1]:
                a = torch.zeros_like(a)
                a[part.inner] = dout[part.rows]
            else:
                b = torch.zeros_like(b)
                b[part.inner] = x[part.rows]
        torch.mm(a.t(), b, out=dweight[part.expert])
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
    need_dx, need_dweight = ctx.needs_input_grad[:2]  # frozen experts do not keep x
    ctx.save_for_backward(x if need_dweight else None, weight if need_dx else None, offsets)


def _backward(ctx, dout):
    if dout is None:
        return None, None, None
    x, weight, offsets = ctx.saved_tensors
    dx = None if weight is None else _expert_linear(dout, weight.transpose(1, 2), offsets)
    return dx, None if x is None else _expert_linear_dweight(dout, x, offsets), None


_expert_linear.register_autograd(_backward, setup_context=_save)


def expert_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix, on a CPU.

    x [R, K], sorted by expert; weight [E, N, K] in x.dtype; offsets int [E + 1], from 0 to R: expert e has the rows
    offsets[e] : offsets[e + 1] -> [R, N] in x.dtype."""
    return _expert_linear(x, weight, offsets)
