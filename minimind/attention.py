"""Causal attention over packed documents or padded batches, in PyTorch.

The layout of a batch is worked out once per step and shared by every layer:

    CausalLayout     every row is one document
    MaskLayout       an explicit boolean mask: the reference of the two below, which compute no score between documents
    DocumentLayout   on a CPU (document_attention.py)
    VarlenLayout     on a GPU, PyTorch's flash attention over documents
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from minimind.document_attention import document_attention

_VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters


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
        flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = causal_varlen_attention(*flat, self.cu_seqlens, self.max_length)
        return out.view(q.shape)


Layout = CausalLayout | MaskLayout | DocumentLayout | VarlenLayout


def make_layout(
    batch: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    fused: bool = True,
) -> Layout:
    """The attention layout of a [batch, length] step in `dtype`.

    cu_seqlens: int [n + 1], boundaries of the documents in the flattened batch, row ends among them.
    attention_mask: bool or int [batch, length], 0 at padding; used when there are no cu_seqlens.
    fused: compute no score between documents, where this device and dtype have a form for that.
    """
    if cu_seqlens is not None:
        if fused and device.type == "cpu":
            return DocumentLayout(cu_seqlens)
        if fused and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
            return VarlenLayout(cu_seqlens.to(device, torch.int32), length)
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


def causal_varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    """PyTorch's flash attention over documents: q [N, H, D], k and v [N, H_kv, D] -> [N, H, D], 16-bit, on a GPU."""
    options: dict[str, Any] = {}
    if "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:  # torch 2.11
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    bounds = cu_seqlens, cu_seqlens, max_length, max_length
    return cast(Tensor, varlen_attn(q, k, v, *bounds, window_size=(-1, 0), **options))
