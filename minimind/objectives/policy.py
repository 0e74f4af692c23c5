"""Policy-gradient losses on packed rows of sampled answers: the policy (the actor of PPO, GRPO, ...) and PPO's critic.

surrogates.py defines the policy's objectives. Log-probabilities come per token from `ops.linear_log_probs`, without
logits; only the sampled tokens are processed further. Nothing here waits for the device.

The critic minimises the squared error of its values, which may move only so far from the old ones:

    clipped_t = V_old_t + clamp(V_t - V_old_t, -c, c)
    loss_t = max((V_t - return_t)^2, (clipped_t - return_t)^2) / 2

V_t is the value of the state that token t was drawn from: the position whose target is t. c is in units of the return;
`value_room` derives it from the critic's current error. The clip is in no paper: it comes from OpenAI's baselines, and
Andrychowicz et al., 2006.05990, find that it helps little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor

from minimind import ops
from minimind.modeling import Model, ModelOutput
from minimind.objectives.surrogates import (
    Aggregation,
    PolicyLosses,
    PolicyObjective,
    PolicyTokens,
    SampledTokens,
    kl_estimates,
)
from minimind.ops.attention import document_ids
from minimind.utils.spans import span
from minimind.value_head import ValueModel, ValueOutput


@dataclass(frozen=True)
class PolicyBatch:
    """Packed rows of prompts with sampled answers, on the model's device; a document is one sample.

    input_ids, targets int64 [B, T]; targets are -100 outside the sampled tokens. cu_seqlens int32 [n + 1]: document
    boundaries in the flattened batch, with empty documents at the end allowed. The following are float32 [B, T],
    aligned with targets and read only there: old_log_probs, the targets' log-probabilities when they were sampled;
    advantages; reference_log_probs; and for PPO's critic old_values, returns, and value_room, the c of the critic's
    clip. num_targets: exact number of targets on this rank. global_num_targets, global_num_samples: over all ranks,
    above 0. max_new_tokens: the divisor of aggregation "constant". temperature: divides the logits, as it did when
    sampling.
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
        """The divisor of the loss."""
        if self.aggregation == "token":
            return self.global_num_targets
        if self.aggregation == "sample":
            return self.global_num_samples
        return self.global_num_samples * self.max_new_tokens

    def sampled(self) -> SampledTokens:
        """Positions of the sampled tokens. No host sync: num_targets says how many there are."""
        places = self.targets.flatten().ne(-100).nonzero_static(size=self.num_targets).squeeze(1)
        samples = document_ids(self.cu_seqlens.to(places.device), self.targets.numel())[places]
        return SampledTokens(places, samples, self.cu_seqlens.shape[0] - 1)


def policy_loss(
    model: Model, batch: PolicyBatch, objective: PolicyObjective, *, entropy: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the objective, mean auxiliary loss, metrics): float32 scalars on the device, the first two
    differentiable. The caller divides by the batch's GLOBAL weight.

    entropy: also compute the exact entropy, which costs little time and no memory. The metrics are sums over tokens,
    scaled so that the same division gives means over tokens: ratio (capped at e^20), ratio_drift (|log r|; 0 up to
    rounding on the first update if sampler and trainer agree), clipped (share of tokens), behaviour_kl (k3 estimate
    between sampler and model), advantage, kl (k3 estimate, if there is a reference), entropy, or its estimate
    sampled_entropy = -log p if `entropy` is off, and the objective's own metrics.
    """
    out, tokens = score(model, batch, entropy)
    result = objective(tokens)
    figures = mean_sums(policy_figures(tokens, result), batch)
    return aggregate(result.losses, tokens.at, batch.aggregation).float(), out.aux_loss, figures


def score(model: Model, batch: PolicyBatch, entropy: bool = False) -> tuple[ModelOutput, PolicyTokens]:
    """Run the model and score the sampled tokens: (its output, their log-probabilities and data)."""
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
    """Run the model without logits; the router's balance loss counts the sampled tokens only."""
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
    """Log-probability of every target, 0 where it is -100: float32 [B, T], without gradient. Arguments as in
    PolicyBatch.

    For log-probabilities that stay fixed while a batch is trained on: the reference model's, or the sampler's."""
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
    """Sum losses float64 [M] into a scalar; divided by the batch's global weight it is the aggregated loss."""
    if aggregation == "sample":
        losses = losses / at.spread(at.lengths())
    return losses.sum()


def mean_sums(figures: dict[str, Tensor], batch: PolicyBatch) -> dict[str, Tensor]:
    """Sum figures [M] into scalars that become means over tokens when divided by the batch's global weight.

    If a step has several micro-batches and the aggregation is not "token", their means are weighted like the losses."""
    scale = batch.global_weight / max(1, batch.global_num_targets)
    return {name: (value.sum() * scale).float() for name, value in figures.items()}


