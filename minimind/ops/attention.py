"""Causal attention over packed documents or padded batches, in PyTorch.

The layout of a batch is computed once per step and shared by every layer:

    CausalLayout         every row is one document
    MaskLayout           an explicit boolean mask, the reference for the two below, which skip scores between documents
    DocumentLayout       packed documents on a CPU (document_attention.py)
    VarlenLayout         packed documents on a GPU, by flash attention (varlen.py)
    SharedPrefixLayout   documents that share their beginning: one of the two above over whole documents
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.kernels.triton_support import before_sm_80
from minimind.ops import varlen
from minimind.ops.document_attention import document_attention


class _PermuteRows(torch.autograd.Function):
    """Select rows `index` of x. `inverse` says where each row of x went, so the backward is a gather, no
    scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def permute_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """x [N, ...] -> x[index] [M, ...], with index[inverse] == arange(N). Output rows that `inverse` does not name are
    padding: their gradient must be zero and is dropped."""
    return _PermuteRows.apply(x, index, inverse)


@dataclass(frozen=True)
class CausalLayout:
    """Every row of the batch is one document."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(q, k, v, is_causal=True)


@dataclass(frozen=True)
class MaskLayout:
    """mask: bool [B, 1, T, T], True where a query (dim 2) may attend to a key (dim 3)."""

    mask: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda:  # CUDA's memory-efficient kernel supports a mask, but not grouped queries
            repeats = q.shape[2] // k.shape[2]
            k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        return _sdpa(q, k, v, attn_mask=self.mask)


@dataclass(frozen=True)
class DocumentLayout:
    """cu_seqlens: int [n + 1] on the CPU, the documents' boundaries in the flattened batch."""

    cu_seqlens: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = document_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), self.cu_seqlens)
        return out.view(q.shape)


@dataclass(frozen=True)
class VarlenLayout:
    """cu_seqlens: int32 [n + 1] on the GPU, not descending; empty documents at the end pad it to a fixed shape.
    max_length: an upper bound on the documents' lengths."""

    cu_seqlens: Tensor
    max_length: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds = varlen.Bounds(self.cu_seqlens, self.cu_seqlens, self.max_length, self.max_length)
        return varlen.causal_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds).view(q.shape)


class SharedPrefix(NamedTuple):
    """Documents that share a beginning, of which a batch of N tokens holds one copy.

    rows: int64 [M], the batch's tokens that make up each whole document, document after document. cu_seqlens: int
    [n + 1], the documents' boundaries in `rows`, from 0 to M. places: int64 [N, C], the positions in `rows` of each
    token's copies, filled up with -1. Attention's output for a token is taken from its first copy.
    """

    rows: Tensor
    cu_seqlens: Tensor
    places: Tensor


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Computes everything but attention once for a shared beginning: queries, keys and values are copied for each
    document just before attention. `documents` is the layout of `rows`."""

    rows: Tensor
    places: Tensor
    documents: DocumentLayout | VarlenLayout

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = (_CopyToDocuments.apply(x.flatten(0, 1), self.rows, self.places).unsqueeze(0) for x in (q, k, v))
        out = self.documents.attend(*whole).squeeze(0)
        return _TakeFirstCopy.apply(out, self.rows, self.places).view(q.shape)


class _CopyToDocuments(torch.autograd.Function):
    """x [N, ...] -> x[rows] [M, ...]. The backward sums a token's copies in float32 and in a fixed order;
    index_select's own backward uses atomics, on a GPU in 16 bit. Rows that `places` does not name are padding, and
    their gradient, which is zero, is not read."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        exact = torch.promote_types(grads[0].dtype, torch.float32)
        total = grads[0].new_zeros(places.shape[0], *grads[0].shape[1:], dtype=exact)
        for place in places.unbind(1):
            copies = grads[0].index_select(0, place.clamp(min=0))
            total += copies.masked_fill(_broadcast(place < 0, copies), 0)
        return total.to(grads[0].dtype), None, None


