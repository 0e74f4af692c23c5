"""Next-token prediction: what pretraining minimises and what held-out loss measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind import ops
from minimind.modeling import Model


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


def next_token_loss(model: Model, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(sum over targets of -log p, each times its weight; mean auxiliary loss): float32 scalars, differentiable.

    The sum is not normalised here: the caller divides by the GLOBAL weight, so that accumulation, packing and world
    size change nothing. The router is balanced over the tokens that are targets.
    """
    out = model(
        batch.input_ids,
        cu_seqlens=batch.cu_seqlens,
        attention_mask=batch.targets.ne(-100),
        return_logits=False,
    )
    hidden = out.hidden_states.flatten(0, 1)
    weights = None if batch.loss_weights is None else batch.loss_weights.flatten()
    loss = ops.linear_cross_entropy(
        hidden, model.head_weight, batch.targets.flatten(), weights, num_targets=batch.num_targets
    )
    return loss, out.aux_loss


@torch.no_grad()
def next_token_nats(model: Model, batch: TokenBatch) -> Tensor:
    """Sum of -log p over the batch's targets, without the auxiliary loss."""
    return next_token_loss(model, batch)[0]
