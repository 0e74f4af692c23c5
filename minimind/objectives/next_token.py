"""Losses on the next token: cross-entropy, which pretraining minimises and held-out loss measures, and distillation.

White-box distillation teaches the student the next token and the teacher's whole distribution over it:

    alpha * CE(targets) + (1 - alpha) * T^2 * D(p, q)        p = softmax(z_teacher / T)      q = softmax(z_student / T)

    forward_kl    D = KL(p || q)     Hinton et al. 2015, arXiv 1503.02531: covers everything the teacher may say
    reverse_kl    D = KL(q || p)     Gu et al. 2023, arXiv 2306.08543: keeps to what the teacher finds likely
    jsd           D = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q: Agarwal et al. 2023,
                  arXiv 2306.13649; for beta -> 0 and 1 it tends to the two above, times beta and 1 - beta

T^2 keeps the gradient's size independent of T (Hinton et al.). Both models' logits exist one chunk at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minimind import ops
from minimind.modeling import Model, ModelOutput
from minimind.utils.spans import span


@dataclass(frozen=True)
class TokenBatch:
    """Packed rows on the model's device.

    input_ids, targets int64 [B, T], with -100 for no target. cu_seqlens int32 [n + 1]: document boundaries in the
    flattened batch. num_targets: targets that are not -100, counted on the host, since reading it from the device would
    make every step wait. global_num_targets: the same over all ranks, needed for global_weight. loss_weights float32
    [B, T], 0 where there is no target; None: all 1. weight_sum: the sum of loss_weights over all ranks.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    num_targets: int
    global_num_targets: int = 0
    loss_weights: Tensor | None = None
    weight_sum: float | None = None

    @property
    def global_weight(self) -> float:
        """The divisor of the loss: the sum of weights over all ranks."""
        return self.global_num_targets if self.weight_sum is None else self.weight_sum

    @property
    def share_of_weight(self) -> float:
        """This rank's share of global_weight, by its share of the targets."""
        return self.global_weight * self.num_targets / max(1, self.global_num_targets)


def next_token_loss(
    model: Model, batch: TokenBatch
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(weighted sum of -log p over targets; mean auxiliary loss): float32 scalars, differentiable. A model with experts
    adds the metrics of `expert_load`, times this rank's share of the weight, by which they are averaged.

    The sum is not normalised here: the caller divides by the GLOBAL weight, so gradient accumulation, packing and world
    size do not change the result. The router's balance loss counts the tokens that are targets.
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
    """How evenly a batch's tokens, padding included, are spread over the experts: float32 scalars on the device.

    max_violation: (max - mean) / mean of the tokens per expert, averaged over layers (MaxVio of Wang et al. 2024, arXiv
    2408.15664). 0 is even; experts / top_k - 1 means that all tokens go to the same experts. min_load: tokens of the
    least loaded expert divided by the mean, in the worst layer; 0 means that an expert learns nothing.
    """
    assert out.tokens_per_expert is not None
    load = out.tokens_per_expert.float()
    load = load / load.mean(dim=1, keepdim=True)
    return {"max_violation": load.amax(dim=1).mean() - 1, "min_load": load.amin()}


@torch.no_grad()
def next_token_nats(model: Model, batch: TokenBatch) -> Tensor:
    """Weighted sum of -log p over the batch's targets, without the auxiliary loss: a float32 scalar."""
    return next_token_loss(model, batch)[0]


DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class Distillation:
    """Settings of distillation_loss. alpha in [0, 1]: weight of the cross-entropy; temperature > 0; beta in (0, 1): the
    teacher's share in the mixture of `jsd`. ValueError for values outside."""

    alpha: float = 0.5
    temperature: float = 1.0
    divergence: DivergenceName = "forward_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: must lie in 0..1; 1 is plain cross-entropy")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be above 0")
        if self.divergence not in ("forward_kl", "reverse_kl", "jsd"):
            raise ValueError(f"divergence={self.divergence!r}: choose forward_kl, reverse_kl or jsd")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta={self.beta}: must lie between 0 and 1; for the ends use forward_kl or reverse_kl")

    @property
    def mixture(self) -> float:
        """beta for ops.linear_distillation, in which 0 and 1 are the two KL divergences."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, self.beta)


def distillation_loss(
    student: Model, teacher: Model, batch: TokenBatch, options: Distillation
) -> tuple[Tensor, Tensor]:
    """(weighted sum over targets of the distillation loss; mean auxiliary loss of the student): float32 scalars,
    differentiable. As in `next_token_loss` the caller divides by the GLOBAL weight.

    The teacher gets no gradient and should be in eval mode. It may have another hidden size; ValueError if its
    vocabulary differs from the student's.
    """
    check_vocabularies(student, teacher)
    counted = batch.targets.ne(-100)
    out = student(batch.input_ids, cu_seqlens=batch.cu_seqlens, attention_mask=counted, return_logits=False)
    hidden, head = out.hidden_states.flatten(0, 1), student.head_weight
    weights = None if batch.loss_weights is None else batch.loss_weights.flatten()
    loss = hidden.new_zeros((), dtype=torch.float32)
    if options.alpha > 0:
        targets = batch.targets.flatten()
        with span("loss"):
            loss = loss + options.alpha * ops.linear_cross_entropy(
                hidden, head, targets, weights, num_targets=batch.num_targets
            )
    if options.alpha < 1:
        share = (1 - options.alpha) * options.temperature**2
        teacher_inputs = teacher_head(teacher, batch)
        with span("loss"):
            loss = loss + share * ops.linear_distillation(
                hidden, head, *teacher_inputs, counted.flatten().float() if weights is None else weights,
                temperature=options.temperature, beta=options.mixture, num_targets=batch.num_targets,
            )  # fmt: skip
    return loss, out.aux_loss


@torch.no_grad()
def teacher_head(teacher: Model, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The two factors of the teacher's logits: (hidden states [B * T, D_t], output projection [V, D_t])."""
    out = teacher(
        batch.input_ids, cu_seqlens=batch.cu_seqlens, attention_mask=batch.targets.ne(-100), return_logits=False
    )
    return out.hidden_states.flatten(0, 1), teacher.head_weight.detach()


def check_vocabularies(student: Model, teacher: Model) -> None:
    """ValueError if the two vocabularies differ in size."""
    sizes = student.head_weight.shape[0], teacher.head_weight.shape[0]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has a vocabulary of {sizes[0]} and the teacher one of {sizes[1]}: "
            "distillation compares token by token; choose models with the same tokenizer"
        )
