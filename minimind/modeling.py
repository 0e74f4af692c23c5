"""The decoder: Attention, MLP, MoE, Block, Model. Thin modules that call ops.

Weights are held packed (qkv, gate_up, stacked experts) and saved under upstream's names (minimind/weights.py).
Parameters stay in the dtype they were made in, float32 for training; every matrix product runs in the dtype of
its input, which is `Model.compute_dtype`. No autocast: what runs in which precision is written here.

Shapes in comments: B batch, T tokens in a row, C hidden size, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimind import ops
from minimind.config import ModelConfig
from minimind.ops.attention import Layout, SharedPrefix, document_ids, make_layout
from minimind.rope import rope_cos_sin


@dataclass
class ModelOutput:
    """hidden_states [B, T, C] after the last norm; logits [B, T, V] unless they were not asked for; aux_loss, the
    sum of the layers' load-balance losses; tokens_per_expert int64 [layers, E] of a MoE model."""

    hidden_states: Tensor
    logits: Tensor | None
    aux_loss: Tensor
    tokens_per_expert: Tensor | None


class Linear(nn.Linear):
    """A bias-free projection in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of x + delta, x + delta): the residual stream takes up what the last layer made on its way."""
        if delta is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.add_rms_norm(x, delta, self.weight, self.eps)


@dataclass
class Rotation:
    """cos and sin, float32 [P, D / 2], and the row of them that each token takes: int64 [B or 1, T]."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor


class Attention(nn.Module):
    """Grouped-query causal attention with RoPE and optional per-head RMSNorm of q and k."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.groups, self.eps = heads, groups, config.rms_norm_eps
        self.qkv_proj = Linear(config.hidden_size, (heads + 2 * groups) * dim)
        self.o_proj = Linear(heads * dim, config.hidden_size)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation, layout: Layout) -> Tensor:
        norms: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight
        qkv = self.qkv_proj(x)  # [B, T, (H + 2 G) D]
        positions = (rotation.cos, rotation.sin, rotation.position_ids)
        q, k, v = ops.rope(qkv, *positions, self.heads, self.groups, *norms, self.eps)
        return self.o_proj(layout.attend(q, k, v).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward with gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_up_proj(x)))


@dataclass
class RoutingReport:
    """What one MoE layer reports: aux_loss, a scalar; tokens_per_expert int64 [E]."""

    aux_loss: Tensor
    tokens_per_expert: Tensor


