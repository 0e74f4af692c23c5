"""Causal attention over packed documents or padded batches, in PyTorch.

The layout of a batch is worked out once per step and shared by every layer:

    CausalLayout     every row is one document
    MaskLayout       an explicit boolean mask: the reference of the two below, which compute no score between documents
    DocumentLayout   on a CPU (document_attention.py)
    VarlenLayout     on a GPU, PyTorch's flash attention over documents
    UnfoldedLayout   documents that share their beginning: one of the above over the whole of each
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.ops import varlen
from minimind.ops.document_attention import document_attention


class _PermuteRows(torch.autograd.Function):
    """Rows `index` of x; `inverse` says where each row of x went. The backward is a gather, not a scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def permute_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """x [N, ...] -> x[index] [M, ...]. Needs index[inverse] == arange(N); rows of `index` that no entry of
    `inverse` names are padding: their gradient must be zero and is dropped."""
    return _PermuteRows.apply(x, index, inverse)


@dataclass(frozen=True)
class CausalLayout:
    """Every row of the batch is one document."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(q, k, v, is_causal=True)


@dataclass(frozen=True)
class MaskLayout:
    """mask: bool [B, 1, T, T], True where a query (dim 2) may look at a key (dim 3)."""

    mask: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda:  # CUDA's memory-efficient kernel takes a mask, but not fewer key heads than query heads
            groups = q.shape[2] // k.shape[2]
            k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        return _sdpa(q, k, v, attn_mask=self.mask)


@dataclass(frozen=True)
class DocumentLayout:
    """cu_seqlens: int [n + 1] on the CPU, boundaries of the documents in the flattened batch."""

    cu_seqlens: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = document_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), self.cu_seqlens)
        return out.view(q.shape)


@dataclass(frozen=True)
class VarlenLayout:
    """cu_seqlens: int32 [n + 1] on the GPU, not descending: what stands after the last document is empty ones, so that
    a batch of fewer documents has the same shape. max_length: no document is longer."""

    cu_seqlens: Tensor
    max_length: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds = varlen.Bounds(self.cu_seqlens, self.cu_seqlens, self.max_length, self.max_length)
        return varlen.causal_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds).view(q.shape)


class SharedPrefix(NamedTuple):
    """How documents that share their beginning, which the batch of N tokens holds once, are read one by one.

    rows: int64 [M], the tokens of every document, one document after the other; cu_seqlens: int [n + 1], where each
    begins among them, from 0 to M; places: int64 [N, C], where among them each token of the batch stands, -1 behind the
    last place of one that is read fewer than C times. Attention's result is taken from the first.
    """

    rows: Tensor
    cu_seqlens: Tensor
    places: Tensor


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Queries, keys and values of a shared beginning are computed once and repeated for each document, where it is
    cheap: all but attention itself is done once for it. `documents` is the layout of `rows`."""

    rows: Tensor
    places: Tensor
    documents: DocumentLayout | VarlenLayout

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = (_Unfold.apply(x.flatten(0, 1), self.rows, self.places).unsqueeze(0) for x in (q, k, v))
        out = self.documents.attend(*whole).squeeze(0)
        return _Fold.apply(out, self.rows, self.places).view(q.shape)


class _Unfold(torch.autograd.Function):
    """x [N, ...] -> x[rows] [M, ...]. The backward adds up the few copies of a token in float32: that of index_select
    adds to the gradient by atomics, on a GPU in 16 bit and in an order of its own. Rows that no place names are
    padding: nothing is taken from their documents, their gradient is zero and is not read."""

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
            total += copies.masked_fill(_beside(place < 0, copies), 0)
        return total.to(grads[0].dtype), None, None


