"""The critic's loss in PPO: squared errors of the values, which move no further from the old ones than a bound. (No
paper has that clip: it is of OpenAI's baselines, and Andrychowicz et al., 2006.05990, find that it helps little.)

    held_t = V_old_t + clamp(V_t - V_old_t, -c, c)
    loss_t = max((V_t - return_t)^2, (held_t - return_t)^2) / 2

V_t belongs to the state that token t was drawn from, the position whose target t is. c is in units of the return, which
may be any: `value_room` takes it from what a critic is off by.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from minimind.objectives.policy import PolicyBatch, aggregate, forward, mean_sums, policy_figures, score
from minimind.objectives.surrogates import Objective, SampledTokens
from minimind.value_head import ValueModel, ValueOutput


def value_room(values: Tensor, returns: Tensor, share: float) -> Tensor:
    """How far values may move in a rollout: `share` of the root mean square of what they are off by. It is as large as
    the returns are while a critic knows nothing, and grows and shrinks with their unit. [M] -> a float64 scalar."""
    if not 0 < share < math.inf:
        raise ValueError(f"--value-clip {share}: must be above 0; None is no clip")
    return share * (returns.double() - values.double()).square().mean().sqrt()


def value_losses(
    values: Tensor, old_values: Tensor | None, returns: Tensor, room: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(losses, differentiable; where the bound took the gradient): float64 and bool [M], as the arguments are.

    room [M]: c, in units of the value; None: the plain squared error, which needs no old_values.
    """
    plain = (values - returns).square() / 2
    if room is None:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    if old_values is None:
        raise ValueError("the batch has no old_values, from which the value clip measures; give them or set no clip")
    held = old_values + (values - old_values).clamp(-room, room)
    bound = (held - returns).square() / 2
    return torch.maximum(plain, bound), (bound > plain).detach()


def value_loss(critic: ValueModel, batch: PolicyBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """For a critic on its own trunk: (sum of its losses, aggregated as the batch says, mean auxiliary loss, sums of
    what tells how it goes), as of policy_loss; clipped where the batch has value_room. The sums, over tokens: value,
    return, value_error (their squared difference), value_clipped (the share)."""
    at = batch.sampled()
    out = forward(critic, batch)
    losses, figures = _critic(cast(ValueOutput, out).values, at, batch)
    return aggregate(losses, at, batch.aggregation).float(), out.aux_loss, mean_sums(figures, batch)


def actor_critic_loss(
    model: ValueModel, batch: PolicyBatch, objective: Objective, *, value_weight: float = 0.5, entropy: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """For a policy that shares its trunk with its critic: policy_loss + value_weight * value_loss in one forward, and
    the figures of both. value_weight 0.5 is PPO's usual; gradients of both reach the trunk."""
    if not 0 < value_weight < math.inf:
        raise ValueError(f"value_weight={value_weight}: must be above 0, or the critic learns nothing")
    out, tokens = score(model, batch, entropy)
    result = objective(tokens)
    losses, figures = _critic(cast(ValueOutput, out).values, tokens.at, batch)
    total = aggregate(result.losses + value_weight * losses, tokens.at, batch.aggregation)
    return total.float(), out.aux_loss, mean_sums(policy_figures(tokens, result) | figures, batch)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - var(return - V) / var(return): 1 for a perfect critic, 0 for one that knows the mean alone, below 0 for a
    worse one; 0 where all returns are equal. float64 [M] -> a scalar."""
    spread = returns.double().var(correction=0)
    left = (returns.double() - values.double()).var(correction=0)
    return torch.where(spread > 0, 1 - left / spread.masked_fill(spread == 0, 1), 0.0)


def _critic(values: Tensor, at: SampledTokens, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """(losses [M], figures) of values [B, T]."""
    if batch.returns is None:
        raise ValueError("the batch has no returns, which the critic learns from; see advantages.gae")
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
