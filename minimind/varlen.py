"""Flash attention over packed documents, on a GPU: PyTorch's operator, and what this version of it takes.

Importing it brings in torch._dynamo, 1.5 s of every start. So it is imported here alone, and only where there is CUDA.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

varlen_attn: Any = None
TAKES_FEWER_HEADS = PAGED = False  # bools, not a lookup: torch.compile traces what reads them
if torch.cuda.is_available():
    from torch.nn.attention.varlen import varlen_attn

    _OPTIONS = inspect.signature(varlen_attn).parameters
    TAKES_FEWER_HEADS = "enable_gqa" in _OPTIONS  # torch >= 2.12: fewer key heads than query heads
    PAGED = "block_table" in _OPTIONS  # torch >= 2.13

PAGE_MULTIPLE = 256  # flash attention takes pages of multiples of this


class Bounds(NamedTuple):
    """int32 [n + 1]: where documents begin among the queries and among the keys; no document is longer."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


def causal_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    """q [N, H, D], k and v [M, H_kv, D] -> [N, H, D], 16-bit, on a GPU; the last query of a document sees all of its
    keys."""
    options: dict[str, Any] = {}
    if TAKES_FEWER_HEADS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return varlen_attn(q, k, v, *bounds, window_size=(-1, 0), **options)


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, bounds: Bounds, used: Tensor, table: Tensor
) -> Tensor:
    """The same over a cache's pages [P, S, H_kv, D], read where they lie; used: int32 [n], keys of each document;
    table: int32 [n, pages]."""
    return varlen_attn(
        q, keys, values, *bounds, window_size=(-1, 0),
        enable_gqa=True, seqused_k=used, block_table=table, num_splits=1,
    )  # fmt: skip