def policy_figures(tokens: PolicyTokens, result: PolicyLosses) -> dict[str, Tensor]:
    """The metrics of policy_loss for each token, detached: float64 [M] each."""
    log_probs = tokens.log_probs.detach()
    log_ratio = log_probs - tokens.old_log_probs
    figures = {
        "ratio": log_ratio.clamp(max=20).exp(),
        "ratio_drift": log_ratio.abs(),
        "clipped": result.clipped.double(),
        "behaviour_kl": kl_estimates(tokens.old_log_probs, log_probs.clamp(max=tokens.old_log_probs + 20)),
        "advantage": tokens.advantages,
    }
    if tokens.reference is not None:
        figures["kl"] = kl_estimates(log_probs, tokens.reference)
    if tokens.entropy is None:
        figures["sampled_entropy"] = -log_probs
    else:
        figures["entropy"] = tokens.entropy.detach()
    return figures | result.figures


def value_room(values: Tensor, returns: Tensor, share: float) -> Tensor:
    """c of the critic's clip: `share` of the values' root-mean-square error. [M] -> a float64 scalar.

    It scales with the unit of the returns, and is as large as they are while the critic is untrained."""
    if not 0 < share < math.inf:
        raise ValueError(f"--value-clip {share}: must be above 0; None turns the clip off")
    return share * (returns.double() - values.double()).square().mean().sqrt()


def value_losses(
    values: Tensor, old_values: Tensor | None, returns: Tensor, room: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(losses float64 [M], differentiable; bool [M], True where the clip removed the gradient). All arguments are [M].

    room: c, in units of the value; None: the plain squared error, which needs no old_values.
    """
    plain = (values - returns).square() / 2
    if room is None:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    if old_values is None:
        raise ValueError("the value clip needs the batch's old_values; give them or set no clip")
    clipped = old_values + (values - old_values).clamp(-room, room)
    bound = (clipped - returns).square() / 2
    return torch.maximum(plain, bound), (bound > plain).detach()


def value_loss(critic: ValueModel, batch: PolicyBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of a critic with a trunk of its own: (aggregated loss, mean auxiliary loss, metrics), as in policy_loss.

    The metrics: value, return, value_error (their squared difference), value_clipped (share of tokens)."""
    at = batch.sampled()
    out = forward(critic, batch)
    losses, figures = _critic_losses(cast(ValueOutput, out).values, at, batch)
    return aggregate(losses, at, batch.aggregation).float(), out.aux_loss, mean_sums(figures, batch)


def actor_critic_loss(
    model: ValueModel,
    batch: PolicyBatch,
    objective: PolicyObjective,
    *,
    value_weight: float = 0.5,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of a policy that shares its trunk with the critic: policy_loss + value_weight * value_loss in one forward,
    with the metrics of both. Both gradients reach the trunk; value_weight 0.5 is usual for PPO."""
    if not 0 < value_weight < math.inf:
        raise ValueError(f"value_weight={value_weight}: must be above 0, so that the critic learns")
    out, tokens = score(model, batch, entropy)
    result = objective(tokens)
    losses, figures = _critic_losses(cast(ValueOutput, out).values, tokens.at, batch)
    total = aggregate(result.losses + value_weight * losses, tokens.at, batch.aggregation)
    return total.float(), out.aux_loss, mean_sums(policy_figures(tokens, result) | figures, batch)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - var(return - V) / var(return): 1 for a perfect critic, 0 for one that predicts the mean, negative for a worse
    one; 0 if all returns are equal. [M] -> a float64 scalar."""
    total = returns.double().var(correction=0)
    unexplained = (returns.double() - values.double()).var(correction=0)
    return torch.where(total > 0, 1 - unexplained / total.masked_fill(total == 0, 1), 0.0)


def _critic_losses(values: Tensor, at: SampledTokens, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """(losses [M], metrics per token) of values [B, T]."""
    if batch.returns is None:
        raise ValueError("the critic needs the batch's returns; advantages.gae makes them")
    predicted, returns = at.take(values), at.take(batch.returns)
    old = None if batch.old_values is None else at.take(batch.old_values)
    room = None if batch.value_room is None else at.take(batch.value_room)
    losses, clipped = value_losses(predicted, old, returns, room)
    error = (predicted - returns).detach().square()
    return losses, {
        "value": predicted.detach(),
        "return": returns,
        "value_error": error,
        "value_clipped": clipped.double(),
    }
