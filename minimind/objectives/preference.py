"""Preference optimisation from pairs of answers to one prompt: DPO, IPO, SimPO, ORPO.

Per pair, with c the chosen and r the rejected answer, log p(y) the sum of its tokens' log-probabilities, n(y) their
number, l(y) = log p(y) / n(y), ref the frozen reference model and sigma the logistic function:

    dpo      -log sigma(beta h)               h = log p(c) / ref(c) - log p(r) / ref(r)    Rafailov et al., 2305.18290
    ipo      (h' - 1 / (2 beta))^2            h' as h, each ratio divided by n             Azar et al., 2310.12036
    simpo    -log sigma(beta (l(c) - l(r)) - gamma)                                        Meng et al., 2405.14734
    orpo     -l(c) - beta log sigma(logit e^l(c) - logit e^l(r))                           Hong et al., 2403.07691

dpo with label smoothing e: (1 - e) -log sigma(beta h) + e -log sigma(-beta h), for a share e of wrong labels (Mitchell
2023, "conservative DPO"); simpo likewise. Departures: ipo averages over tokens, as its authors told trl, where the
paper writes sums; orpo's first term is the mean over each chosen answer's own targets, where trl takes all tokens of
the batch, prompts included.

Log-probabilities come per token from `ops.linear_log_probs`, without logits. Answers are documents of packed rows, and
their sums and what follows are float64: h is a small difference of four sums over hundreds of tokens, and there are
only as many numbers as answers. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind import ops
from minimind.modeling import Model
from minimind.ops.attention import SharedPrefix, document_ids
from minimind.utils.spans import span


@dataclass(frozen=True)
class PreferenceBatch:
    """Packed rows of prompts with answers, on the model's device.

    input_ids, targets int64 [B, T], targets -100 outside the answers; cu_seqlens int32 [n + 1], the documents'
    boundaries in the flattened batch. chosen, rejected int64 [P]: which documents are the answers of each pair.
    reference_chosen, reference_rejected float [P]: their log-probabilities under the reference model, for the
    objectives that need one. num_targets, global_num_targets, global_num_pairs: numbers of the host, of this rank and
    of all ranks together. Where the batch holds the prompts of its pairs once: prompt int64 [P], which documents they
    are; position_ids and unfolding, as Model takes them.
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
    unfolding: SharedPrefix | None = None

    @property
    def num_pairs(self) -> int:
        return self.chosen.shape[0]

    @property
    def global_weight(self) -> float:
        """What the loss is divided by."""
        return self.global_num_pairs


@dataclass(frozen=True)
class Pairs:
    """float64 [P] each: sums of log-probabilities, of this model and of the reference, and numbers of tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    def log_ratios(self, objective: str) -> tuple[Tensor, Tensor]:
        """log p / ref of the chosen and the rejected answers."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError(
                f"{objective}: the batch has no reference log-probabilities; compute them once with "
                "sequence_log_probs under the reference model, or take simpo or orpo, which need none"
            )
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    def averages(self) -> tuple[Tensor, Tensor]:
        """Log-probability per token of the chosen and the rejected answers; 0 for one without tokens."""
        chosen, rejected = self.chosen_tokens.clamp(min=1), self.rejected_tokens.clamp(min=1)
        return self.chosen / chosen, self.rejected / rejected


@dataclass(frozen=True)
class PairLosses:
    """float64 [P] each; the rewards, which only tell how training goes, are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


Objective = Callable[[Pairs], PairLosses]


def dpo(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> PairLosses:
    """beta > 0: how closely the model is held to the reference; label_smoothing in [0, 0.5)."""
    _check(beta, label_smoothing)
    chosen, rejected = pairs.log_ratios("dpo")
    losses = _logistic(beta * (chosen - rejected), label_smoothing)
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def ipo(pairs: Pairs, beta: float = 0.1) -> PairLosses:
    """beta > 0, the paper's tau: a log-ratio gap of 1 / (2 beta) per token is aimed at, and no more."""
    _check(beta)
    chosen, rejected = pairs.log_ratios("ipo")
    chosen = chosen / pairs.chosen_tokens.clamp(min=1)
    rejected = rejected / pairs.rejected_tokens.clamp(min=1)
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def simpo(pairs: Pairs, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> PairLosses:
    """No reference. beta > 0; gamma, the margin by which the chosen answer should win, in units of the reward."""
    _check(beta, label_smoothing)
    chosen, rejected = pairs.averages()
    losses = _logistic(beta * (chosen - rejected) - gamma, label_smoothing)
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def orpo(pairs: Pairs, beta: float = 0.1) -> PairLosses:
    """No reference, and no SFT before it. beta > 0, the paper's lambda: the odds ratio's weight beside the SFT loss."""
    _check(beta)
    chosen, rejected = pairs.averages()
    losses = -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def with_sft(objective: Objective, weight: float) -> Objective:
    """`objective` - weight * l(c), which keeps the chosen answers likely: alone, dpo, ipo and simpo are as content to
    make both answers unlikely, the rejected one more so. Pang et al., 2404.19733, take weight 1 with dpo."""
    if not 0 <= weight < float("inf"):
        raise ValueError(f"sft_weight={weight}: must be 0 or more")

    def loss(pairs: Pairs) -> PairLosses:
        result = objective(pairs)
        return replace(result, losses=result.losses - weight * pairs.averages()[0])

    return loss


OBJECTIVES: dict[str, Callable[..., PairLosses]] = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo}
NEED_REFERENCE = frozenset({"dpo", "ipo"})


def preference_loss(
    model: Model, batch: PreferenceBatch, objective: Objective
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum over pairs of the objective, mean auxiliary loss, sums over pairs of what tells how it goes).

    objective: one of OBJECTIVES, its settings bound by functools.partial. All are float32 scalars on the device, the
    first two differentiable; the caller divides by the GLOBAL number of pairs. The sums: margin (reward of the chosen
    less that of the rejected answer), accuracy (1 where it is above 0), chosen_reward, rejected_reward,
    chosen_log_prob and rejected_log_prob (per token), ranking (1 where the chosen answer is the likelier one, whatever
    the reference finds: Chen et al., 2405.19534).
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
    """(the batch's pairs, mean auxiliary loss); under torch.no_grad() this is how reference log-probabilities are
    made. What both sides learn before they part counts in both."""
    log_probs, tokens, aux = sequence_log_probs(
        model,
        batch.input_ids,
        batch.targets,
        batch.cu_seqlens,
        batch.num_targets,
        position_ids=batch.position_ids,
        unfolding=batch.unfolding,
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
    unfolding: SharedPrefix | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of each document's targets, their number, mean auxiliary loss): float64 [n], [n], a scalar.

    Arguments as in PreferenceBatch.
    """
    counted = targets.ne(-100)
    out = model(
        input_ids,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        attention_mask=counted,
        unfolding=unfolding,
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
    """log(p / (1 - p)). A p within float32's rounding of 1 is no surer than that: its odds stay finite."""
    log_p = log_p.clamp(max=-torch.finfo(torch.float32).eps)
    near_one = log_p > -0.6931  # log 2, where the two forms are equally good
    log_rest = torch.where(near_one, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))
    return log_p - log_rest


def _check(beta: float, label_smoothing: float = 0.0) -> None:
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta={beta}: must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: must lie in [0, 0.5): a share of wrong labels")
