"""Causal attention of packed documents on a CPU, as one operator that torch.compile does not look into.

Documents of like length are stacked, and each stack is one call of PyTorch's flash attention (Dao et al. 2022, arXiv
2205.14135), so that no score between two documents is computed. Which stacks there are is read from the boundaries
inside the operator: what goes in and comes out has the same shape for every batch, so that a model is compiled once.

    q [N, H, D], k, v [N, G, D] -> out [N, H, D], lse [N, H] float32, the log-sum-exp of each query's scores
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A stack holds documents no shorter than this share of its longest: 0.75 wastes at most 44% of a stack's scores
# and gives about ten stacks for lengths of 16 to 512.
_STACK_RATIO = 0.75
_SHORTEST_STACK = 16


@dataclass(frozen=True)
class Stack:
    """index int64 [documents * length]: the tokens, document by document; padding repeats token 0. real: int64, the
    places of `index` that are no padding, or None where all are."""

    documents: int
    length: int
    index: Tensor
    real: Tensor | None

    def take(self, x: Tensor, heads: int) -> Tensor:
        """x [N, H, D] -> [documents, heads, length, D] in at least float32: below it, flash attention and its backward
        take up to four times as long on a CPU. Each of x's heads is repeated heads / H times."""
        rows = x.index_select(0, self.index).to(torch.promote_types(x.dtype, torch.float32))
        rows = rows.repeat_interleave(heads // x.shape[1], dim=1)
        return rows.unflatten(0, (self.documents, self.length)).transpose(1, 2)

    def put(self, rows: Tensor, into: Tensor) -> None:
        """rows [documents, H, length, ...] to their places in `into` [N, H, ...]."""
        flat = rows.transpose(1, 2).flatten(0, 1).to(into.dtype)
        if self.real is None:
            into.index_copy_(0, self.index, flat)
        else:
            into.index_copy_(0, self.index[self.real], flat[self.real])


@functools.lru_cache(maxsize=8)  # every layer of a step asks for the same
def _stacks(boundaries: bytes) -> tuple[Stack, ...]:
    return make_stacks(np.frombuffer(boundaries, np.int64))


def make_stacks(cu_seqlens: np.ndarray) -> tuple[Stack, ...]:
    """cu_seqlens: int [n + 1], not descending, from 0 to the number of tokens."""
    starts, lengths = cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens).astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    stacks, first = [], 0
    while first < len(order):
        longest = int(lengths[order[first]])
        shortest = 1 if longest <= _SHORTEST_STACK else int(longest * _STACK_RATIO)
        last = int(np.searchsorted(-lengths[order], -shortest, side="right"))
        docs = order[first:last]
        column = np.arange(longest)
        real = column < lengths[docs, None]
        index = np.where(real, starts[docs, None] + column, 0).ravel()
        places = None if real.all() else torch.from_numpy(np.flatnonzero(real))
        stacks.append(Stack(len(docs), longest, torch.from_numpy(index), places))
        first = last
    return tuple(stacks)


@torch.library.custom_op("minimind::document_attention", mutates_args=(), device_types="cpu")
def _document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    heads = q.shape[1]
    for stack in _stacks(cu_seqlens.numpy().astype(np.int64).tobytes()):
        rows = (stack.take(t, heads) for t in (q, k, v))
        rows_out, rows_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, True)
        stack.put(rows_out, out)
        stack.put(rows_lse, lse)
    return out, lse


@torch.library.custom_op("minimind::document_attention_backward", mutates_args=(), device_types="cpu")
def _document_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    heads, groups = q.shape[1], k.shape[1]
    for stack in _stacks(cu_seqlens.numpy().astype(np.int64).tobytes()):
        rows = [stack.take(t, heads) for t in (dout, q, k, v, out)]
        rows_lse = stack.take(lse.unsqueeze(2), heads).squeeze(3)
        if stack.real is not None:  # padding has the probability exp(score - inf) = 0
            padding = torch.ones(stack.index.shape, dtype=torch.bool).index_fill_(0, stack.real, False)
            rows_lse = rows_lse.masked_fill(padding.view(stack.documents, 1, stack.length), float("inf"))
        drows = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *rows, rows_lse, 0.0, True
        )
        stack.put(drows[0], dq)
        for drow, target in zip(drows[1:], (dk, dv), strict=True):
            stack.put(drow.unflatten(1, (groups, heads // groups)).sum(2), target)
    return dq, dk, dv


@_document_attention.register_fake
def _(q, k, v, cu_seqlens):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@_document_attention_backward.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, dout, _dlse):
    if dout is None:
        return (None,) * 4
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    return *_document_attention_backward(dout, q, k, v, out, lse, cu_seqlens), None


_document_attention.register_autograd(_backward, setup_context=_save)


def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention within each document, scores scaled by D ** -0.5.

    q [N, H, D], k, v [N, G, D] with H a multiple of G, float32, bfloat16 or float64 on a CPU; cu_seqlens int [n + 1]
    on the CPU: boundaries of the documents, from 0 to N, not descending (an empty document is none).
    Returns [N, H, D] contiguous in q.dtype.
    """
    return _document_attention(q, k, v, cu_seqlens)[0]
