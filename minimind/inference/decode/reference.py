"""The operators of decoding in plain PyTorch: they define the native ones, and run where those are not built.

Shapes: B sequences, N tokens, H query heads, G key/value heads, D head size, P pages of S tokens, V vocabulary. One
layer's cache is key_cache, value_cache [P, S, G, D]. A sequence owns the pages in its row of page_table, in order. A
cache without paging is the special case of one page per sequence: S is then the longest length, and page_table is
[B, 1]. A float8 cache stores x / scale, with one scale per head: k_scale, v_scale float32 [G].

Arithmetic is float32 (float64 for float64 inputs), rounded once at the end. Sampling draws one random number per row
from a counter-based generator, so a token depends only on its request's seed and its index in the request: not on the
batch, the device or other requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimind.inference.decode.kv_cache import as_bytes, stored
from minimind.kernels.rope import rope_ref

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def rope_append_kv_ref(
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
    """Normalise (with QK-norm weights [D]) and rotate new queries and keys; write keys and values into the cache.

    qkv: [N, (H + 2 G) D]. cos, sin: float32 [M, D / 2]. positions: int32 [N], rows of cos and sin, clamped to their
    range. slots: int64 [N], cache row page * S + offset, or -1 for a token that is not written and whose q is zero.
    heads: H. q_weight, k_weight: both or neither. Changes the caches. Returns q [N, H, D] in qkv's dtype. Rotated pairs
    are (i, i + D / 2), as in Hugging Face's Llama.
    """
    kv_heads = key_cache.shape[2]
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    rows = positions.long().clamp(0, cos.shape[0] - 1)
    q, k, v = rope_ref(wide, cos.to(wide.dtype), sin.to(wide.dtype), rows, heads, kv_heads, q_weight, k_weight, eps)
    written = slots >= 0
    page, offset = slots[written] // key_cache.shape[1], slots[written] % key_cache.shape[1]
    for new, cache, scale in ((k, key_cache, k_scale), (v, value_cache, v_scale)):
        as_bytes(cache)[page, offset] = as_bytes(stored(new[written], cache.dtype, scale))
    return (q * written[:, None, None]).to(qkv.dtype)


def decode_attention_ref(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """softmax(scale q K^T) V for one query token of each sequence over its cached tokens.

    q: [B, H, D]. page_table: int32 [B, max_pages]. lengths: int32 [B], tokens to attend to, including the new one; 0
    marks an empty row, whose output is zeros. Table entries and cache rows beyond a length are never read. Returns
    [B, H, D] in q's dtype. The native operator takes another argument, `arrivals`: int32 of at least B * H zeros, in
    which a GPU counts finished splits and which it leaves at zero; without it the operator allocates them. Calls that
    may run at the same time must not share it. A sequence's result does not depend on the rest of the batch.
    """
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        if length > 0:
            k = gather_cache(key_cache, page_table[b], length, k_scale)
            v = gather_cache(value_cache, page_table[b], length, v_scale)
            out[b] = _attend(q[b], k, v, scale).to(q.dtype)
    return out


def gather_cache(cache: Tensor, page_row: Tensor, length: int, scale: Tensor | None = None) -> Tensor:
    """The first `length` rows of the sequence with the pages `page_row`: [length, G, D]; float8 becomes float32."""
    pages = cache[page_row[: -(-length // cache.shape[1])].long()]
    rows = pages.flatten(0, 1)[:length]
    return rows if scale is None else rows.float() * scale[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [H, D], k and v [T, G, D] -> [H, D] in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(0, (k.shape[1], -1))  # [G, H / G, D]
    scores = torch.einsum("ghd,tgd->ght", grouped, k.to(wide)) * scale
    return torch.einsum("ght,tgd->ghd", scores.softmax(dim=-1), v.to(wide)).flatten(0, 1)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter int64 [..., 4], key int64 [..., 2], 32-bit words -> int64 [..., 4], 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # int64 wraps around at 64 bits, which keeps both halves of a 32 x 32 bit product correct
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> 32 & _MASK) ^ c1 ^ k0,
            second & _MASK,
            (first >> 32 & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform(seeds: Tensor, offsets: Tensor) -> Tensor:
    """A number in [0, 1) of 24 bits, exact in float32, for each (seed, offset): int64 [B] twice -> float32 [B].

    The key is the seed (low word first), the counter (offset low, offset high, 0, 0). The number is the upper 24 bits
    of the first word.
    """

    def words(x: Tensor) -> tuple[Tensor, Tensor]:
        return x & _MASK, x >> 32 & _MASK

    zero = torch.zeros_like(offsets)
    bits = philox(torch.stack((*words(offsets), zero, zero), -1), torch.stack(words(seeds), -1))[..., 0]
    return (bits >> 8).float() * 2.0**-24


def sample_ref(
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

    logits: float32 [B, V], not changed. temperature: float32 [B]; 0 takes the likeliest token, the first of equals.
    top_k: int32 [B]; 0 is off. top_p, min_p: float32 [B]; 1 and 0 are off. repetition_penalty, presence_penalty:
    float32 [B]; 1 and 0 are off. history: int32 [B, V], how often each token occurred. seeds, offsets: int64 [B]; the
    same seed and offset (index within the request) give the same token.

    Returns tokens int64 [B] and log_probs float32 [B], of the penalised and scaled, but not truncated distribution.
    """
    logits = penalised(logits, repetition_penalty, presence_penalty, history)
    greedy = temperature <= 0
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    keep = kept_tokens(scaled, top_k, top_p, min_p)
    mass = torch.where(keep, (scaled - scaled.amax(-1, keepdim=True)).double().exp(), 0.0)
    cumulative = mass.cumsum(-1)
    threshold = uniform(seeds, offsets).double() * cumulative[:, -1]
    sampled = torch.where(keep & (cumulative > threshold[:, None]), 1, 0).argmax(-1)  # the first such token
    tokens = torch.where(greedy, logits.argmax(-1), sampled)
    log_probs = scaled.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    return tokens, log_probs


