"""Causal attention over packed documents or padded batches, in PyTorch.

The layout of a batch is worked out once per step and shared by every layer:

    CausalLayout     every row is one document
    MaskLayout       an explicit boolean mask; no host sync, so this is what a GPU reference uses
    DocumentLayout   documents of like length are stacked and each stack is one causal SDPA call. On a CPU this
                     skips the (T - length) / T of every row's scores that a mask would compute and throw away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# A stack holds documents no shorter than this share of its longest: 0.75 wastes at most 44% of a stack's scores
# and gives about ten stacks for lengths of 16 to 512.
_STACK_RATIO = 0.75
_SHORTEST_STACK = 16


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


class _UnpadRows(torch.autograd.Function):
    """Rows `inverse` of a padded [M, ...]; padding rows get a zero gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        out = grads[0].new_zeros((ctx.rows, *grads[0].shape[1:]))
        return out.index_copy_(0, inverse, grads[0]), None


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
    """Stacks of documents: `stacks` lists (documents, length) of each; `index` int64 [M] picks the tokens of all
    stacks out of the flattened batch (padding repeats token 0); `inverse` int64 [N] takes them back."""

    index: Tensor
    inverse: Tensor
    stacks: tuple[tuple[int, int], ...]

    @staticmethod
    def from_boundaries(cu_seqlens: np.ndarray) -> DocumentLayout:
        """cu_seqlens: int [n + 1], ascending, from 0 to the number of tokens."""
        starts = cu_seqlens[:-1].astype(np.int64)
        lengths = np.diff(cu_seqlens).astype(np.int64)
        order = np.argsort(-lengths, kind="stable")
        order = order[lengths[order] > 0]
        stacks, index, inverse = [], [], np.empty(int(cu_seqlens[-1]), np.int64)
        offset = first = 0
        while first < len(order):
            longest = int(lengths[order[first]])
            shortest = 1 if longest <= _SHORTEST_STACK else int(longest * _STACK_RATIO)
            last = int(np.searchsorted(-lengths[order], -shortest, side="right"))
            docs = order[first:last]
            column = np.arange(longest)
            real = column < lengths[docs, None]
            tokens = np.where(real, starts[docs, None] + column, 0)
            inverse[tokens[real]] = offset + np.flatnonzero(real)
            index.append(tokens.ravel())
            stacks.append((len(docs), longest))
            offset, first = offset + tokens.size, last
        return DocumentLayout(
            torch.from_numpy(np.concatenate(index)), torch.from_numpy(inverse), tuple(stacks)
        )

    @torch.compiler.disable  # shapes differ with every batch: compiling this would recompile at every step
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length = q.shape[:2]
        heads = [x.shape[2] for x in (q, k, v)]
        # float32: for short documents bf16 SDPA with its backward took 4x as long on a CPU (docs/LOG.md)
        qkv = torch.cat((q, k, v), dim=2).flatten(0, 1).to(torch.promote_types(q.dtype, torch.float32))
        stacked = permute_rows(qkv, self.index, self.inverse)
        out, offset = [], 0
        for docs, longest in self.stacks:
            rows = stacked[offset : offset + docs * longest].unflatten(0, (docs, longest))
            out.append(_sdpa(*rows.split(heads, dim=2), is_causal=True).flatten(0, 1))
            offset += docs * longest
        merged = _UnpadRows.apply(torch.cat(out), self.inverse)
        return merged.unflatten(0, (batch, length)).to(q.dtype)


Layout = CausalLayout | MaskLayout | DocumentLayout


def make_layout(
    batch: int,
    length: int,
    device: torch.device,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    stacked: bool = True,
) -> Layout:
    """The attention layout of a [batch, length] step.

    cu_seqlens: int [n + 1], boundaries of the documents in the flattened batch, row ends among them.
    attention_mask: bool or int [batch, length], 0 at padding; used when there are no cu_seqlens.
    stacked: use DocumentLayout where cu_seqlens is on the host.
    """
    if cu_seqlens is not None:
        if stacked and device.type == "cpu":
            boundaries = cu_seqlens.cpu().numpy()
            if len(boundaries) == batch + 1 and (np.diff(boundaries) == length).all():
                return CausalLayout()
            return DocumentLayout.from_boundaries(boundaries)
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
