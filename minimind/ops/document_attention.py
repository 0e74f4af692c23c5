"""Causal attention over packed documents on a CPU, as one operator opaque to torch.compile.

    s = scale q k^T + mask      p = softmax(s)      o = p v
    dv = p^T do      dp = do v^T      ds = p (dp - sum(dp p))      dq = scale ds k      dk = scale ds^T q

The native operator (csrc/cpu/document_attention.h) runs if it is built, one document and key head at a time. Otherwise
documents of similar length are stacked and their products batched, so no scores between documents are computed. For the
lengths of real text that is faster on a CPU than PyTorch's flash attention, whose products of one head each are small
(docs/LOG.md). Scores and their gradient are float32 and exist one cache-sized tile at a time; the backward computes p
again. Boundaries are read inside the operator, so its inputs and outputs have one shape for all batches, and a model is
compiled once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minimind.ops import native

# All documents of a stack have at least this share of its longest one's length. 0.75 wastes at most 44% of a stack's
# scores and gives about ten stacks for lengths of 16 to 512.
_STACK_RATIO = 0.75
_SHORTEST_STACK = 16
_QUERY_ROWS = 64  # approximate rows per tile; longer documents skip most scores that a causal mask would discard
_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_TILE_SCORES = 1 << 20  # scores per tile, in float32: 4 MB


@dataclass(frozen=True)
class Stack:
    """Documents of similar length, padded to one length.

    index: int64 [documents * length], the tokens of each document; padding repeats token 0. real: int64, the positions
    in `index` that are not padding, or None if none are; tokens: the tokens at these positions.
    """

    documents: int
    length: int
    index: Tensor
    real: Tensor | None
    tokens: Tensor

    def take(self, x: Tensor, kv_heads: int, zero_padding: bool = False) -> Tensor:
        """x [N, H, D] -> [documents * kv_heads, H / kv_heads, length, D], at least float32."""
        if self.real is None or not zero_padding:
            rows = x.index_select(0, self.index)
        else:
            rows = x.new_zeros(len(self.index), *x.shape[1:])
            rows.index_copy_(0, self.real, x.index_select(0, self.tokens))
        rows = rows.view(self.documents, self.length, kv_heads, -1, x.shape[2]).permute(0, 2, 3, 1, 4)
        wide = torch.empty(rows.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        return wide.copy_(rows).flatten(0, 1)

    def put(self, rows: Tensor, into: Tensor) -> None:
        """The inverse of `take`: write rows [documents * kv_heads, R, length, D] into `into` [N, H, D]."""
        rows = rows.unflatten(0, (self.documents, -1)).permute(0, 3, 1, 2, 4)
        flat = torch.empty(rows.shape, dtype=into.dtype).copy_(rows).view(-1, *into.shape[1:])
        into.index_copy_(0, self.tokens, flat if self.real is None else flat.index_select(0, self.real))

    def tiles(self, kv_heads: int, heads: int) -> Iterator[tuple[slice, slice]]:
        """Yield (slice of documents * kv_heads, slice of query rows) whose scores fit into the cache together."""
        query_rows = -(-self.length // max(1, round(self.length / _QUERY_ROWS)))
        for start in range(0, self.length, query_rows):
            stop = min(start + query_rows, self.length)
            at_once = max(1, _TILE_SCORES // ((stop - start) * stop * (heads // kv_heads)))
            for first in range(0, self.documents * kv_heads, at_once):
                yield slice(first, first + at_once), slice(start, stop)


@functools.lru_cache(maxsize=8)  # all layers of a step share them
def _stacks(boundaries: bytes) -> tuple[Stack, ...]:
    return make_stacks(np.frombuffer(boundaries, np.int64))


def make_stacks(cu_seqlens: np.ndarray) -> tuple[Stack, ...]:
    """Group documents into stacks. cu_seqlens: int [n + 1], not descending, from 0 to the number of tokens."""
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
        index = torch.from_numpy(np.where(real, starts[docs, None] + column, 0).ravel())
        places = None if real.all() else torch.from_numpy(np.flatnonzero(real))
        tokens = index if places is None else index[places]
        stacks.append(Stack(len(docs), longest, index, places, tokens))
        first = last
    return tuple(stacks)


@functools.lru_cache(maxsize=64)
def _mask(rows: int, dtype: torch.dtype) -> Tensor:
    """The causal mask, [rows, rows]: -inf where the key comes after the query."""
    return torch.full((rows, rows), -torch.inf, dtype=dtype).triu_(1)


def _probabilities(q: Tensor, k: Tensor, rows: slice) -> Tensor:
    """q [b, R, L, D], k [b, 1, L, D] -> softmax of the scores of query rows `rows`, [b, R * rows, stop]."""
    queries, keys = _flat(q, rows), k[:, 0, : rows.stop].transpose(1, 2)
    scores = torch.empty(*queries.shape[:2], rows.stop, dtype=q.dtype)
    scores.baddbmm_(queries, keys, beta=0, alpha=q.shape[3] ** -0.5)
    own = scores.unflatten(1, (q.shape[1], -1))[..., rows.start :]  # all earlier keys are visible
    own += _mask(rows.stop - rows.start, q.dtype)
    return torch.softmax(scores, dim=-1, out=scores)


def _flat(x: Tensor, rows: slice) -> Tensor:
    """x [b, R, L, D] -> [b, R * rows, D]."""
    return x[:, :, rows].flatten(1, 2)


def runs_natively(q: Tensor) -> bool:
    """Whether the native operator is built and supports q's dtype and head size."""
    return q.dtype in _NATIVE_DTYPES and q.shape[2] % 16 == 0 and native.why_not(q.device) is None


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


