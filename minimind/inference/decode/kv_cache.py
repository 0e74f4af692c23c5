"""The tensors of the paged key/value cache: their size, layout and data type.

Keys and values are stored in the model's own dtype or another, such as float8 (e4m3, 3 bits of mantissa). A float8
cache holds x / scale, with one scale for each layer and key/value head. The scales follow from the weights, so no
calibration is needed and nothing saturates. Before its weights g, an RMSNorm's output is at most sqrt(C) long. By
Cauchy and Schwarz, a row w of the projection then gives

    |v_i| <= |w_i * g| sqrt(C)                         a value
    |(k_i, k_j)| <= |(w_i * g, w_j * g)| sqrt(C)       a pair of a key, which rotation preserves
    |(k_i, k_j)| <= max(|u_i|, |u_j|) sqrt(D)          the same after a QK-norm with weights u

and the scale is the least power of two that brings the largest of them below 448, float8's largest number. Typical
numbers are some sqrt(C) below that bound: with C = 512 most are stored as 7 to 20, far above 2^-6, where float8 gets
coarser. Because the scale is a power of two, the stored number is restored exactly, in bfloat16 and in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from minimind.config import ModelConfig
from minimind.modeling import Attention, Block, Model
from minimind.rope import attention_factor

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max

KV_DTYPES = (torch.bfloat16, torch.float16, torch.float32, FLOAT8)
CPU_CACHE_BYTES = 512 << 20  # the cache's size on a CPU if the caller gives none

KVDTypeName = Literal["auto", "fp32", "bf16", "fp16", "fp8"]


def check_kv_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """ValueError, one line, if a cache on `device` cannot have this dtype."""
    if dtype not in KV_DTYPES:
        names = ", ".join(map(str, KV_DTYPES))
        raise ValueError(f"kv_dtype={dtype} must be one of {names}")
    if dtype == FLOAT8 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"kv_dtype={dtype} needs a CPU or a CUDA GPU, not {device.type}: use torch.bfloat16")


def stored(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """x [..., G, D] as a cache of `dtype` stores it. scale: float32 [G] for float8, which saturates."""
    if scale is not None:
        x = (x / scale[:, None]).clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return x.to(dtype)


def restored(rows: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """The inverse of `stored`, except for rounding: rows [..., G, D] of a cache, in `dtype`."""
    return rows.to(dtype) if scale is None else (rows.float() * scale[:, None]).to(dtype)


def as_bytes(rows: Tensor) -> Tensor:
    """A float8 tensor as bytes, since PyTorch cannot index float8; other tensors unchanged."""
    return rows.view(torch.uint8) if rows.dtype == FLOAT8 else rows


@torch.no_grad()
def float8_scales(model: Model) -> tuple[Tensor, Tensor]:
    """k_scale and v_scale for the model's current weights: float32 [L, G] each."""
    bounds = [key_value_bounds(layer, model.config) for layer in cast(Iterable[Block], model.layers)]
    k, v = (torch.stack(per_layer) for per_layer in zip(*bounds, strict=True))
    return _power_of_two(k), _power_of_two(v)


