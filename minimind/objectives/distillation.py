"""White-box distillation: the student learns the next token and the teacher's whole distribution over it.

    alpha * CE(targets) + (1 - alpha) * T^2 * D(p, q)        p = softmax(z_teacher / T)      q = softmax(z_student / T)

    forward_kl    D = KL(p || q)     Hinton et al. 2015, arXiv 1503.02531: covers all that the teacher may say
    reverse_kl    D = KL(q || p)     Gu et al. 2023, arXiv 2306.08543: keeps to what the teacher finds likely
    jsd           D = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q: Agarwal et al. 2023,
                  arXiv 2306.13649; beta -> 0 and 1 tend to the two above, times beta and 1 - beta

T^2 keeps the gradient's size when T changes (Hinton et al.). Neither model's logits exist but a chunk at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minimind import ops
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch
from minimind.utils.spans import span

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class Distillation:
    """alpha in [0, 1]: the share of the cross-entropy; temperature > 0; beta in (0, 1): the teacher's share of the
    mixture of `jsd`. ValueError for numbers outside."""

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
            raise ValueError(f"beta={self.beta}: must lie between 0 and 1; for the ends take forward_kl or reverse_kl")

    @property
    def mixture(self) -> float:
        """beta as ops.linear_distillation counts it, where the ends are the two KL divergences."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, self.beta)


def distillation_loss(
    student: Model, teacher: Model, batch: TokenBatch, options: Distillation
) -> tuple[Tensor, Tensor]:
    """(sum over targets of the loss above, each times its weight; mean auxiliary loss of the student): float32
    scalars, differentiable.

    The teacher gets no gradient; it may have any hidden size, but the student's vocabulary, else ValueError. Put it in
    eval mode. As in `next_token_loss` the caller divides by the GLOBAL weight.
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
        taught = teacher_head(teacher, batch)
        with span("loss"):
            loss = loss + share * ops.linear_distillation(
                hidden, head, *taught, counted.flatten().float() if weights is None else weights,
                temperature=options.temperature, beta=options.mixture, num_targets=batch.num_targets,
            )  # fmt: skip
    return loss, out.aux_loss


@torch.no_grad()
def teacher_head(teacher: Model, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(hidden states [B * T, D_t], output projection [V, D_t]), from which the teacher's logits follow."""
    out = teacher(
        batch.input_ids, cu_seqlens=batch.cu_seqlens, attention_mask=batch.targets.ne(-100), return_logits=False
    )
    return out.hidden_states.flatten(0, 1), teacher.head_weight.detach()


def check_vocabularies(student: Model, teacher: Model) -> None:
    """ValueError unless the two models have one vocabulary size."""
    mine, theirs = student.head_weight.shape[0], teacher.head_weight.shape[0]
    if mine != theirs:
        raise ValueError(
            f"the student has a vocabulary of {mine} and the teacher one of {theirs}: "
            "distillation compares token by token; take models of one tokenizer"
        )
