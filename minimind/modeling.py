"""The decoder-only transformer: Attention, MLP, MoE, Block and Model, thin modules that call ops.

Weights are packed (qkv, gate_up, stacked experts) in memory and saved under upstream's names (minimind/weights.py).
Parameters keep the dtype they were created in, float32 for training. Every matrix product runs in the dtype of its
input, which is `Model.compute_dtype`; there is no autocast.

Shapes: B batch, T tokens in a row, C hidden size, H query heads, G key/value heads, D head_dim, V vocabulary.
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

# Ends of the names of projections into the residual stream.
OUTPUTS = ("o_proj.weight", "down_proj.weight", "down_proj")


@dataclass
class ModelOutput:
    """hidden_states: [B, T, C] after the last norm. logits: [B, T, V], or None if not requested. aux_loss: the sum of
    the layers' load-balance losses. tokens_per_expert: int64 [layers, E], or None for a dense model."""

    hidden_states: Tensor
    logits: Tensor | None
    aux_loss: Tensor
    tokens_per_expert: Tensor | None


class Linear(nn.Linear):
    """A bias-free projection in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """An embedding. On the meta device nothing is drawn: PyTorch would import its compiler for that, in a second."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, optionally fused with the residual addition before it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of x + delta, x + delta), where x is the residual stream and delta the last layer's output, if any."""
        if delta is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.add_rms_norm(x, delta, self.weight, self.eps)


@dataclass
class Rotation:
    """cos and sin: float32 [P, D / 2]. position_ids: int64 [B or 1, T], the row of the tables that each token uses."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor


class Attention(nn.Module):
    """Grouped-query causal attention with RoPE and optional per-head RMSNorm of q and k."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.kv_heads, self.eps = heads, kv_heads, config.rms_norm_eps
        self.qkv_proj = Linear(config.hidden_size, (heads + 2 * kv_heads) * dim)
        self.o_proj = Linear(heads * dim, config.hidden_size)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation, layout: Layout) -> Tensor:
        norms: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight
        qkv = self.qkv_proj(x)  # [B, T, (H + 2 G) D]
        positions = (rotation.cos, rotation.sin, rotation.position_ids)
        q, k, v = ops.rope(qkv, *positions, self.heads, self.kv_heads, *norms, self.eps)
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
    """Router statistics of one MoE layer: aux_loss, a scalar, and tokens_per_expert, int64 [E]."""

    aux_loss: Tensor
    tokens_per_expert: Tensor


class MoE(nn.Module):
    """Softmax router, top-k experts (with normalised gates if the config says so) and optional shared experts.

    statistics_group: the processes that share a batch; None for a single process.
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
        """x [B, T, C]; sequence_ids int64 [B * T] in 0..sequences-1; mask float32 [B * T], 0 at padding -> (output
        [B, T, C], report). In inference both are None, and no statistics are computed."""
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

    The sum is over the whole batch as in the Switch Transformer (arXiv 2101.03961), or per sequence as in DeepSeek-V2
    (arXiv 2405.04434). Sequences are weighted by their length, so packing does not change the loss. The batch form
    counts each of the k choices separately.

    scores float32 [N, E]; counts int [S, E]: token copies of each sequence sent to each expert; sequence_ids int64 [N];
    mask float32 [N]. The sum runs token by token, so no score is accumulated by atomics: counts are integers, and the
    rest is one plain reduction.

    group: processes that share the batch. In the batch form the shares then cover the tokens of all of them, while the
    mean is over this process's tokens; weighted by token counts, the processes' losses add up to the batch's.
    """
    tokens = counts.sum().clamp(min=1) / config.num_experts_per_tok
    by_batch = config.router_aux_loss_level == "batch"
    if group is not None and by_batch:
        counts = counts.clone()
        dist.all_reduce(counts, group=group)
    copies = counts.sum(dim=1, keepdim=True)  # top_k per counted token
    share = counts / copies.clamp(min=1)  # [S, E]
    if by_batch:
        share = share * config.num_experts_per_tok
    balance = (scores * share[sequence_ids]).sum(dim=1) * mask
    return config.router_aux_loss_coef * config.num_experts * balance.sum() / tokens


