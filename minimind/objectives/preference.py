"""Losses from pairs of answers to one prompt, one preferred to the other: DPO, IPO, SimPO, ORPO, and reward models.

For each pair: c is the chosen and r the rejected answer, log p(y) the sum of an answer's token log-probabilities, n(y)
their number, l(y) = log p(y) / n(y), ref the frozen reference model, s(y) the reward model's score, and sigma the
logistic function:

    dpo      -log sigma(beta h)               h = log p(c) / ref(c) - log p(r) / ref(r)    Rafailov et al., 2305.18290
    ipo      (h' - 1 / (2 beta))^2            h' like h, each ratio divided by n           Azar et al., 2310.12036
    simpo    -log sigma(beta (l(c) - l(r)) - gamma)                                        Meng et al., 2405.14734
    orpo     -l(c) - beta log sigma(logit e^l(c) - logit e^l(r))                           Hong et al., 2403.07691
    reward   -log sigma(s(c) - s(r)) + w (s(c) + s(r))^2                                   Ouyang et al., 2203.02155

dpo with label smoothing e is (1 - e) -log sigma(beta h) + e -log sigma(-beta h), for a share e of wrong labels
(Mitchell 2023, "conservative DPO"); simpo likewise. The reward model's first term is the likelihood of the preferences
under a Bradley-Terry model (1952; Christiano et al., 1706.03741). It sees differences only; the second term, with a
small w such as 0.01, keeps scores around 0, so that those of different prompts and runs are comparable (Eisenstein et
al., 2312.09244).

Departures: ipo averages over tokens, as its authors told trl, where the paper sums; orpo's first term is the mean over
each chosen answer's own targets, where trl averages over all tokens of the batch, prompts included.

Log-probabilities come per token from `ops.linear_log_probs`, without logits. Answers are documents of packed rows.
Their sums and everything after are float64: h is a small difference of four sums over hundreds of tokens, and there are
only as many numbers as answers. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind import ops
from minimind.modeling import Model
from minimind.ops.attention import SharedPrefix, document_ids
from minimind.utils.spans import span
from minimind.value_head import ValueModel


@dataclass(frozen=True)
class PreferenceBatch:
    """Packed rows of prompts with answers, on the model's device.

    input_ids, targets int64 [B, T]; targets are -100 outside the answers. cu_seqlens int32 [n + 1]: document boundaries
    in the flattened batch. chosen, rejected int64 [P]: the documents that are each pair's answers. reference_chosen,
    reference_rejected float [P]: the answers' log-probabilities under the reference model, if the objective needs one.
    num_targets: targets on this rank; global_num_targets, global_num_pairs: over all ranks. If pairs share one copy of
    their prompt: prompt int64 [P], the documents that are the prompts; position_ids and shared_prefix, as Model takes
    them.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    chosen: Tensor
    rejected: Tensor
    num_targets: int
    global_num_targets: int
    global_num_pairs: int
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    prompt: Tensor | None = None
    position_ids: Tensor | None = None
    shared_prefix: SharedPrefix | None = None

    @property
    def num_pairs(self) -> int:
        return self.chosen.shape[0]

    @property
    def global_weight(self) -> float:
        """The divisor of the loss."""
        return self.global_num_pairs


