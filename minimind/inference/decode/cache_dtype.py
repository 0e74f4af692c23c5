"""What keys and values are stored in: the model's own dtype or another, float8 (e4m3, 3 bits of mantissa) among them.

A float8 cache holds x / scale, with one scale for each layer and key/value head. The scales follow from the weights, so
that nothing has to be calibrated and nothing saturates. An RMSNorm's output is at most sqrt(C) long before its weights
g, so a row w of the projection makes of it, by Cauchy and Schwarz,

    |v_i| <= |w_i * g| sqrt(C)                         a value
    |(k_i, k_j)| <= |(w_i * g, w_j * g)| sqrt(C)       a pair of a key, which rotation only turns
    |(k_i, k_j)| <= max(|u_i|, |u_j|) sqrt(D)          the same behind a QK-norm with weights u

and the scale is the least power of two that brings the largest of them below 448, float8's largest number. As a rule
numbers are some sqrt(C) below that bound: with C = 512 most are stored as 7 to 20, far from where float8 gets coarser,
below 2^-6. With a power of two, what is read back is exact in bfloat16 as in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from minimind.config import ModelConfig
from minimind.inference.decode.checks import CACHES
from minimind.modeling import Attention, Block, Model
from minimind.rope import attention_factor

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max

KVDTypeName = Literal["auto", "fp32", "bf16", "fp16", "fp8"]


def check_kv_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """ValueError, one line, for what no cache on `device` can hold."""
    if dtype not in CACHES:
        names = ", ".join(map(str, CACHES))
        raise ValueError(f"kv_dtype={dtype} must be one of {names}")
    if dtype == FLOAT8 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"kv_dtype={dtype} needs a CPU or a CUDA GPU, not {device.type}: take torch.bfloat16")


def stored(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """x [..., G, D] as a cache of `dtype` holds it; scale float32 [G] of float8, which saturates."""
    if scale is not None:
        x = (x / scale[:, None]).clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return x.to(dtype)


def restored(rows: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """The inverse of `stored`, but for what rounding took: rows [..., G, D] in `dtype`."""
    return rows.to(dtype) if scale is None else (rows.float() * scale[:, None]).to(dtype)


def as_bytes(rows: Tensor) -> Tensor:
    """A view that indexing knows: PyTorch's does not take float8."""
    return rows.view(torch.uint8) if rows.dtype == FLOAT8 else rows


@torch.no_grad()
def float8_scales(model: Model) -> tuple[Tensor, Tensor]:
    """k_scale and v_scale of the model's weights as they are: float32 [L, G]."""
    bounds = [largest_possible(layer, model.config) for layer in cast(Iterable[Block], model.layers)]
    k, v = (torch.stack(of_layers) for of_layers in zip(*bounds, strict=True))
    return _power_of_two(k), _power_of_two(v)


def largest_possible(layer: Block, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """What no number of the layer's keys and of its values can exceed, for each head: float32 [G] twice."""
    attention, dim = layer.self_attn, config.head_dim
    heads, groups = attention.heads, attention.kv_heads
    rows = attention.qkv_proj.weight.float() * layer.input_layernorm.weight.float()  # [(H + 2 G) D, C]
    reach = rows.norm(dim=1).view(heads + 2 * groups, dim) * rows.shape[1] ** 0.5
    keys, values = reach[heads : heads + groups], reach[heads + groups :]
    keys = keys.unflatten(1, (2, -1)).norm(dim=1)
    if attention.k_norm is not None:
        keys = (attention.k_norm.weight.float().abs().amax() * dim**0.5).expand(groups, 1)
    return keys.amax(dim=1) * abs(attention_factor(config)), values.amax(dim=1)


def _power_of_two(bound: Tensor) -> Tensor:
    """The least one above bound / 448; of a bound of nothing, 2^-64."""
    _, exponent = torch.frexp((bound / FLOAT8_MAX).clamp(min=2.0**-65))
    return torch.ldexp(torch.ones_like(bound), exponent)


@dataclass(frozen=True)
class _RoundedLayout:
    """An attention layout (attention.py) whose keys and values are rounded first, as one layer's cache would."""

    layout: Any
    dtype: torch.dtype
    scales: tuple[Tensor, Tensor] | tuple[None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (restored(stored(x, self.dtype, s), q.dtype, s) for x, s in zip((k, v), self.scales, strict=True))
        return cast(Tensor, self.layout.attend(q, k, v))


@contextmanager
def rounded_cache(model: Model, dtype: torch.dtype) -> Iterator[None]:
    """Within, whole forwards of `model` attend to keys and values as a cache of `dtype` gives them back: what an engine
    with that kv_dtype computes, without a cache."""
    check_kv_dtype(dtype, model.device)
    scales = zip(*float8_scales(model), strict=True) if dtype == FLOAT8 else [(None, None)] * len(model.layers)
    with ExitStack() as hooks:
        for layer, of_layer in zip(cast(Iterable[Block], model.layers), scales, strict=True):

            def rounded(module: Attention, inputs: tuple[Any, ...], of_layer: Any = of_layer) -> tuple[Any, ...]:
                x, rotation, layout = inputs
                return x, rotation, _RoundedLayout(layout, dtype, of_layer)

            hooks.callback(layer.self_attn.register_forward_pre_hook(rounded).remove)
        yield