class _TakeFirstCopy(torch.autograd.Function):
    """y [M, ...] -> each token's first copy, [N, ...]. The backward is a gather, with zeros for the other copies."""

    @staticmethod
    def forward(ctx, y: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, places)
        return y.index_select(0, places[:, 0])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, places = ctx.saved_tensors
        taken = places[:, 0].index_select(0, rows) == torch.arange(rows.numel(), device=rows.device)
        spread = grads[0].index_select(0, rows)
        return spread.masked_fill(_broadcast(~taken, spread), 0), None, None


def _broadcast(mask: Tensor, rows: Tensor) -> Tensor:
    """View mask [N] so that it broadcasts over rows [N, ...]."""
    return mask.view(-1, *[1] * (rows.ndim - 1))


Layout = CausalLayout | MaskLayout | DocumentLayout | VarlenLayout | SharedPrefixLayout


def make_layout(
    batch: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    fused: bool = True,
    shared_prefix: SharedPrefix | None = None,
) -> Layout:
    """Choose the attention layout of a [batch, length] step in `dtype`.

    cu_seqlens: int [n + 1], the documents' boundaries in the flattened batch, row ends included.
    attention_mask: bool or int [batch, length], 0 at padding; used if there are no cu_seqlens.
    fused: skip scores between documents, if this device and dtype support that; else use a mask.
    shared_prefix: replaces cu_seqlens if documents share their beginning; none is longer than `length`.
    """
    bounds = cu_seqlens if shared_prefix is None else shared_prefix.cu_seqlens
    parts = _document_layout(device, dtype, bounds, length, fused)
    if shared_prefix is not None:
        if parts is not None:
            return SharedPrefixLayout(shared_prefix.rows, shared_prefix.places, parts)
        return MaskLayout(_visible(shared_prefix, batch, length)[:, None])
    if cu_seqlens is not None:
        if parts is not None:
            return parts
        document = document_ids(cu_seqlens.to(device), batch * length).view(batch, length)
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return MaskLayout(((document[:, :, None] == document[:, None, :]) & causal)[:, None])
    if attention_mask is not None:
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        visible = causal & attention_mask.bool()[:, None, :]
        # padding attends to itself, so that no row of scores is empty and turns into NaN
        visible = visible | torch.eye(length, dtype=torch.bool, device=device)
        return MaskLayout(visible[:, None])
    return CausalLayout()


def _document_layout(
    device: torch.device, dtype: torch.dtype, cu_seqlens: Tensor | None, longest: int, fused: bool
) -> DocumentLayout | VarlenLayout | None:
    """The layout that skips scores between documents, or None."""
    if fused and cu_seqlens is not None:
        if device.type == "cpu":
            return DocumentLayout(cu_seqlens)
        if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and not before_sm_80():
            return VarlenLayout(cu_seqlens.to(device, torch.int32), longest)
    return None


def attention_name(device: torch.device, dtype: torch.dtype | None, fused: bool) -> str:
    """Name of the attention implementation for a packed batch, for records: torch (FlashAttention 2), flash2, flash3 or
    flash4 on a GPU, documents on a CPU, or masked, PyTorch's with a mask over all pairs of tokens."""
    if not fused or device.type not in ("cpu", "cuda"):
        return "masked"
    if device.type == "cpu":
        return "documents"
    return varlen.chosen() if dtype in (torch.bfloat16, torch.float16) and not before_sm_80() else "masked"


def _visible(shared_prefix: SharedPrefix, batch: int, length: int) -> Tensor:
    """bool [B, T, T]: a token sees its document up to itself; documents do not cross rows."""
    rows, back = shared_prefix.rows, shared_prefix.places[:, 0]
    bounds = shared_prefix.cu_seqlens.to(rows.device)
    document = document_ids(bounds, rows.numel())
    place = (torch.arange(rows.numel(), device=rows.device) - bounds[document])[back].view(batch, length)
    holds = torch.zeros(bounds.numel() - 1, batch * length, dtype=torch.bool, device=rows.device)
    holds[document, rows] = True
    sees = holds[document[back]].view(batch, length, batch, length)
    own_row = torch.arange(batch, device=rows.device)
    return sees[own_row, :, own_row] & (place[:, None, :] <= place[:, :, None])


def document_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The document of each token of the flattened batch: int64 [tokens]. No host sync."""
    position = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs) -> Tensor:
    """q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D]; query heads share key heads."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=q.shape[2] != k.shape[2], **kwargs
    )
    return out.transpose(1, 2)
