"""Computing prompts over the paged cache: chunks of several samples, packed, through the model's own layers.

The layers are those of training; only the layout differs, which writes the chunk's keys and values into their pages
and lets every token look at all tokens of its sample up to itself, those of earlier chunks and shared pages included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.inference.cache import LayerCache
from minimind.inference.scheduler import Chunk
from minimind.inference.transfer import on_device
from minimind.ops import varlen


@dataclass(frozen=True)
class Prompts:
    """Chunks packed into N tokens that look at M tokens of context (all of their samples' first tokens, their own
    included).

    token, position, slot int64 [N]; slot: a row of the cache, page * page_size + place.
    context int64 [M]: rows of the cache. last int64 [n]: where in N the last tokens of finished prompts are.
    bounds: of every chunk, first and end token in N, first and end row in M; cu_queries, cu_keys int32 [chunks + 1]:
    the same ends, on the device.
    table int32 [chunks, pages]: only for flash attention over pages.
    """

    token: Tensor
    position: Tensor
    slot: Tensor
    context: Tensor
    last: Tensor
    bounds: list[tuple[int, int, int, int]]
    cu_queries: Tensor
    cu_keys: Tensor
    table: Tensor | None = None

    @property
    def fresh(self) -> bool:
        """Whether no chunk has tokens before it: then N = M, in one order."""
        return len(self.slot) == len(self.context)


def pack(chunks: Sequence[Chunk], page_size: int, device: torch.device) -> Prompts:
    tokens, slots, positions, contexts, bounds, last = [], [], [], [], [], []
    n = m = 0
    for chunk in chunks:
        pages = np.array(chunk.sample.pages, np.int64)
        rows = (pages[:, None] * page_size + np.arange(page_size)).ravel()[: chunk.end]
        contexts.append(rows)
        slots.append(rows[chunk.start :])
        tokens.append(np.array(chunk.sample.tokens[chunk.start : chunk.end], np.int64))
        positions.append(np.arange(chunk.start, chunk.end))
        bounds.append((n, n := n + chunk.end - chunk.start, m, m := m + chunk.end))
        if chunk.last:
            last.append(n - 1)
    queries = np.array([0, *(end for _, end, _, _ in bounds)], np.int32)
    keys = np.array([0, *(end for _, _, _, end in bounds)], np.int32)
    table = np.zeros((0, 0), np.int32)
    if device.type == "cuda" and varlen.PAGED and page_size % varlen.PAGE_MULTIPLE == 0:
        table = _table(chunks)
    wide = [np.concatenate(parts) for parts in (tokens, positions, slots, contexts)]
    token, position, slot, context, ends = on_device([*wide, np.array(last, np.int64)], device)
    cu_queries, cu_keys, paged = on_device([queries, keys, table.ravel()], device)
    return Prompts(
        token, position, slot, context, ends, bounds, cu_queries, cu_keys,
        paged.view(table.shape) if table.size else None,
    )  # fmt: skip


def _table(chunks: Sequence[Chunk]) -> np.ndarray:
    """The samples' pages, int32 [chunks, most], with zeros behind."""
    table = np.zeros((len(chunks), max(len(chunk.sample.pages) for chunk in chunks)), np.int32)
    for row, chunk in zip(table, chunks, strict=True):
        row[: len(chunk.sample.pages)] = chunk.sample.pages
    return table


class ChunkAttention:
    """Causal attention of packed chunks, shared by the layers of a step; the last query of a chunk sees all its keys.

    q [N, H, D], k and v [M, G, D] -> [N, H, D].
    """

    def __init__(self, prompts: Prompts) -> None:
        self._bounds, self._device = prompts.bounds, prompts.token.device
        longest_query = max(end - start for start, end, _, _ in prompts.bounds)
        longest_key = max(last - first for _, _, first, last in prompts.bounds)
        self._varlen_bounds = varlen.Bounds(prompts.cu_queries, prompts.cu_keys, longest_query, longest_key)
        self._table = prompts.table

    @cached_property
    def _masks(self) -> list[Tensor | None]:
        return [_mask(end - start, last - first, self._device) for start, end, first, last in self._bounds]

    @cached_property
    def _used(self) -> Tensor:
        return self._varlen_bounds.keys.diff()

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Chunk by chunk, on any device and in any dtype."""
        out = torch.empty_like(q)
        for (start, end, first, last), mask in zip(self._bounds, self._masks, strict=True):
            rows_q, rows_k, rows_v = (
                x.transpose(0, 1).unsqueeze(0) for x in (q[start:end], k[first:last], v[first:last])
            )
            part = F.scaled_dot_product_attention(
                rows_q, rows_k, rows_v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
            )
            out[start:end] = part[0].transpose(0, 1)
        return out

    def varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Flash attention over all chunks at once, 16-bit on a GPU."""
        return varlen.causal_attention(q, k, v, self._varlen_bounds)

    def paged_varlen(self, q: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        """Flash attention that reads the pages [P, S, G, D] where they lie."""
        assert self._table is not None
        return varlen.paged_attention(q, key_cache, value_cache, self._varlen_bounds, self._used, self._table)


def _mask(queries: int, keys: int, device: torch.device) -> Tensor | None:
    """bool [queries, keys], aligned at the lower right corner; None for the plain causal square."""
    if queries == keys:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


@dataclass(frozen=True)
class PagedLayout:
    """The attention layout of a prefill step in one layer."""

    prompts: Prompts
    attention: ChunkAttention
    cache: LayerCache

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, N, H, D], k and v [1, N, G, D] -> [1, N, H, D]; k and v are in the cache afterwards.

        A cache of another dtype than q's is read back even where the chunks are all there is, so that what a token sees
        does not depend on how its prompt was cut.
        """
        prompts, cache, (q, k, v) = self.prompts, self.cache, (q[0], k[0], v[0])
        cache.write(prompts.slot, k, v)
        same_dtype = cache.k.dtype == q.dtype
        flash = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        if flash and same_dtype and prompts.table is not None and not prompts.fresh:
            return self.attention.paged_varlen(q, cache.k, cache.v).unsqueeze(0)
        if not (prompts.fresh and same_dtype):
            k, v = cache.read(prompts.context, q.dtype)
        attend = self.attention.varlen if flash else self.attention.sdpa
        return attend(q, k, v).unsqueeze(0)