def penalised(logits: Tensor, repetition: Tensor, presence: Tensor, history: Tensor) -> Tensor:
    """Logits with the penalties of tokens that occurred: positive logits are divided by `repetition`, others multiplied
    by it (Keskar et al. 2019, arXiv 1909.05858); then `presence` is subtracted."""
    factor = repetition.to(logits.dtype)[:, None]
    repeated = torch.where(logits > 0, logits / factor, logits * factor) - presence.to(logits.dtype)[:, None]
    return torch.where(history > 0, repeated, logits)


def kept_tokens(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The tokens that top-k, then top-p, then min-p keep: bool [B, V]. Equal logits are kept or removed together.

    top_k: keeps logits not below the k-th largest; 0 keeps all. top_p: renormalises the probabilities of these and
    keeps the smallest set that reaches top_p, that is, tokens whose likelier ones together have less (Holtzman et al.
    2020, arXiv 1904.09751); 1 keeps all. min_p: keeps at least min_p times the largest probability (Nguyen et al. 2025,
    arXiv 2407.01082).
    """
    vocab = logits.shape[-1]
    ordered = logits.sort(dim=-1, descending=True).values
    k = torch.where(top_k <= 0, vocab, top_k.clamp(max=vocab)).long()
    keep = logits >= ordered.gather(-1, k[:, None] - 1)

    mass = (ordered - ordered[:, :1]).double().exp()
    mass = torch.where(ordered >= ordered.gather(-1, k[:, None] - 1), mass, 0.0)
    before = mass.cumsum(-1) - mass
    inside = (before < top_p.double()[:, None] * mass.sum(-1, keepdim=True)) | (top_p >= 1)[:, None]
    inside[:, 0] = True
    least = torch.where(inside, ordered, float("inf")).amin(-1, keepdim=True)
    keep &= logits >= least
    return keep & ((logits - ordered[:, :1]).double().exp() >= min_p.double()[:, None])
