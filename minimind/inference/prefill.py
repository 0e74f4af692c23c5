"""Computes prompts over the paged cache: packed chunks of several sequences, natively or by the model's own layers.

The native step of an x86 processor (decode/step.py) takes a row for each token of the chunks, as it does for each
sequence that decodes, so that a token's keys and values are the same bits whether it was decoded or part of a prompt.

Elsewhere the layers are those of training. Only the attention layout differs: it writes the chunks' keys and values
into their pages, and lets every token attend to all tokens of its sequence up to itself, including those of earlier
chunks and shared pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.inference.batch import on_device
from minimind.inference.decode.kv_cache import LayerCache
from minimind.inference.scheduler import Chunk
from minimind.kernels.triton_support import before_sm_80
from minimind.ops import varlen

ROWS_TIMES_CONTEXT = 1 << 20  # 66 numbers for each head and 256 tokens, with heads of 64 numbers


@dataclass(frozen=True)
class Prompts:
    """Chunks packed into N tokens, which attend to M tokens of context: their sequences up to the chunks' ends.

    token, position, slot: int64 [N]. slot: a row of the cache, page * page_size + offset.
    context: int64 [M], rows of the cache. last: int64 [n], indices in N of the last tokens of complete prompts.
    bounds: for every chunk, its first and end token in N, and first and end row in M. cu_queries, cu_keys: int32
    [chunks + 1], the same ends on the device. page_table: int32 [chunks, pages], only for flash attention over pages.
    """

    token: Tensor
    position: Tensor
    slot: Tensor
    context: Tensor
    last: Tensor
    bounds: list[tuple[int, int, int, int]]
    cu_queries: Tensor
    cu_keys: Tensor
    page_table: Tensor | None = None

    @property
    def fresh(self) -> bool:
        """Whether all chunks begin their sequences: then N = M, in the same order."""
        return len(self.slot) == len(self.context)


def pack_chunks(chunks: Sequence[Chunk], page_size: int, device: torch.device) -> Prompts:
    """Pack the chunks of one step, in their order."""
    tokens, slots, positions, contexts, bounds, last = [], [], [], [], [], []
    n = m = 0
    for chunk in chunks:
        pages = np.array(chunk.sequence.pages, np.int64)
        rows = (pages[:, None] * page_size + np.arange(page_size)).ravel()[: chunk.end]
        contexts.append(rows)
        slots.append(rows[chunk.start :])
        tokens.append(np.array(chunk.sequence.tokens[chunk.start : chunk.end], np.int64))
        positions.append(np.arange(chunk.start, chunk.end))
        bounds.append((n, n := n + chunk.end - chunk.start, m, m := m + chunk.end))
        if chunk.last:
            last.append(n - 1)
    queries = np.array([0, *(end for _, end, _, _ in bounds)], np.int32)
    keys = np.array([0, *(end for _, _, _, end in bounds)], np.int32)
    table = np.zeros((0, 0), np.int32)
    if device.type == "cuda" and varlen.PAGED and page_size % varlen.PAGE_MULTIPLE == 0:
        table = _page_table(chunks)
    packed = [np.concatenate(parts) for parts in (tokens, positions, slots, contexts)]
    token, position, slot, context, ends = on_device([*packed, np.array(last, np.int64)], device)
    cu_queries, cu_keys, paged = on_device([queries, keys, table.ravel()], device)
    return Prompts(
        token, position, slot, context, ends, bounds, cu_queries, cu_keys,
        paged.view(table.shape) if table.size else None,
    )  # fmt: skip


def _page_table(chunks: Sequence[Chunk]) -> np.ndarray:
    """The sequences' pages, int32 [chunks, most pages], padded with zeros."""
    table = np.zeros((len(chunks), max(len(chunk.sequence.pages) for chunk in chunks)), np.int32)
    for row, chunk in zip(table, chunks, strict=True):
        row[: len(chunk.sequence.pages)] = chunk.sequence.pages
    return table


