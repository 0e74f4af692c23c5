"""Policy gradients on packed rows of sampled answers: the loss of PPO's actor, GRPO and their relatives.

What is minimised is in surrogates.py. Log-probabilities come per token from `ops.linear_log_probs`, without logits; the
sampled tokens alone go on from there. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from minimind import ops
from minimind.modeling import Model, ModelOutput
from minimind.objectives.surrogates import (
    Aggregation,
    Objective,
    PolicyLosses,
    PolicyTokens,
    SampledTokens,
    kl_estimates,
)
from minimind.ops.attention import document_ids
from minimind.utils.spans import span


@dataclass(frozen=True)
class PolicyBatch:
    """Packed rows of prompts with sampled answers, on the model's device; a document is one sample.

    input_ids, targets int64 [B, T], targets -100 outside the sampled tokens; cu_seqlens int32 [n + 1], the documents'
    boundaries in the flattened batch, empty ones at the end allowed. old_log_probs: of each target, as it was
    sampled; advantages; reference_log_probs; old_values and returns of PPO's critic, and value_room, how far its values
    may move from the old ones: float32 [B, T], aligned with targets and read there alone. num_targets is exact and this
    rank's; global_num_targets and global_num_samples are of all ranks and above 0; max_new_tokens is what "constant"
    divides by. temperature: what logits were divided by when sampling, and are when scored.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    num_targets: int
    global_num_targets: int
    global_num_samples: int
    aggregation: Aggregation = "token"
    max_new_tokens: int = 0
    temperature: float = 1.0
    reference_log_probs: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    value_room: Tensor | None = None

    def __post_init__(self) -> None:
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(f"aggregation={self.aggregation!r}: choose one of {', '.join(get_args(Aggregation))}")
        if self.aggregation == "constant" and self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}: aggregation 'constant' divides by it; give the longest "
                "allowed answer"
            )

    @property
    def global_weight(self) -> float:
        """What the loss is divided by."""
        if self.aggregation == "token":
            return self.global_num_targets
        if self.aggregation == "sample":
            return self.global_num_samples
        return self.global_num_samples * self.max_new_tokens

    def sampled(self) -> SampledTokens:
        """Where the sampled tokens are. No host sync: num_targets says how many."""
        places = self.targets.flatten().ne(-100).nonzero_static(size=self.num_targets).squeeze(1)
        samples = document_ids(self.cu_seqlens.to(places.device), self.targets.numel())[places]
        return SampledTokens(places, samples, self.cu_seqlens.shape[0] - 1)


def policy_loss(
    model: Model, batch: PolicyBatch, objective: Objective, *, entropy: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the objective, mean auxiliary loss, sums of what tells how it goes): float32 scalars on the device, the
    first two differentiable; the caller divides by the GLOBAL weight of the batch.

    entropy: compute it exactly, which costs a little of the head and none of its memory. The sums are those over
    tokens, scaled so that the same division makes means over tokens of them: ratio (each capped at e^20), ratio_drift
    (|log r|, 0 to rounding on the first update if sampler and trainer agree), clipped (the share), behaviour_kl (k3 of
    mu and p), advantage, kl (k3, to the reference if there is one), entropy or, if not asked for, sampled_entropy, its
    estimate -log p, and what the objective adds.
    """
    out, tokens = score(model, batch, entropy)
    result = objective(tokens)
    figures = mean_sums(policy_figures(tokens, result), batch)
    return aggregate(result.losses, tokens.at, batch.aggregation).float(), out.aux_loss, figures


def score(model: Model, batch: PolicyBatch, entropy: bool = False) -> tuple[ModelOutput, PolicyTokens]:
    """The model's forward over the batch, and the sampled tokens with their log-probabilities under it."""
    at = batch.sampled()
    out = forward(model, batch)
    with span("loss"):
        log_probs, entropies = ops.linear_log_probs(
            out.hidden_states.flatten(0, 1),
            model.head_weight,
            batch.targets.flatten(),
            temperature=batch.temperature,
            entropy=entropy,
            num_targets=batch.num_targets,
        )
    reference = None if batch.reference_log_probs is None else at.take(batch.reference_log_probs)
    return out, PolicyTokens(
        at,
        at.take(log_probs),
        at.take(batch.old_log_probs),
        at.take(batch.advantages),
        reference,
        None if entropies is None else at.take(entropies),
    )


def forward(model: Model, batch: PolicyBatch) -> ModelOutput:
    """Hidden states of the packed rows; the router is balanced over the sampled tokens."""
    counted = batch.targets.ne(-100)
    return model(batch.input_ids, cu_seqlens=batch.cu_seqlens, attention_mask=counted, return_logits=False)


@torch.no_grad()
def token_log_probs(
    model: Model,
    input_ids: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    num_targets: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability of every target, 0 where there is none: float32 [B, T]. Arguments as in PolicyBatch.

    For what does not change while a batch is trained on: the reference model's, or the sampler's measured anew."""
    counted = targets.ne(-100)
    out = model(input_ids, cu_seqlens=cu_seqlens, attention_mask=counted, return_logits=False)
    log_probs, _ = ops.linear_log_probs(
        out.hidden_states.flatten(0, 1),
        model.head_weight,
        targets.flatten(),
        temperature=temperature,
        num_targets=num_targets,
    )
    return log_probs.view_as(targets)


def aggregate(losses: Tensor, at: SampledTokens, aggregation: Aggregation) -> Tensor:
    """The sum that, divided by the batch's global weight, is the aggregated loss. losses float64 [M] -> a scalar."""
    if aggregation == "sample":
        losses = losses / at.spread(at.lengths())
    return losses.sum()


def mean_sums(figures: dict[str, Tensor], batch: PolicyBatch) -> dict[str, Tensor]:
    """Sums over the sampled tokens [M] that, divided by the batch's global weight, are means over them. With several
    micro-batches in a step and another aggregation than "token", the means of these are weighed as the losses are."""
    scale = batch.global_weight / max(1, batch.global_num_targets)
    return {name: (value.sum() * scale).float() for name, value in figures.items()}


def policy_figures(tokens: PolicyTokens, result: PolicyLosses) -> dict[str, Tensor]:
    """What policy_loss tells of every token, detached: float64 [M] each."""
    log_probs = tokens.log_probs.detach()
    log_ratio = log_probs - tokens.old_log_probs
    figures = {
        "ratio": log_ratio.clamp(max=20).exp(),
        "ratio_drift": log_ratio.abs(),
        "clipped": result.clipped.double(),
        "behaviour_kl": kl_estimates(tokens.old_log_probs, log_probs.clamp(max=tokens.old_log_probs + 20), "k3"),
        "advantage": tokens.advantages,
    }
    if tokens.reference is not None:
        figures["kl"] = kl_estimates(log_probs, tokens.reference, "k3")
    if tokens.entropy is None:
        figures["sampled_entropy"] = -log_probs
    else:
        figures["entropy"] = tokens.entropy.detach()
    return figures | result.figures
