"""The operators of decoding with a key/value cache, behind ONE switch:

    reference   plain PyTorch (decode_reference.py, sampling_reference.py)
    native      csrc/: C++ on a CPU, CUDA on a GPU; where that is not built, an error
    auto        native where it is built for the tensor's device, else reference; `describe` says which and why

Shapes: B sequences, N tokens, H query heads, G key/value heads, D head size, P pages of S tokens, V vocabulary. The
cache of one layer is described in decode_reference.py: key_cache, value_cache [P, S, G, D] bfloat16, float16,
float32 or float8_e4m3fn, dense within a page. A float8 cache holds x / scale and needs k_scale, v_scale: float32 [G].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from minimind.inference.decode.checks import check_attention, check_rope, check_sample
from minimind.inference.decode.reference import decode_attention_ref, rope_append_kv_ref
from minimind.inference.decode.sampling_reference import sample_ref
from minimind.ops import native

Backend = Literal["auto", "reference", "native"]
BACKENDS = ("auto", "reference", "native")
_backend: Backend = "auto"


def set_backend(backend: Backend) -> None:
    """Choose for the whole process. ValueError for an unknown name, or for 'native' where nothing is built."""
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"unknown decoding backend {backend!r}; choose 'auto', 'reference' or 'native'")
    if backend == "native":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        missing = native.why_not(device)
        if missing is not None:
            raise ValueError(f"decoding backend 'native' cannot be met: {missing}")
    _backend = backend


def get_backend() -> Backend:
    return _backend


@contextlib.contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Switch the implementation inside a `with` block."""
    previous = _backend
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(previous)


def describe(device: torch.device) -> str:
    """What the switch resolves to on `device`, and why: one line for the head of a run."""
    if _backend == "reference":
        return "decoding: reference (plain PyTorch)"
    missing = native.why_not(device)
    if missing is None:
        return f"decoding: native ({native.build_info().summary(device)})"
    return f"decoding: reference (plain PyTorch): {missing}"


def is_native(device: torch.device) -> bool:
    """Whether operators on `device` run natively. RuntimeError where the switch forces what is not there."""
    if _backend == "reference":
        return False
    missing = native.why_not(device)
    if missing is not None and _backend == "native":
        raise RuntimeError(f"decoding backend 'native' cannot be met: {missing}")
    return missing is None


def rope_append_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Norm (with QK-norm weights [D]) and rotate the new queries and keys; write keys and values into the cache.

    qkv [N, (H + 2 G) D]; cos, sin float32 [M, D / 2]; positions int32 [N], rows of them (one outside takes the first or
    last row); slots int64 [N], cache row page * S + offset, or -1: not written, and the token's q is zero. The caches
    are changed. Returns q [N, H, D] in qkv's dtype. Pairs are (i, i + D / 2), as in HF Llama.
    """
    args = (qkv, cos, sin, positions, slots, key_cache, value_cache, heads)
    options = (q_weight, k_weight, float(eps), k_scale, v_scale)
    check_rope(*args, *options)
    if is_native(qkv.device):
        return torch.ops.minimind.rope_append_kv(*args, *options)
    return rope_append_kv_ref(*args, *options)


def decode_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """softmax(scale q K^T) V of one query token of each sequence over its cached tokens.

    q [B, H, D]; block_table int32 [B, max_pages]; lengths int32 [B], tokens to attend to, the new one included; 0: an
    empty slot, whose output is zeros. Table entries and cache rows beyond a length are never read. arrivals int32, at
    least B * H, all zero before and after: a GPU counts there which splits are done; None: the operator makes it, in a
    launch of its own. Two calls that may run at once must not share it. Returns [B, H, D] in q's dtype. A sequence's
    result does not depend on the others in the batch.
    """
    args = (q, key_cache, value_cache, block_table, lengths, float(scale), k_scale, v_scale)
    check_attention(*args)
    if is_native(q.device):
        return torch.ops.minimind.decode_attention(*args, arrivals)
    return decode_attention_ref(*args)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    history: Tensor,
    seeds: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """The next token of each sequence: penalties, temperature, top-k, top-p, min-p, in the order of transformers.

    logits float32 [B, V], left as they are; temperature float32 [B], 0: the likeliest token, the first of equals; top_k
    int32 [B], 0: off; top_p, 1: off; min_p, 0: off; repetition_penalty, 1: off; presence_penalty, 0: off: float32 [B];
    history int32 [B, V], how often each token occurred; seeds, offsets int64 [B]: the same seed and index within the
    request give the same draw. sampling_reference.py defines the rest.

    Returns tokens int64 [B] and log_probs float32 [B]: log softmax of the penalised, scaled, but not truncated logits.
    """
    args = (logits, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, history, seeds, offsets)
    check_sample(*args)
    if is_native(logits.device):
        return torch.ops.minimind.sample(*args)
    return sample_ref(*args)