@dataclass(frozen=True)
class Pairs:
    """Sums of the answers' log-probabilities under the model and the reference, and their token counts: float64 [P]."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    def log_ratios(self, objective: str) -> tuple[Tensor, Tensor]:
        """log p / ref of the chosen and the rejected answers: float64 [P] each."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError(
                f"{objective}: the batch has no reference log-probabilities; compute them with pair_log_probs under "
                "the reference model, or use simpo or orpo, which need none"
            )
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    def averages(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability per token of the chosen and the rejected answers; 0 for an answer without tokens."""
        chosen, rejected = self.chosen_tokens.clamp(min=1), self.rejected_tokens.clamp(min=1)
        return self.chosen / chosen, self.rejected / rejected


@dataclass(frozen=True)
class PairLosses:
    """float64 [P] each; the rewards are metrics and detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


PairObjective = Callable[[Pairs], PairLosses]


def dpo(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> PairLosses:
    """beta > 0: how strongly the model is held to the reference; label_smoothing in [0, 0.5)."""
    _check(beta, label_smoothing)
    chosen, rejected = pairs.log_ratios("dpo")
    losses = _logistic(beta * (chosen - rejected), label_smoothing)
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def ipo(pairs: Pairs, beta: float = 0.1) -> PairLosses:
    """beta > 0, the paper's tau: the target is a log-ratio gap of 1 / (2 beta) per token."""
    _check(beta)
    chosen, rejected = pairs.log_ratios("ipo")
    chosen = chosen / pairs.chosen_tokens.clamp(min=1)
    rejected = rejected / pairs.rejected_tokens.clamp(min=1)
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def simpo(pairs: Pairs, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> PairLosses:
    """Needs no reference. beta > 0; gamma: the margin by which the chosen answer should win, in units of the reward."""
    _check(beta, label_smoothing)
    chosen, rejected = pairs.averages()
    losses = _logistic(beta * (chosen - rejected) - gamma, label_smoothing)
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def orpo(pairs: Pairs, beta: float = 0.1) -> PairLosses:
    """Needs no reference and no SFT before it. beta > 0, the paper's lambda: the odds ratio's weight beside the SFT
    loss."""
    _check(beta)
    chosen, rejected = pairs.averages()
    losses = -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def with_sft(objective: PairObjective, weight: float) -> PairObjective:
    """`objective` - weight * l(c), which keeps the chosen answers likely. Without it dpo, ipo and simpo may make both
    answers less likely, as long as the rejected one falls more. Pang et al., 2404.19733, use weight 1 with dpo."""
    if not 0 <= weight < float("inf"):
        raise ValueError(f"sft_weight={weight}: must be 0 or more")

    def loss(pairs: Pairs) -> PairLosses:
        result = objective(pairs)
        return replace(result, losses=result.losses - weight * pairs.averages()[0])

    return loss


OBJECTIVES: dict[str, Callable[..., PairLosses]] = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo}
NEED_REFERENCE = frozenset({"dpo", "ipo"})


def preference_loss(
    model: Model, batch: PreferenceBatch, objective: PairObjective
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the objective over pairs, mean auxiliary loss, metrics summed over pairs): float32 scalars on the device,
    the first two differentiable. The caller divides by the GLOBAL number of pairs.

    objective: one of OBJECTIVES, its settings bound by functools.partial. The metrics: margin (chosen minus rejected
    reward), accuracy (1 if the margin is above 0), chosen_reward, rejected_reward, chosen_log_prob and
    rejected_log_prob (per token), ranking (1 if the model finds the chosen answer likelier, regardless of the
    reference: Chen et al., 2405.19534).
    """
    pairs, aux = pair_log_probs(model, batch)
    result = objective(pairs)
    margins = result.chosen_rewards - result.rejected_rewards
    chosen, rejected = pairs.averages()
    metrics = {
        "margin": margins,
        "accuracy": margins > 0,
        "chosen_reward": result.chosen_rewards,
        "rejected_reward": result.rejected_rewards,
        "chosen_log_prob": chosen.detach(),
        "rejected_log_prob": rejected.detach(),
        "ranking": pairs.chosen > pairs.rejected,
    }
    return result.losses.sum().float(), aux, {name: value.sum().float() for name, value in metrics.items()}


def pair_log_probs(model: Model, batch: PreferenceBatch) -> tuple[Pairs, Tensor]:
    """(the batch's pairs, mean auxiliary loss). Run it under torch.no_grad() for reference log-probabilities. Targets
    in a shared prompt count for both answers."""
    log_probs, tokens, aux = sequence_log_probs(
        model,
        batch.input_ids,
        batch.targets,
        batch.cu_seqlens,
        batch.num_targets,
        position_ids=batch.position_ids,
        shared_prefix=batch.shared_prefix,
    )

    def side(values: Tensor, answer: Tensor) -> Tensor:
        values_of_answer = values.index_select(0, answer)
        return values_of_answer if batch.prompt is None else values_of_answer + values.index_select(0, batch.prompt)

    pairs = Pairs(
        side(log_probs, batch.chosen),
        side(log_probs, batch.rejected),
        side(tokens, batch.chosen),
        side(tokens, batch.rejected),
        batch.reference_chosen,
        batch.reference_rejected,
    )
    return pairs, aux


def sequence_log_probs(
    model: Model,
    input_ids: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    num_targets: int | None = None,
    *,
    position_ids: Tensor | None = None,
    shared_prefix: SharedPrefix | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of each document's target log-probabilities, number of targets, mean auxiliary loss): float64 [n], [n] and a
    scalar. Arguments as in PreferenceBatch."""
    counted = targets.ne(-100)
    out = model(
        input_ids,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        attention_mask=counted,
        shared_prefix=shared_prefix,
        return_logits=False,
    )
    with span("loss"):
        per_token, _ = ops.linear_log_probs(
            out.hidden_states.flatten(0, 1), model.head_weight, targets.flatten(), num_targets=num_targets
        )
    document = document_ids(cu_seqlens.to(per_token.device), per_token.numel())
    sums = per_token.new_zeros(2, cu_seqlens.shape[0] - 1, dtype=torch.float64)
    values = torch.stack((per_token.double(), counted.flatten().double()))
    log_probs, tokens = sums.index_add(1, document, values)
    return log_probs, tokens.detach(), out.aux_loss


def _logistic(logit: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)). p is held below 1 by float32's rounding, which keeps the odds finite."""
    log_p = log_p.clamp(max=-torch.finfo(torch.float32).eps)
    near_one = log_p > -0.6931  # -log 2, where the two forms are equally accurate
    log_rest = torch.where(near_one, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))
    return log_p - log_rest


def _check(beta: float, label_smoothing: float = 0.0) -> None:
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta={beta}: must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: must lie in [0, 0.5): the share of wrong labels")


@dataclass(frozen=True)
class RewardBatch:
    """Packed rows of pairs of answers for a reward model, on the model's device.

    As PreferenceBatch, but chosen and rejected int64 [P] are positions in the flattened batch: the last token of each
    answer. The token that ends the turn is not read, so a truncated answer is judged by its words alone.
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
    shared_prefix: SharedPrefix | None = None

    @property
    def global_weight(self) -> float:
        """The divisor of the loss."""
        return self.global_num_pairs


def bradley_terry(chosen: Tensor, rejected: Tensor, centering: float = 0.0) -> Tensor:
    """The reward loss of each pair from the scores of its answers: float64 [P]. centering: w >= 0."""
    if not 0 <= centering < math.inf:
        raise ValueError(f"centering={centering}: must be 0 or more")
    return -F.logsigmoid(chosen - rejected) + centering * (chosen + rejected).square()


def reward_loss(
    model: ValueModel, batch: RewardBatch, centering: float = 0.0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the loss over pairs, mean auxiliary loss, metrics summed over pairs), as in preference_loss. A score is
    the model's value at the answer's last token. The metrics: accuracy (1 if the chosen answer scores higher, 1/2 if
    both are equal), margin, chosen_score, rejected_score."""
    counted = batch.targets.ne(-100)
    out = model(
        batch.input_ids,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        attention_mask=counted,
        shared_prefix=batch.shared_prefix,
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