class MoE(nn.Module):
    """Softmax router, top-k experts (gates normalised on request), optional shared experts.

    statistics_group: the processes that share a batch; None for one alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.statistics_group: dist.ProcessGroup | None = None
        experts, hidden, inter = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.config = config
        self.router = Linear(hidden, experts)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inter, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inter))
        self.shared_experts = nn.ModuleList(
            MLP(hidden, config.intermediate_size) for _ in range(config.num_shared_experts)
        )

    def forward(
        self, x: Tensor, sequence_ids: Tensor | None = None, sequences: int = 1, mask: Tensor | None = None
    ) -> tuple[Tensor, RoutingReport | None]:
        """x [B, T, C]; sequence_ids int64 [B * T] in 0..sequences-1; mask float32 [B * T], 0 at padding. Both None, as
        in inference: nothing is reported, and nothing computed for it."""
        flat = x.flatten(0, 1)
        router_dtype = torch.promote_types(x.dtype, torch.float32)
        if sequence_ids is not None and self.config.router_aux_loss_level == "batch":
            sequence_ids, sequences = torch.zeros_like(sequence_ids), 1
        routing = ops.route(
            self.router(flat.to(router_dtype)),
            self.config.num_experts_per_tok,
            self.config.norm_topk_prob,
            sequence_ids,
            sequences,
            mask,
        )
        out = ops.moe_experts(flat, self.gate_up_proj, self.down_proj, routing).view_as(x)
        for expert in self.shared_experts:
            out = out + expert(x)
        if sequence_ids is None or mask is None:
            return out, None
        group = self.statistics_group if self.training else None
        aux = load_balance_loss(routing.scores, routing.counts, sequence_ids, mask, self.config, group)
        return out, RoutingReport(aux, routing.offsets.diff())


def load_balance_loss(
    scores: Tensor,
    counts: Tensor,
    sequence_ids: Tensor,
    mask: Tensor,
    config: ModelConfig,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """coef * E * sum_e (share of token copies sent to e) * (mean router probability of e).

    Switch Transformer (arXiv 2101.03961) over the whole batch, or per sequence as in DeepSeek-V2 (arXiv
    2405.04434). Sequences count by their length, so that packing changes nothing; for sequences of one length
    that is the plain mean over sequences. The batch form counts each of the k choices separately.

    scores float32 [N, E]; counts int [S, E], counted token copies of a sequence sent to an expert; sequence_ids
    int64 [N]; mask float32 [N]. The sum over e and sequences is taken token by token, so that no score is added up
    by atomics: the counts are integers, and the rest is one plain reduction.

    group: processes that hold one batch together; the share is then over the tokens of all of them in the batch form.
    The mean stays over this process's tokens: weighted by their number, the processes' losses add up to the batch's.
    """
    tokens = counts.sum().clamp(min=1) / config.num_experts_per_tok
    by_batch = config.router_aux_loss_level == "batch"
    if group is not None and by_batch:
        counts = counts.clone()
        dist.all_reduce(counts, group=group)
    copies = counts.sum(dim=1, keepdim=True)  # top_k for each counted token
    share = counts / copies.clamp(min=1)  # [S, E]
    if by_batch:
        share = share * config.num_experts_per_tok
    balance = (scores * share[sequence_ids]).sum(dim=1) * mask
    return config.router_aux_loss_coef * config.num_experts * balance.sum() / tokens


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.num_experts else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        rotation: Rotation,
        layout: Layout,
        sequences: tuple[Tensor, int, Tensor] | None,
    ) -> tuple[Tensor, Tensor, RoutingReport | None]:
        """x, the residual stream [B, T, C], and delta, what the layer before adds to it -> the same two, and the report
        of a MoE layer on `sequences`, unless they are None."""
        normed, x = self.input_layernorm(x, delta)
        normed, x = self.post_attention_layernorm(x, self.self_attn(normed, rotation, layout))
        if isinstance(self.mlp, MoE):
            return x, *self.mlp(normed, *(sequences or ()))
        return x, self.mlp(normed), None


class Model(nn.Module):
    """A causal language model. `Model(config)` is initialised and ready to train."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # None: the dtype of the parameters
        self.recompute = False  # in the backward, run each block again instead of keeping what is inside it
        self.dropout = False  # an adapter draws random numbers: a block that is run again must draw the same
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.reset_parameters()

    @property
    def head_weight(self) -> Tensor:
        """The output projection [V, C]: the embedding itself when tied. V counts the tokenizer's ids: rows by which the
        vocabulary is padded are left out, here, for all that draw, score or learn."""
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight if self.config.tokenizer_size is None else weight[: self.config.num_tokens]

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, as it is kept."""
        return self.embed_tokens.weight.dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02); what writes into the residual stream is smaller by sqrt(2 layers) (GPT-2)."""
        residual_std = 0.02 / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
                parameter.normal_(0.0, residual_std if residual else 0.02)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        unfolding: SharedPrefix | None = None,
        return_logits: bool = True,
    ) -> ModelOutput:
        """input_ids int64 [B, T]. Two kinds of batches, equal in their losses:

        packed: cu_seqlens int [n + 1], the documents' boundaries in the flattened B * T tokens, row ends among
          them; position_ids [B, T] restart in each document (made from cu_seqlens when absent). attention_mask
          then only says which tokens the router statistics count. unfolding, where documents share beginnings: what
          each reads; cu_seqlens then are the boundaries of the parts, and position_ids must be given.
        padded: attention_mask [B, T], 0 at padding on either side; positions count the unmasked tokens.
        """
        batch, length = input_ids.shape
        device = input_ids.device
        dtype = self.compute_dtype or self.dtype
        fused = ops.get_mode() != "reference"
        layout = make_layout(batch, length, device, dtype, cu_seqlens, attention_mask, fused, unfolding)
        if position_ids is None:
            table = torch.arange(length, device=device)  # a document lies within a row: no position is higher
            position_ids = _positions(batch, length, device, cu_seqlens, attention_mask)
        else:
            table = position_ids.flatten()
            position_ids = torch.arange(table.numel(), device=device).view_as(position_ids)
        rotation = Rotation(*rope_cos_sin(self.config, table), position_ids)
        sequences = None
        if self.config.num_experts:
            sequences = _sequences(batch, length, device, cu_seqlens, attention_mask)

        x = self.embed_tokens(input_ids)
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        reports, delta = [], None
        for layer in self.layers:
            inputs = (x, delta, rotation, layout, sequences)
            if self.recompute and self.training:
                x, delta, report = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=self.dropout)
            else:
                x, delta, report = layer(*inputs)
            if report is not None:
                reports.append(report)
        x, _ = self.norm(x, delta)
        logits = F.linear(x, self.head_weight.to(x.dtype)) if return_logits else None
        aux = x.new_zeros((), dtype=torch.float32)
        counts = None
        if reports:
            aux = torch.stack([report.aux_loss for report in reports]).sum()
            counts = torch.stack([report.tokens_per_expert for report in reports])
        return ModelOutput(x, logits, aux, counts)

    def num_parameters(self, active: bool = False) -> int:
        """Stored parameters; `active`: only those one token passes through."""
        total = sum(p.numel() for p in self.parameters())
        cfg = self.config
        if active and cfg.num_experts:
            expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
            total -= cfg.num_hidden_layers * (cfg.num_experts - cfg.num_experts_per_tok) * expert
        return total

    def flops_per_token(self, context_length: int, training: bool = True) -> int:
        """Floating-point operations of one token in a causal context of `context_length`: matrix products and
        attention scores (half of the square); the backward costs twice the forward (Kaplan et al. 2020)."""
        cfg = self.config
        norms = sum(p.numel() for p in self.parameters() if p.ndim == 1)
        matrices = self.num_parameters(active=True) - norms
        if not cfg.tie_word_embeddings:
            matrices -= cfg.vocab_size * cfg.hidden_size  # the lookup multiplies nothing
        attention = cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim * 2 * context_length
        return (2 * matrices + attention) * (3 if training else 1)

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of key/value cache that one token of one sequence takes."""
        cfg = self.config
        return 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * dtype.itemsize


def _positions(
    batch: int, length: int, device: torch.device, cu_seqlens: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    if cu_seqlens is not None:
        cu = cu_seqlens.to(device)
        start = cu[document_ids(cu, batch * length)]
        return (torch.arange(batch * length, device=device) - start).view(batch, length)
    if attention_mask is not None:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return torch.arange(length, device=device).unsqueeze(0)


def _sequences(
    batch: int, length: int, device: torch.device, cu_seqlens: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, int, Tensor]:
    """(sequence of each token, number of sequences, 1.0 where a token counts) for the router statistics."""
    if cu_seqlens is not None:
        ids, sequences = document_ids(cu_seqlens.to(device), batch * length), cu_seqlens.shape[0] - 1
    else:
        ids, sequences = torch.arange(batch * length, device=device) // length, batch
    if attention_mask is None:
        return ids, sequences, torch.ones(batch * length, device=device)
    return ids, sequences, attention_mask.flatten().float()
