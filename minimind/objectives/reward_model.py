"""The loss of a reward model: of two answers to one prompt the preferred one is to score higher.

    loss = -log sigma(s(c) - s(r)) + w (s(c) + s(r))^2            c the chosen, r the rejected answer, s their scores

The first term is the likelihood of a Bradley-Terry model of the preferences (1952; Christiano et al., 1706.03741;
Ouyang et al., 2203.02155). It knows differences alone; the second, with a small weight w such as 0.01, keeps the scores
around 0, so that those of different prompts and runs are of one scale (Eisenstein et al., 2312.09244).

A score is the model's value at the last token of the answer, the token that ends the turn not being read: an answer
that was cut off is judged by its words alone. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from minimind.ops.attention import SharedPrefix
from minimind.value_head import ValueModel


@dataclass(frozen=True)
class RewardBatch:
    """Packed rows of pairs of answers, on the model's device.

    input_ids, targets int64 [B, T], targets -100 outside the answers; cu_seqlens int32 [n + 1]. chosen, rejected int64
    [P]: where in the flattened batch the last token of each answer is. num_targets, global_num_targets,
    global_num_pairs: numbers of the host, of this rank and of all ranks together. Where the batch holds the prompts of
    its pairs once: position_ids and unfolding, as Model takes them.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    chosen: Tensor
    rejected: Tensor
    num_targets: int
    global_num_targets: int
    global_num_pairs: int
    position_ids: Tensor | None = None
    unfolding: SharedPrefix | None = None

    @property
    def global_weight(self) -> float:
        """What the loss is divided by."""
        return self.global_num_pairs


def bradley_terry(chosen: Tensor, rejected: Tensor, centering: float = 0.0) -> Tensor:
    """Losses of pairs, from the scores of both answers: float64 [P] each. centering: w above, 0 or more."""
    if not 0 <= centering < math.inf:
        raise ValueError(f"centering={centering}: must be 0 or more")
    return -F.logsigmoid(chosen - rejected) + centering * (chosen + rejected).square()


def reward_loss(
    model: ValueModel, batch: RewardBatch, centering: float = 0.0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum over pairs of the loss, mean auxiliary loss, sums over pairs of what tells how it goes): float32 scalars on
    the device, the first two differentiable; the caller divides by the GLOBAL number of pairs. The sums: accuracy (1
    where the chosen answer scores higher, 1/2 where both are equal), margin, chosen_score, rejected_score."""
    counted = batch.targets.ne(-100)
    out = model(
        batch.input_ids,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        attention_mask=counted,
        unfolding=batch.unfolding,
    )
    values = out.values.flatten().double()
    chosen, rejected = values.index_select(0, batch.chosen), values.index_select(0, batch.rejected)
    losses = bradley_terry(chosen, rejected, centering)
    margins = (chosen - rejected).detach()
    figures = {
        "accuracy": (margins.sign() + 1) / 2,
        "margin": margins,
        "chosen_score": chosen.detach(),
        "rejected_score": rejected.detach(),
    }
    return losses.sum().float(), out.aux_loss, {name: value.sum().float() for name, value in figures.items()}
