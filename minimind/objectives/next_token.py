"""Next-token prediction: what pretraining minimises and what held-out loss measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind import ops
from minimind.modeling import Model, ModelOutput
from minimind.utils.spans import span


@dataclass(frozen=True)
class TokenBatch:
    """Packed rows on the model's device. input_ids, targets int64 [B, T], targets -100 where there is none;
    cu_seqlens int32 [n + 1], the documents' boundaries in the flattened batch; num_targets, how many targets are not
    -100 (a number of the host: reading it from the device would make every step wait); global_num_targets, how many
    of all ranks, where it is needed. loss_weights float32 [B, T], 0 where there is no target; None: all are 1.
    weight_sum: of all ranks, with loss_weights, where it is needed."""

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    num_targets: int
    global_num_targets: int = 0
    loss_weights: Tensor | None = None
    weight_sum: float | None = None

    @property
    def global_weight(self) -> float:
        """What the loss is divided by: the weights of all ranks together."""
        return self.global_num_targets if self.weight_sum is None else self.weight_sum

    @property
    def share_of_weight(self) -> float:
        """Of global_weight, what this rank's share of the targets stands for."""
        return self.global_weight * self.num_targets / max(1, self.global_num_targets)


def next_token_loss(
    model: Model, batch: TokenBatch
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum over targets of -log p, each times its weight; mean auxiliary loss): float32 scalars, differentiable; of a
    model with experts also `expert_load`, times this rank's share of the weight, by which it is averaged.

    The sums are not normalised here: the caller divides by the GLOBAL weight, so that accumulation, packing and world
    size change nothing. The router is balanced over the tokens that are targets.
    """
    out = model(
        batch.input_ids, cu_seqlens=batch.cu_seqlens, attention_mask=batch.targets.ne(-100), return_logits=False
    )
    hidden = out.hidden_states.flatten(0, 1)
    weights = None if batch.loss_weights is None else batch.loss_weights.flatten()
    with span("loss"):
        loss = ops.linear_cross_entropy(
            hidden, model.head_weight, batch.targets.flatten(), weights, num_targets=batch.num_targets
        )
    if out.tokens_per_expert is None:
        return loss, out.aux_loss
    return loss, out.aux_loss, {k: v * batch.share_of_weight for k, v in expert_load(out).items()}


@torch.no_grad()
def expert_load(out: ModelOutput) -> dict[str, Tensor]:
    """How evenly the tokens of a batch, padding included, went to the experts: float32 scalars on the device.

    max_violation: by how much the most loaded expert is above the mean, (max - mean) / mean, averaged over the layers
    (MaxVio of Wang et al. 2024, arXiv 2408.15664): 0 is even, experts / top_k - 1 is all to the same ones.
    min_load: tokens of the least loaded expert over the mean, of the worst layer: 0 is an expert that learns nothing.
    """
    assert out.tokens_per_expert is not None
    load = out.tokens_per_expert.float()
    load = load / load.mean(dim=1, keepdim=True)
    return {"max_violation": load.amax(dim=1).mean() - 1, "min_load": load.amin()}


@torch.no_grad()
def next_token_nats(model: Model, batch: TokenBatch) -> Tensor:
    """Sum of -log p over the batch's targets, without the auxiliary loss."""
    return next_token_loss(model, batch)[0]
