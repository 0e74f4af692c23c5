"""Inputs of the decoding operators: caches whose unowned rows are NaN, pages in no order, ragged lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minimind.inference.decode.kv_cache import FLOAT8_MAX
from minimind.inference.decode.reference import decode_attention_ref, gather_cache, rope_append_kv_ref, sample_ref
from minimind.ops import native
from tests.kernels.contract import DEVICE, rand

FP8 = torch.float8_e4m3fn
HEADS = [(2, 1, 32), (8, 2, 64), (8, 2, 80), (8, 4, 96), (6, 2, 128), (7, 1, 64), (8, 1, 48)]  # H, G, D

MISSING = native.why_not(DEVICE)
needs_native = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])


def operator(name: str, backend: str = "native") -> Callable[..., Any]:
    """The native operator of this name, or its reference."""
    if backend == "native":
        return getattr(torch.ops.minimind, name)
    references = {"rope_append_kv": rope_append_kv_ref, "decode_attention": decode_attention_ref, "sample": sample_ref}
    return references[name]


@dataclass(frozen=True)
class Attention:
    """The arguments of decode_attention."""

    q: Tensor
    key_cache: Tensor
    value_cache: Tensor
    page_table: Tensor
    lengths: Tensor
    scale: float
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def run(self, backend: str = "native") -> Tensor:
        return operator("decode_attention", backend)(*vars(self).values())

    def rows(self, keep: list[int]) -> Attention:
        """The same sequences alone, in this order."""
        parts = {"q": self.q[keep], "page_table": self.page_table[keep], "lengths": self.lengths[keep]}
        return replace(self, **{name: part.contiguous() for name, part in parts.items()})

    def plain(self) -> Tensor:
        """torch's own attention in the dtype of q."""
        return self._each(self.q.dtype)

    def truth(self) -> Tensor:
        return self._each(torch.float64)

    def _each(self, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(self.q.shape, dtype=dtype, device=DEVICE)
        for b, length in enumerate(self.lengths.tolist()):
            if length == 0:
                continue
            k = gather_cache(self.key_cache, self.page_table[b], length, self.k_scale).to(dtype).transpose(0, 1)
            v = gather_cache(self.value_cache, self.page_table[b], length, self.v_scale).to(dtype).transpose(0, 1)
            q = self.q[b].to(dtype)[:, None]
            out[b] = torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], scale=self.scale, enable_gqa=True
            )[0, :, 0]
        return out


def paged(
    lengths: list[int],
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    page: int = 16,
    seed: int = 0,
    scale: float = 1.0,
) -> Attention:
    """shape: query heads, key/value heads, head size. scale: of q; a large one makes softmax confident."""
    heads, kv_heads, dim = shape
    cache_dtype = cache_dtype or dtype
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).int()
    table = torch.full((len(lengths), max(counts) + 2), -1, dtype=torch.int32)
    owned = torch.zeros(order.numel(), page, dtype=torch.bool)
    for b, n in enumerate(lengths):
        table[b, : counts[b]], order = order[: counts[b]], order[counts[b] :]
        for i in range(n):
            owned[table[b, i // page], i % page] = True
    caches, scales = [], []
    for i in (1, 2):
        rows = rand(owned.shape[0], page, kv_heads, dim, seed=seed + i)
        scales.append(rows.abs().amax((0, 1, 3)) / FLOAT8_MAX if cache_dtype == FP8 else None)
        rows = rows if scales[-1] is None else rows / scales[-1][:, None]
        rows[~owned.to(DEVICE)] = float("nan")
        caches.append(rows.to(cache_dtype))
    q = rand(len(lengths), heads, dim, seed=seed + 3, scale=scale).to(dtype)
    tensors = (q, *caches, table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    return Attention(*tensors, dim**-0.5, *scales)