@torch.library.custom_op("minimind::document_attention", mutates_args=(), device_types="cpu")
def _document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    if runs_natively(q):
        return torch.ops.minimind.native_document_attention(*_dense(q, k, v), cu_seqlens.int())
    out = torch.empty(q.shape, dtype=q.dtype)
    with torch.autocast("cpu", enabled=False):  # a caller's autocast would round the scores
        for stack in _stacks(cu_seqlens.numpy().astype(np.int64).tobytes()):
            _stack_forward(stack, (q, k, v), out)
    return out


def _stack_forward(stack: Stack, inputs: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
    """Compute attention of (q, k, v) for the stack's tokens and write it into out."""
    heads, kv_heads = inputs[0].shape[1], inputs[1].shape[1]
    q, k, v = (stack.take(t, kv_heads) for t in inputs)
    rows_out = torch.empty_like(q)
    for part, rows in stack.tiles(kv_heads, heads):
        p = _probabilities(q[part], k[part], rows)
        tile = torch.bmm(p, v[part, 0, : rows.stop])
        rows_out[part, :, rows] = tile.unflatten(1, (-1, rows.stop - rows.start))
    stack.put(rows_out, out)


@torch.library.custom_op("minimind::document_attention_backward", mutates_args=(), device_types="cpu")
def _document_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_natively(q):
        return torch.ops.minimind.native_document_attention_backward(*_dense(dout, q, k, v), cu_seqlens.int())
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        for stack in _stacks(cu_seqlens.numpy().astype(np.int64).tobytes()):
            _stack_backward(stack, (dout, q, k, v), (dq, dk, dv))
    return dq, dk, dv


def _stack_backward(
    stack: Stack, inputs: tuple[Tensor, Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Compute the gradients of the stack's tokens from (dout, q, k, v) and write them into grads, (dq, dk, dv)."""
    heads, kv_heads, scale = inputs[1].shape[1], inputs[2].shape[1], inputs[1].shape[2] ** -0.5
    # zero gradients keep padding without effect
    dout, q, k, v = (stack.take(t, kv_heads, zero_padding=t is inputs[0]) for t in inputs)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for part, rows in stack.tiles(kv_heads, heads):
        keys = slice(0, rows.stop)
        p = _probabilities(q[part], k[part], rows)
        do = _flat(dout[part], rows)
        dv[part, 0, keys].baddbmm_(p.transpose(1, 2), do)
        dp = torch.bmm(do, v[part, 0, keys].transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        tile = torch.bmm(ds, k[part, 0, keys]).mul_(scale)
        dq[part, :, rows] = tile.unflatten(1, (-1, rows.stop - rows.start))
        dk[part, 0, keys].baddbmm_(ds.transpose(1, 2), _flat(q[part], rows), alpha=scale)
    for rows_grad, target in zip((dq, dk, dv), grads, strict=True):
        stack.put(rows_grad, target)


@_document_attention.register_fake
def _(q, k, v, cu_seqlens):
    return q.new_empty(q.shape)


@_document_attention_backward.register_fake
def _(dout, q, k, v, cu_seqlens):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    return (None,) * 4 if dout is None else (*_document_attention_backward(dout, *ctx.saved_tensors), None)


_document_attention.register_autograd(_backward, setup_context=_save)


def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention within each document, scores scaled by D ** -0.5.

    q [N, H, D], k and v [N, G, D], with H a multiple of G: float32, bfloat16 or float64 on a CPU. cu_seqlens int [n +
    1] on the CPU: the documents' boundaries, from 0 to N, not descending; empty documents are ignored. Returns [N, H,
    D], contiguous, in q.dtype.
    """
    return _document_attention(q, k, v, cu_seqlens)
