"""Sampling in plain PyTorch: what the native operator is held to, and the definition of every option.

One random number is drawn for each row from a counter-based generator, so a token depends on its request's seed and its
index in the request and on nothing else: not on the batch, the device, or what other requests do.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter int64 [..., 4], key int64 [..., 2], 32-bit words -> int64 [..., 4], 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # int64 wraps around at 64 bits, which leaves both halves of a 32 x 32 bit product right
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

    The key is the seed (low word first), the counter (offset low, offset high, 0, 0); the first word's upper 24 bits
    are taken.
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
    """See `decode_ops.sample`."""
    logits = penalised(logits, repetition_penalty, presence_penalty, history)
    greedy = temperature <= 0
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    keep = kept(scaled, top_k, top_p, min_p)
    mass = torch.where(keep, (scaled - scaled.amax(-1, keepdim=True)).double().exp(), 0.0)
    cumulative = mass.cumsum(-1)
    threshold = uniform(seeds, offsets).double() * cumulative[:, -1]
    drawn = torch.where(keep & (cumulative > threshold[:, None]), 1, 0).argmax(-1)  # the first one
    tokens = torch.where(greedy, logits.argmax(-1), drawn)
    log_probs = scaled.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    return tokens, log_probs


def penalised(logits: Tensor, repetition: Tensor, presence: Tensor, history: Tensor) -> Tensor:
    """A token that occurred: a positive logit is divided by `repetition`, another multiplied by it (Keskar et al. 2019,
    arXiv 1909.05858); then `presence` is subtracted."""
    factor = repetition.to(logits.dtype)[:, None]
    repeated = torch.where(logits > 0, logits / factor, logits * factor) - presence.to(logits.dtype)[:, None]
    return torch.where(history > 0, repeated, logits)


def kept(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """bool [B, V]: the tokens that top-k, then top-p, then min-p leave. Equal logits stay or go together.

    top_k: logits not below the k-th largest; 0 for all. top_p: of the probabilities of those, renormalised, the least
    set that reaches top_p: tokens whose betters together have less (Holtzman et al. 2020, arXiv 1904.09751); 1: all.
    min_p: at least min_p times the largest probability (Nguyen et al. 2025, arXiv 2407.01082).
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