class Block(nn.Module):
    """One pre-norm transformer layer: attention, then MLP or MoE."""

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
        """x [B, T, C]: the residual stream; delta: the previous layer's output, not yet added to it -> the same two
        after this layer, and the router statistics of a MoE layer on `sequences`, unless they are None."""
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
        self.recompute = False  # run each block again in the backward instead of keeping its activations
        self.depth: int | None = None  # layers in use, the lowest ones; None: all
        self.dropout = False  # an adapter uses dropout: a block that runs again must draw the same numbers
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.reset_parameters()

    @property
    def head_weight(self) -> Tensor:
        """The output projection [V, C], which is the embedding itself when tied. V is the number of the tokenizer's
        ids: rows that only pad the vocabulary are left out here, so they are never sampled, scored or trained."""
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight if self.config.tokenizer_size is None else weight[: self.config.num_tokens]

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.embed_tokens.weight.dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise with N(0, 0.02); projections into the residual stream are divided by sqrt(2 layers), as in
        GPT-2. On the meta device nothing is drawn."""
        if self.device.type == "meta":
            return
        residual_std = 0.02 / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(OUTPUTS)
                parameter.normal_(0.0, residual_std if residual else 0.02)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shared_prefix: SharedPrefix | None = None,
        return_logits: bool = True,
    ) -> ModelOutput:
        """input_ids int64 [B, T] in one of two layouts, which give the same losses:

        packed: cu_seqlens int [n + 1], the documents' boundaries in the flattened B * T tokens, row ends included.
          position_ids [B, T] restart in each document; they are derived from cu_seqlens if None. attention_mask only
          selects the tokens that count in router statistics. shared_prefix: the documents to attend within, if some
          share their beginning; cu_seqlens are then the boundaries of the parts, and position_ids are required.
        padded: attention_mask [B, T], 0 at padding on either side; positions count the unmasked tokens.
        """
        batch, length = input_ids.shape
        device = input_ids.device
        dtype = self.compute_dtype or self.dtype
        fused = ops.get_mode() != "reference"
        layout = make_layout(batch, length, device, dtype, cu_seqlens, attention_mask, fused, shared_prefix)
        if position_ids is None:
            table = torch.arange(length, device=device)  # documents do not cross rows, so no position is higher
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
        for layer in self.layers if self.depth is None else self.layers[: self.depth]:
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
        """Number of parameters; `active`: only those that one token uses."""
        total = sum(p.numel() for p in self.parameters())
        cfg = self.config
        if active and cfg.num_experts:
            expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
            total -= cfg.num_hidden_layers * (cfg.num_experts - cfg.num_experts_per_tok) * expert
        return total

    def flops_per_token(self, context_length: int, training: bool = True) -> int:
        """Floating-point operations per token in a causal context of `context_length`: matrix products, and half of the
        square of attention scores. The backward costs twice the forward (Kaplan et al. 2020)."""
        cfg = self.config
        norms = sum(p.numel() for p in self.parameters() if p.ndim == 1)
        matrices = self.num_parameters(active=True) - norms
        if not cfg.tie_word_embeddings:
            matrices -= cfg.vocab_size * cfg.hidden_size  # the lookup is no product
        attention = cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim * 2 * context_length
        return (2 * matrices + attention) * (3 if training else 1)

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of key/value cache per token of a sequence."""
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
    """For router statistics: (each token's sequence, number of sequences, 1.0 for tokens that count)."""
    if cu_seqlens is not None:
        ids, sequences = document_ids(cu_seqlens.to(device), batch * length), cu_seqlens.shape[0] - 1
    else:
        ids, sequences = torch.arange(batch * length, device=device) // length, batch
    if attention_mask is None:
        return ids, sequences, torch.ones(batch * length, device=device)
    return ids, sequences, attention_mask.flatten().float()