class PromptRows(NamedTuple):
    """The N tokens of the chunks as rows of `prefill_step`. token, slot: int64 [N]; position, length: int32 [N];
    page_table: int32 [N, pages]; last: int32 [n], the rows that end a prompt."""

    token: Tensor
    last: Tensor
    position: Tensor
    slot: Tensor
    page_table: Tensor
    length: Tensor

    def parts(self) -> Iterator[PromptRows]:
        """The rows in order, in parts for which attention's partial results take at most some 16 MiB of memory."""
        size = max(64, ROWS_TIMES_CONTEXT // int(self.length.max()))
        for first in range(0, len(self.token), size):
            part = PromptRows(*(t[first : first + size] for t in self))
            last = self.last[(self.last >= first) & (self.last < first + size)] - first
            yield part._replace(last=last)


def pack_rows(chunks: Sequence[Chunk], page_size: int) -> PromptRows:
    """The chunks of one step on a CPU, in their order."""
    counts = [chunk.end - chunk.start for chunk in chunks]
    position = np.concatenate([np.arange(chunk.start, chunk.end, dtype=np.int32) for chunk in chunks])
    tokens = [np.array(chunk.sequence.tokens[chunk.start : chunk.end], np.int64) for chunk in chunks]
    table = np.repeat(_page_table(chunks), counts, axis=0)
    page = table[np.arange(len(position)), position // page_size].astype(np.int64)
    ends = zip(np.cumsum(counts, dtype=np.int32), chunks, strict=True)
    last = np.array([end - 1 for end, chunk in ends if chunk.last], np.int32)
    arrays = (np.concatenate(tokens), last, position, page * page_size + position % page_size, table, position + 1)
    return PromptRows(*map(torch.from_numpy, arrays))


class ChunkAttention:
    """Causal attention of packed chunks, shared by the layers of a step: q [N, H, D], k and v [M, G, D] -> [N, H, D].

    The last query of a chunk attends to all keys of its context.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._bounds, self._device = prompts.bounds, prompts.token.device
        longest_query = max(end - start for start, end, _, _ in prompts.bounds)
        longest_key = max(last - first for _, _, first, last in prompts.bounds)
        self._varlen_bounds = varlen.Bounds(prompts.cu_queries, prompts.cu_keys, longest_query, longest_key)
        self._page_table = prompts.page_table

    @cached_property
    def _masks(self) -> list[Tensor | None]:
        return [_mask(end - start, last - first, self._device) for start, end, first, last in self._bounds]

    @cached_property
    def _key_counts(self) -> Tensor:
        return self._varlen_bounds.keys.diff()

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One call per chunk, on any device and in any dtype."""
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
        """Flash attention that reads keys and values from the pages [P, S, G, D]."""
        assert self._page_table is not None
        return varlen.paged_attention(
            q, key_cache, value_cache, self._varlen_bounds, self._key_counts, self._page_table
        )


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
        """q [1, N, H, D], k and v [1, N, G, D] -> [1, N, H, D]; stores k and v in the cache.

        A cache with another dtype than q's is read back even if no chunk has earlier tokens, so that the result does
        not depend on how the prompt was cut into chunks.
        """
        prompts, cache, (q, k, v) = self.prompts, self.cache, (q[0], k[0], v[0])
        cache.write(prompts.slot, k, v)
        same_dtype = cache.k.dtype == q.dtype
        flash = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and not before_sm_80()
        if flash and same_dtype and prompts.page_table is not None and not prompts.fresh:
            return self.attention.paged_varlen(q, cache.k, cache.v).unsqueeze(0)
        if not (prompts.fresh and same_dtype):
            k, v = cache.read(prompts.context, q.dtype)
        attend = self.attention.varlen if flash else self.attention.sdpa
        return attend(q, k, v).unsqueeze(0)
