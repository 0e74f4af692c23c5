"""Routing of a mixture of experts: softmax over the experts, top-k, and sorting by expert.

    scores[t, e] = exp(logits[t, e]) / sum_j exp(logits[t, j])
    gates[t, k]  = the k-th largest score of token t, normalised: divided by (S_t + 1e-20), S_t the sum of the K
    dscores[t, id_k] += (dgates_k - sum_j dgates_j gates_j) / (S_t + 1e-20)     (not normalised: += dgates_k)
    dlogits      = scores * (dscores - sum_e dscores scores)

logits [N, E]. A copy is one choice of one token; it has number t * K + k. `order` lists the copies sorted by expert,
stably, and `offsets` says where each expert begins, so nothing is padded (as in ScatterMoE, arXiv 2403.08245). Both
come from a counting sort in two kernels. The first counts each expert's copies in each block of tokens; a prefix sum
over that small table (expert by expert, block by block) gives the destination of each block's copies; the second kernel
writes them. A token never chooses an expert twice, so a copy's rank within its block is the number of earlier tokens
that chose the same expert.

All arithmetic is float32. The backward needs only scores and expert_ids, which are outputs anyway.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minimind.kernels.triton_support import (
    cdiv,
    check,
    check_tensors,
    config_for,
    jit,
    kernel_op,
    launch,
    next_power_of_2,
    rows_of,
    tl,
)

MAX_EXPERTS = 256
MAX_TOP_K = 16


@dataclass(frozen=True)
class RoutingConfig:
    tokens: int  # per tile, at most
    elements: int  # tokens times experts per tile
    num_warps: int


CONFIGS = {80: RoutingConfig(tokens=128, elements=1024, num_warps=4)}


class Routing(NamedTuple):
    """The result of routing N tokens to K of E experts.

    gates float32 [N, K], largest first, and scores float32 [N, E] are differentiable. expert_ids int32 [N, K]. order
    int32 [N * K]: the copies (token * K + choice), stably sorted by expert. inverse int32 [N * K]: inverse[order[i]] =
    i. offsets int32 [E + 1]: expert e has order[offsets[e] : offsets[e + 1]]. counts int32 [sequences, E]: the unmasked
    copies of each sequence.
    """

    gates: Tensor
    expert_ids: Tensor
    scores: Tensor
    order: Tensor
    inverse: Tensor
    offsets: Tensor
    counts: Tensor


def route_ref(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(gates, expert_ids int64, scores). It sorts stably, since the order of ties in topk is undefined."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    gates, expert_ids = (t[:, :top_k] for t in scores.sort(dim=-1, descending=True, stable=True))
    if normalize:
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
    return gates, expert_ids, scores


@jit(do_not_specialize=["n_tokens", "n_blocks", "n_sequences"])
def _route_choose_kernel(
    p_logits, p_sequence_ids, p_mask, p_gates, p_expert_ids, p_scores, p_histogram, p_counted, p_counts,
    n_tokens, n_blocks, n_sequences, logits_stride,
    E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    o_token = i_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.arange(0, BLOCK_E)
    o_k = tl.arange(0, BLOCK_K)[None, :]
    m_token = o_token < n_tokens
    m_e = (o_e < E)[None, :]
    mask = m_token[:, None] & m_e
    p_row = p_logits + o_token[:, None] * logits_stride
    b_logits = tl.load(p_row + o_e[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_E]
    b_logits = tl.where(m_e, b_logits, float("-inf"))
    b_exp = tl.exp(b_logits - tl.max(b_logits, axis=1)[:, None])
    b_scores = b_exp / tl.sum(b_exp, axis=1)[:, None]
    tl.store(p_scores + o_token[:, None] * E + o_e[None, :], b_scores, mask=mask)

    # NaN counts as 0, so each round finds an existing expert that was not chosen yet
    b_left = tl.where(m_e, tl.where(b_scores == b_scores, b_scores, 0.0), -1.0)
    b_chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
    b_gates = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    b_ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for k in tl.static_range(K):
        b_id = tl.argmax(b_left, axis=1)  # of equal scores, the lowest expert
        b_hit = o_e[None, :] == b_id[:, None]
        b_gates = tl.where(o_k == k, tl.sum(tl.where(b_hit, b_scores, 0.0), axis=1)[:, None], b_gates)
        b_ids = tl.where(o_k == k, b_id[:, None], b_ids)
        b_left = tl.where(b_hit, -1.0, b_left)
        b_chosen = b_chosen | b_hit
    if NORMALIZE:
        b_gates = b_gates / (tl.sum(b_gates, axis=1)[:, None] + 1e-20)
    o_copy = o_token[:, None] * K + o_k
    m_copy = m_token[:, None] & (o_k < K)
    tl.store(p_gates + o_copy, b_gates, mask=m_copy)
    tl.store(p_expert_ids + o_copy, b_ids, mask=m_copy)

    b_chosen = b_chosen & m_token[:, None]
    o_table = o_e.to(tl.int64) * n_blocks + i_block
    tl.store(p_histogram + o_table, tl.sum(b_chosen.to(tl.int32), axis=0), mask=o_e < E)
    if p_mask is not None:
        b_chosen = b_chosen & (tl.load(p_mask + o_token, mask=m_token, other=0) != 0)[:, None]  # [BLOCK_T]
    if p_counted is not None:
        tl.store(p_counted + o_table, tl.sum(b_chosen.to(tl.int32), axis=0), mask=o_e < E)
    if p_counts is not None:
        b_sequence = tl.load(p_sequence_ids + o_token, mask=m_token, other=0).to(tl.int64)  # [BLOCK_T]
        m_count = b_chosen & ((b_sequence >= 0) & (b_sequence < n_sequences))[:, None]
        b_one = tl.full([BLOCK_T, BLOCK_E], 1, tl.int32)
        tl.atomic_add(p_counts + b_sequence[:, None] * E + o_e[None, :], b_one, mask=m_count, sem="relaxed")


@jit(do_not_specialize=["n_tokens", "n_blocks"])
def _route_place_kernel(
    p_expert_ids, p_histogram, p_ends, p_order, p_inverse, p_offsets, n_tokens, n_blocks,
    E: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    o_token = i_block * BLOCK_T + tl.arange(0, BLOCK_T)  # there are fewer than 2^31 copies
    o_e = tl.arange(0, BLOCK_E)
    m_token = o_token < n_tokens
    b_chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for k in tl.static_range(K):
        b_id = tl.load(p_expert_ids + o_token * K + k, mask=m_token, other=-1)  # [BLOCK_T]
        b_chosen += (b_id[:, None] == o_e[None, :]).to(tl.int32)
    o_table = o_e.to(tl.int64) * n_blocks + i_block
    b_end = tl.load(p_ends + o_table, mask=o_e < E, other=0)  # [BLOCK_E]
    b_first = b_end - tl.load(p_histogram + o_table, mask=o_e < E, other=0)  # [BLOCK_E]
    b_place = b_first[None, :] + tl.cumsum(b_chosen, axis=0) - b_chosen
    for k in tl.static_range(K):
        o_copy = o_token * K + k
        b_id = tl.load(p_expert_ids + o_copy, mask=m_token, other=-1)  # [BLOCK_T]
        b_row = tl.sum(tl.where(b_id[:, None] == o_e[None, :], b_place, 0), axis=1)
        tl.store(p_inverse + o_copy, b_row, mask=m_token)
        tl.store(p_order + b_row, o_copy, mask=m_token)
    if i_block == 0:
        tl.store(p_offsets + o_e, b_first, mask=o_e < E)
        tl.store(p_offsets + E, n_tokens * K)


@jit(do_not_specialize=["n_tokens"])
def _route_backward_kernel(
    p_dgates, p_dscores, p_scores, p_expert_ids, p_dlogits, n_tokens,
    E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    o_token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.arange(0, BLOCK_E)[None, :]
    m_token = o_token < n_tokens
    mask = m_token[:, None] & (o_e < E)
    o_tile = o_token[:, None] * E + o_e
    b_scores = tl.load(p_scores + o_tile, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_E]
    b_dscores = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if p_dgates is not None:
        b_chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
        for k in tl.static_range(K):
            b_id = tl.load(p_expert_ids + o_token * K + k, mask=m_token, other=-1)  # [BLOCK_T]
            b_dgate = tl.load(p_dgates + o_token * K + k, mask=m_token, other=0.0)  # [BLOCK_T]
            b_hit = o_e == b_id[:, None]
            b_dscores = tl.where(b_hit, b_dgate[:, None], b_dscores)
            b_chosen = b_chosen | b_hit
        if NORMALIZE:
            b_sum = tl.sum(tl.where(b_chosen, b_scores, 0.0), axis=1)[:, None] + 1e-20
            b_mean = tl.sum(b_dscores * (b_scores / b_sum), axis=1)[:, None]  # only the chosen are not 0
            b_dscores = tl.where(b_chosen, (b_dscores - b_mean) / b_sum, 0.0)
    if p_dscores is not None:
        b_dscores += tl.load(p_dscores + o_tile, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_E]
    b_dlogits = b_scores * (b_dscores - tl.sum(b_scores * b_dscores, axis=1)[:, None])
    tl.store(p_dlogits + o_tile, b_dlogits, mask=mask)


def _tile(experts: int, device: torch.device) -> tuple[int, int, int]:
    """(BLOCK_T, BLOCK_E, num_warps)."""
    config = config_for(CONFIGS, device)
    block_e = next_power_of_2(experts)
    return min(config.tokens, config.elements // block_e), block_e, config.num_warps


@kernel_op("moe_route")
def _route(
    logits: Tensor, top_k: int, normalize: bool, sequence_ids: Tensor | None, sequences: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    logits = rows_of(logits)
    block_t, block_e, warps = _tile(experts, logits.device)
    blocks = max(1, cdiv(tokens, block_t))  # one block even without tokens, to write the offsets

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    gates, scores = empty(tokens, top_k, dtype=torch.float32), empty(tokens, experts, dtype=torch.float32)
    expert_ids, histogram = empty(tokens, top_k), empty(experts, blocks)
    by_sequence = sequences != 1
    counts = torch.zeros(sequences, experts, dtype=torch.int32, device=logits.device) if by_sequence else None
    counted = empty(experts, blocks) if mask is not None and not by_sequence else None
    launch(
        _route_choose_kernel, (blocks,),
        logits, None if sequence_ids is None else sequence_ids.contiguous(),
        None if mask is None else mask.contiguous(), gates, expert_ids, scores, histogram, counted, counts,
        tokens, blocks, sequences, logits.stride(0),
        E=experts, K=top_k, NORMALIZE=normalize, BLOCK_T=block_t, BLOCK_E=block_e,
        BLOCK_K=next_power_of_2(top_k), num_warps=warps,
    )  # fmt: skip
    if counts is None:
        counts = (histogram if counted is None else counted).sum(dim=1, dtype=torch.int32).unsqueeze(0)
    ends = histogram.flatten().cumsum(dim=0, dtype=torch.int32)
    order, inverse, offsets = empty(tokens * top_k), empty(tokens * top_k), empty(experts + 1)
    launch(
        _route_place_kernel, (blocks,), expert_ids, histogram, ends, order, inverse, offsets, tokens, blocks,
        E=experts, K=top_k, BLOCK_T=block_t, BLOCK_E=block_e, num_warps=warps,
    )  # fmt: skip
    return gates, expert_ids, scores, order, inverse, offsets, counts


@kernel_op("moe_route_backward")
def _route_backward(
    dgates: Tensor | None,
    dscores: Tensor | None,
    scores: Tensor,
    expert_ids: Tensor,
    normalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    tokens, experts = scores.shape
    dlogits = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    block_t, block_e, warps = _tile(experts, scores.device)
    launch(
        _route_backward_kernel, (cdiv(tokens, block_t),),
        None if dgates is None else dgates.contiguous(), None if dscores is None else dscores.contiguous(),
        scores, expert_ids, dlogits, tokens,
        E=experts, K=expert_ids.shape[1], NORMALIZE=normalize, BLOCK_T=block_t, BLOCK_E=block_e, num_warps=warps,
    )  # fmt: skip
    return dlogits


@_route.register_fake
def _(logits, top_k, normalize, sequence_ids, sequences, mask):
    tokens, experts = logits.shape

    def empty(*shape, dtype=torch.int32):
        return logits.new_empty(shape, dtype=dtype)

    return (
        empty(tokens, top_k, dtype=torch.float32),
        empty(tokens, top_k),
        empty(tokens, experts, dtype=torch.float32),
        empty(tokens * top_k),
        empty(tokens * top_k),
        empty(experts + 1),
        empty(sequences, experts),
    )


@_route_backward.register_fake
def _(dgates, dscores, scores, expert_ids, normalize, dtype):
    return scores.new_empty(scores.shape, dtype=dtype)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.logits_dtype, ctx.normalize = inputs[0].dtype, inputs[2]
    ctx.save_for_backward(output[2], output[1])


def _backward(ctx, dgates, _dexpert_ids, dscores, *_):
    scores, expert_ids = ctx.saved_tensors
    dlogits = None
    if dgates is not None or dscores is not None:
        dlogits = _route_backward(dgates, dscores, scores, expert_ids, ctx.normalize, ctx.logits_dtype)
    return dlogits, None, None, None, None, None


_route.register_autograd(_backward, setup_context=_save)


def _check(logits: Tensor, top_k: int, sequence_ids: Tensor | None, sequences: int, mask: Tensor | None) -> None:
    check_tensors(logits=logits)
    check(logits.ndim == 2, "logits has {} dimensions; it must be [tokens, experts]", logits.ndim)
    tokens, experts = logits.shape
    message = "logits is for {} experts; this kernel takes 1 to {}"
    check(1 <= experts <= MAX_EXPERTS, message, experts, MAX_EXPERTS)
    most = min(experts, MAX_TOP_K)
    message = "top_k is {}; with {} experts a token can choose 1 to {}"
    check(1 <= top_k <= most, message, top_k, experts, most)
    check(tokens * top_k < 2**31, "logits has {} tokens; tokens * top_k must stay below 2^31", tokens)
    check(sequences >= 1, "sequences is {}; it must be 1 or more", sequences)
    message = "sequences is {}; give sequence_ids as well, or leave both out"
    check(sequences == 1 or sequence_ids is not None, message, sequences)
    for name, tensor in (("sequence_ids", sequence_ids), ("mask", mask)):
        if tensor is not None:
            message = "{} is {}, and logits needs [{}]"
            check(tensor.shape == (tokens,), message, name, list(tensor.shape), tokens)
            message = "{} is on {} and logits on {}; move them to one device"
            check(tensor.device == logits.device, message, name, tensor.device, logits.device)
    if sequence_ids is not None:
        dtype = sequence_ids.dtype
        check(dtype in (torch.int32, torch.int64), "sequence_ids is {}; give int32 or int64", dtype)


def route(
    logits: Tensor,
    top_k: int,
    normalize: bool,
    sequence_ids: Tensor | None = None,
    sequences: int = 1,
    mask: Tensor | None = None,
) -> Routing:
    """Choose each token's top_k experts by softmax(logits), and sort the copies by expert.

    logits [N, E]: float32, or bfloat16 or float16 computed in float32; 1 <= E <= 256, 1 <= top_k <= min(E, 16). Ties go
    to the lower expert. normalize: make each token's gates sum to 1. sequence_ids and mask affect only counts:
    sequence_ids int [N] in 0..sequences-1 (None for one sequence; tokens outside are not counted); mask [N] of any
    dtype, 0 for tokens that are routed but not counted.

    A row with a NaN, or an infinite logit that causes one, has NaN gates, but its expert ids are still distinct and
    within 0..E-1. ValueError for other input.
    """
    _check(logits, top_k, sequence_ids, sequences, mask)
    return Routing(*_route(logits, top_k, normalize, sequence_ids, sequences, mask))