class _Fold(torch.autograd.Function):
    """y [M, ...] -> y at the first place of each token [N, ...]. The backward is a gather: rows that were not taken
    have no gradient."""

    @staticmethod
    def forward(ctx, y: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, places)
        return y.index_select(0, places[:, 0])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, places = ctx.saved_tensors
        taken = places[:, 0].index_select(0, rows) == torch.arange(rows.numel(), device=rows.device)
        spread = grads[0].index_select(0, rows)
        return spread.masked_fill(_beside(~taken, spread), 0), None, None


def _beside(mask: Tensor, rows: Tensor) -> Tensor:
    """mask [N], to be broadcast over rows [N, ...]."""
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
    unfolding: SharedPrefix | None = None,
) -> Layout:
    """The attention layout of a [batch, length] step in `dtype`.

    cu_seqlens: int [n + 1], boundaries of the documents in the flattened batch, row ends among them.
    unfolding: the documents instead, where some share their beginning; none is longer than `length`.
    attention_mask: bool or int [batch, length], 0 at padding; used when there are no cu_seqlens.
    fused: compute no score between documents, where this device and dtype have a form for that.
    """
    parts = _document_layout(device, dtype, cu_seqlens if unfolding is None else unfolding.cu_seqlens, length, fused)
    if unfolding is not None:
        if parts is not None:
            return SharedPrefixLayout(unfolding.rows, unfolding.places, parts)
        return MaskLayout(_visible(unfolding, batch, length)[:, None])
    if cu_seqlens is not None:
        if parts is not None:
            return parts
        document = document_ids(cu_seqlens.to(device), batch * length).view(batch, length)
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return MaskLayout(((document[:, :, None] == document[:, None, :]) & causal)[:, None])
    if attention_mask is not None:
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        visible = causal & attention_mask.bool()[:, None, :]
        # padding looks at itself, so that no row of scores is empty and none turns into NaN
        visible = visible | torch.eye(length, dtype=torch.bool, device=device)
        return MaskLayout(visible[:, None])
    return CausalLayout()


def _document_layout(
    device: torch.device, dtype: torch.dtype, cu_seqlens: Tensor | None, longest: int, fused: bool
) -> DocumentLayout | VarlenLayout | None:
    """The form that computes no score between documents, where there is one."""
    if fused and cu_seqlens is not None:
        if device.type == "cpu":
            return DocumentLayout(cu_seqlens)
        if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
            return VarlenLayout(cu_seqlens.to(device, torch.int32), longest)
    return None


def attention_name(device: torch.device, dtype: torch.dtype | None, fused: bool) -> str:
    """Whose attention a packed batch gets, in a word, for the record: `torch` (FlashAttention 2), flash2, flash3 or
    flash4 on a GPU, `documents` on a CPU, else `masked`, PyTorch's with a mask over all pairs of tokens."""
    if not fused or device.type not in ("cpu", "cuda"):
        return "masked"
    if device.type == "cpu":
        return "documents"
    return varlen.taken() if dtype in (torch.bfloat16, torch.float16) else "masked"


def _visible(unfolding: SharedPrefix, batch: int, length: int) -> Tensor:
    """bool [B, T, T]: a token sees what its document has up to it; documents lie within a row."""
    rows, back = unfolding.rows, unfolding.places[:, 0]
    bounds = unfolding.cu_seqlens.to(rows.device)
    document = document_ids(bounds, rows.numel())
    place = (torch.arange(rows.numel(), device=rows.device) - bounds[document])[back].view(batch, length)
    holds = torch.zeros(bounds.numel() - 1, batch * length, dtype=torch.bool, device=rows.device)
    holds[document, rows] = True
    sees = holds[document[back]].view(batch, length, batch, length)
    own_row = torch.arange(batch, device=rows.device)
    return sees[own_row, :, own_row] & (place[:, None, :] <= place[:, :, None])


def document_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Which document each token of the flattened batch belongs to: int64 [tokens]. No host sync."""
    position = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs) -> Tensor:
    """q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D]; query heads share key heads in groups."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=q.shape[2] != k.shape[2], **kwargs
    )
    return out.transpose(1, 2)