def key_value_bounds(layer: Block, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Upper bounds of the absolute numbers in the layer's keys and values, for each head: float32 [G] each."""
    attention, dim = layer.self_attn, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rows = attention.qkv_proj.weight.float() * layer.input_layernorm.weight.float()  # [(H + 2 G) D, C]
    bounds = rows.norm(dim=1).view(heads + 2 * kv_heads, dim) * rows.shape[1] ** 0.5
    keys, values = bounds[heads : heads + kv_heads], bounds[heads + kv_heads :]
    keys = keys.unflatten(1, (2, -1)).norm(dim=1)
    if attention.k_norm is not None:
        keys = (attention.k_norm.weight.float().abs().amax() * dim**0.5).expand(kv_heads, 1)
    return keys.amax(dim=1) * abs(attention_factor(config)), values.amax(dim=1)


def _power_of_two(bound: Tensor) -> Tensor:
    """The least power of two above bound / 448; 2^-64 for a bound of 0."""
    _, exponent = torch.frexp((bound / FLOAT8_MAX).clamp(min=2.0**-65))
    return torch.ldexp(torch.ones_like(bound), exponent)


@dataclass(frozen=True)
class _RoundedLayout:
    """An attention layout (minimind/ops/attention.py) that first rounds keys and values as in one layer's cache."""

    layout: Any
    dtype: torch.dtype
    scales: tuple[Tensor, Tensor] | tuple[None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (restored(stored(x, self.dtype, s), q.dtype, s) for x, s in zip((k, v), self.scales, strict=True))
        return cast(Tensor, self.layout.attend(q, k, v))


@contextmanager
def rounded_cache(model: Model, dtype: torch.dtype) -> Iterator[None]:
    """A context in which the model's forwards round keys and values as a cache of `dtype` does, and so compute what an
    engine with that kv_dtype computes."""
    check_kv_dtype(dtype, model.device)
    scales = zip(*float8_scales(model), strict=True) if dtype == FLOAT8 else [(None, None)] * len(model.layers)
    with ExitStack() as hooks:
        for layer, layer_scales in zip(cast(Iterable[Block], model.layers), scales, strict=True):

            def rounded(
                module: Attention, inputs: tuple[Any, ...], layer_scales: Any = layer_scales
            ) -> tuple[Any, ...]:
                x, rotation, layout = inputs
                return x, rotation, _RoundedLayout(layout, dtype, layer_scales)

            hooks.callback(layer.self_attn.register_forward_pre_hook(rounded).remove)
        yield


def cache_pages(
    token_bytes: int,
    device: torch.device,
    page_size: int,
    kv_bytes: int | None,
    kv_tokens: int | None,
    useful_tokens: int,
) -> int:
    """The number of pages of a cache with this budget; see `Engine`. token_bytes: of a token's keys and values in all
    layers. useful_tokens: the most tokens that are ever needed. ValueError if the budget is below one page."""
    if page_size < 1:
        raise ValueError(f"page_size={page_size} must be at least 1")
    if kv_bytes is not None and kv_tokens is not None:
        raise ValueError("kv_bytes and kv_tokens both set the cache's size: give one of them")
    if kv_tokens is not None:
        pages, budget = kv_tokens // page_size, f"kv_tokens={kv_tokens}"
    elif kv_bytes is not None:
        pages, budget = kv_bytes // (page_size * token_bytes), f"kv_bytes={kv_bytes}"
    else:
        free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_CACHE_BYTES
        pages, budget = min(-(-useful_tokens // page_size), free // (page_size * token_bytes)), "free memory"
    if pages < 1:
        raise ValueError(
            f"{budget} is less than one page of the cache: {page_size} tokens or {page_size * token_bytes} bytes"
        )
    return pages


@dataclass(frozen=True)
class LayerCache:
    """One layer of the cache: k, v [P, S, G, D]; k_scale, v_scale float32 [G] for float8, else None."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [N, G, D] in rows `slots`, int64 [N]: page * page_size + offset."""
        for cache, new, scale in ((self.k, k, self.k_scale), (self.v, v, self.v_scale)):
            as_bytes(cache).flatten(0, 1).index_copy_(0, slots, as_bytes(stored(new, cache.dtype, scale)))

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rows `slots`, int64 [M], in `dtype`: k, v [M, G, D]."""
        k, v = (
            restored(as_bytes(cache).flatten(0, 1).index_select(0, slots).view(cache.dtype), dtype, scale)
            for cache, scale in ((self.k, self.k_scale), (self.v, self.v_scale))
        )
        return k, v


@dataclass(frozen=True)
class PagedCache:
    """The cache of all layers. k, v: [layers, pages, page_size, key/value heads, head_dim]. k_scale, v_scale: float32
    [layers, key/value heads] for float8, else None."""

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

    def set_scales(self, model: Model) -> None:
        """Set a float8 cache's scales for the model's current weights. This invalidates everything stored."""
        if self.k_scale is not None and self.v_scale is not None:
            for scale, new in zip((self.k_scale, self.v_scale), float8_scales(model), strict=True):
                scale.copy_(new)

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

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages in every layer. source, target: page numbers, int64 [n]."""
        for tensor in (as_bytes(self.k), as_bytes(self.v)):
            tensor[:, target] = tensor[:, source]
