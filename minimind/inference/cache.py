"""The paged key/value cache: a fixed number of pages, each for `page_size` tokens of one or more sequences.

PagePool hands pages out and counts who holds them. A full page may be published under a key that stands for its tokens
and all before them (`page_key`, a chain of hashes); a later sequence that begins with the same tokens finds and shares
it, as in vLLM's automatic prefix caching and SGLang's RadixAttention (arXiv 2312.07104). A published page that nobody
holds any more stays findable until its place is needed, the longest unused first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minimind.config import ModelConfig
from minimind.inference.decode.cache_dtype import FLOAT8, as_bytes, float8_scales, restored, stored
from minimind.inference.transfer import on_device
from minimind.modeling import Model

CPU_CACHE_BYTES = 512 << 20  # where the caller names no budget


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """16 bytes that name a page by its tokens and the key of the page before it (b"" for the first).

    A cryptographic hash: a strong one, because pages are shared between strangers' requests.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Reference counts of `pages` pages and the prefixes in them. Holds no tensor."""

    def __init__(self, pages: int, reuse: bool = True) -> None:
        """reuse: whether published pages can be found; without it `publish` does nothing."""
        self.pages, self.reuse = pages, reuse
        self._references = [0] * pages
        self._free = deque(range(pages))
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # published, held by nobody; in the order they became so

    @property
    def available(self) -> int:
        """Pages that `take` can still hand out."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Published pages that nobody holds."""
        return len(self._idle)

    def references(self, page: int) -> int:
        return self._references[page]

    def take(self) -> int | None:
        """A page for one holder, content undefined; None when every page is held."""
        if self._free:
            page = self._free.popleft()
        elif self._idle:
            page = next(iter(self._idle))
            del self._idle[page]
            self._unpublish(page)
        else:
            return None
        self._references[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these held pages."""
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less. Give a sequence's pages in its order: later ones are then evicted before earlier ones."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Let a full page be found under `key`, unless another already is."""
        if self.reuse and key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages published under the first of `keys`, up to the first that is not there; held by the caller now."""
        found: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._idle.pop(page, None)
            self._references[page] += 1
            found.append(page)
        return found

    def forget(self) -> None:
        """Let no published page be found any more."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()

    def _unpublish(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]


def cache_pages(
    token_bytes: int,
    device: torch.device,
    page_size: int,
    kv_bytes: int | None,
    kv_tokens: int | None,
    useful_tokens: int,
) -> int:
    """How many pages the budget pays for; see `Engine`. token_bytes: of a token's keys and values in all layers;
    useful_tokens: more are never needed."""
    if page_size < 1:
        raise ValueError(f"page_size={page_size} must be at least 1")
    if kv_bytes is not None and kv_tokens is not None:
        raise ValueError("kv_bytes and kv_tokens both set the cache's size: give one of them")
    if kv_tokens is not None:
        pages, given = kv_tokens // page_size, f"kv_tokens={kv_tokens}"
    elif kv_bytes is not None:
        pages, given = kv_bytes // (page_size * token_bytes), f"kv_bytes={kv_bytes}"
    else:
        free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_CACHE_BYTES
        pages, given = min(-(-useful_tokens // page_size), free // (page_size * token_bytes)), "free memory"
    if pages < 1:
        raise ValueError(
            f"{given} is less than one page of the cache: {page_size} tokens or {page_size * token_bytes} bytes"
        )
    return pages


@dataclass(frozen=True)
class LayerCache:
    """One layer of it: k, v [P, S, G, D]; k_scale, v_scale float32 [G] of a float8 cache, else None."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [N, G, D] into rows `slots`, int64 [N]: page * page_size + place."""
        for cache, new, scale in ((self.k, k, self.k_scale), (self.v, v, self.v_scale)):
            as_bytes(cache).flatten(0, 1).index_copy_(0, slots, as_bytes(stored(new, cache.dtype, scale)))

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows `slots`, int64 [M], in `dtype`: k, v [M, G, D]."""
        k, v = (
            restored(as_bytes(cache).flatten(0, 1).index_select(0, slots).view(cache.dtype), dtype, scale)
            for cache, scale in ((self.k, self.k_scale), (self.v, self.v_scale))
        )
        return k, v


@dataclass(frozen=True)
class PagedCache:
    """k, v: [layers, pages, page_size, key/value heads, head_dim], one tensor each for the whole model; k_scale and
    v_scale, float32 [layers, key/value heads], of a float8 cache (decode/cache_dtype.py), else None."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @staticmethod
    def allocate(
        config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> PagedCache:
        shape = (config.num_hidden_layers, pages, page_size, config.num_key_value_heads, config.head_dim)
        caches = [torch.empty(shape, dtype=dtype, device=device) for _ in "kv"]
        if dtype != FLOAT8:
            return PagedCache(*caches)
        return PagedCache(*caches, *(torch.ones(shape[0], shape[3], device=device) for _ in "kv"))

    def take_scales(self, model: Model) -> None:
        """Of float8: the scales for the model's weights, in place. What was stored before means something else then."""
        if self.k_scale is not None and self.v_scale is not None:
            for mine, new in zip((self.k_scale, self.v_scale), float8_scales(model), strict=True):
                mine.copy_(new)

    def layer(self, index: int) -> LayerCache:
        scales = (None if scale is None else scale[index] for scale in (self.k_scale, self.v_scale))
        return LayerCache(self.k[index], self.v[index], *scales)

    @property
    def pages(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (from, to) in every layer."""
        pages = [np.array(side, np.int64) for side in zip(*pairs, strict=True)]
        source, target = on_device(pages, self.k.device)
        for tensor in (as_bytes(self.k), as_bytes(self.v)):
            tensor[:, target] = tensor[:, source]
