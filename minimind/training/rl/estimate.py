"""The plan of a stage that learns from its own answers: what rollouts and steps on them take at most.

Answers end when the model ends them, so that tokens, memory and hours are bounds: every answer as long as
--max-new-tokens allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from minimind.modeling import Model
from minimind.training.cards import CARDS, Card
from minimind.training.estimate import Data, Estimate, OnCard, base, cost, now
from minimind.training.memory import step_bytes
from minimind.training.parallel import Parallel
from minimind.training.rl.actor_critic import ActorCritic
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.rl.collector import Collector
from minimind.training.rl.loader import RolloutLoader

if TYPE_CHECKING:
    from minimind.training.job import Job, Objective, TrainingPlan

_PROMPTS, _TOKENS = 4, 16  # of the rollout that is measured


@dataclasses.dataclass(frozen=True)
class RolloutWork:
    """Of a run. answers: all of them; batch: those that decode together; prompt: mean tokens of a prompt; answer: most
    tokens of one; passes: forwards and backwards of each answer; scorings: forwards of each beside."""

    answers: int
    batch: int
    prompt: float
    answer: int
    passes: int
    scorings: int

    @property
    def tokens(self) -> int:
        """Trained on, prompts included."""
        return round(self.answers * (self.prompt + self.answer)) * self.passes


def of_rollouts(job: Job, plan: TrainingPlan, model: Model, objective: Objective, lines: Sequence[str]) -> Estimate:
    args, loader = cast(RolloutArgs, job.args), cast(RolloutLoader, plan.loader)
    collector = cast(Collector, loader.collect)
    lengths = np.array([len(prompt.ids) for prompt in collector.data.prompts])
    answers = args.rollouts * collector.prompts * collector.how.samples
    extra = (collector.reference is not None) + (collector.annotate is not None) + collector.rescore
    batch = min(256, collector.prompts * collector.how.samples)
    work = RolloutWork(answers, batch, float(lengths.mean()), collector.how.max_new_tokens, loader.shape.epochs, extra)
    context = round(work.prompt + work.answer)
    training = cost(model, context, args.recompute, ())
    forward = _policy(model, context)
    scored = work.answers * context * forward * work.scorings
    generated = work.answers * context * forward
    seconds, how = _measure(job, collector, loader, objective, model, work)
    p50, p95, p99 = np.percentile(lengths, (50, 95, 99)).round().astype(int).tolist()
    documents = args.scaled(len(lengths))
    tokens = args.scaled(int(lengths.sum()))
    data = Data(documents, tokens, p50, p95, p99, int(lengths.max()), 0.0, 0.0, lengths=lengths)
    return Estimate(
        **base(job, model, objective, lines[1:]),
        what="prompts",
        data=data,
        row=0,
        rows=0,
        fill=1.0,
        epochs=args.rollouts * collector.prompts / max(1, documents),
        steps=plan.steps,
        step_tokens=0,
        micro_tokens=0,
        tokens=work.tokens,
        flops_per_token=training,
        flops=work.tokens * training + scored + generated,
        measured=how,
        measured_hours=seconds / 3600,
        cards=tuple(
            _on_card(card, job, model, collector, plan.micro_batches, loader, work, training, forward) for card in CARDS
        ),
    )


def _policy(model: Model, context: int) -> float:
    """Operations of a forward of the policy, without the critic beside it, for each token."""
    whole = model.flops_per_token(context, training=False)
    if not isinstance(model, ActorCritic):
        return whole
    critic = sum(p.numel() for p in model.critic.parameters() if p.ndim > 1)
    return whole - 2 * critic


def _on_card(
    card: Card, job: Job, model: Model, collector: Collector, micro_batches: int, loader: RolloutLoader,
    work: RolloutWork, training: float, forward: float,
) -> OnCard:  # fmt: skip
    parameters, trunks = model.num_parameters(), 1 + isinstance(model, ActorCritic)
    context = work.prompt + work.answer
    of_step = -(-collector.prompts * collector.how.samples // loader.shape.minibatches)
    micro = round(-(-of_step // micro_batches) * context)
    cache = work.batch * context * model.kv_bytes_per_token()
    policy = parameters / trunks
    beside = round(cache + 2 * policy + (2 * policy if collector.reference is not None else 0))
    size = step_bytes(job.config, parameters, parameters, micro, job.args.recompute, trunks) + beside
    one = card.decode_step_seconds(
        2 * policy,
        work.batch * (work.prompt + work.answer / 2) * model.kv_bytes_per_token(),
        work.batch * forward,
        job.config.num_hidden_layers,
    )
    batches = -(-work.answers // work.batch)
    learning = work.tokens * training + work.answers * context * forward * work.scorings
    seconds = batches * work.answer * one + card.training_seconds(learning)
    memory = card.memory << 30
    return OnCard(card.name, card.utilisation, micro, size, size <= memory, seconds / 3600)


def _measure(
    job: Job, collector: Collector, loader: RolloutLoader, objective: Objective, model: Model, work: RolloutWork
) -> tuple[float, str]:
    """(seconds of the run, how they were measured): a small rollout and one forward and backward of it."""
    if not job.args.plan_measure:
        return 0.0, ""
    how = dataclasses.replace(
        collector.how, max_new_tokens=min(_TOKENS, work.answer), samples=min(4, collector.how.samples)
    )
    prompts = min(_PROMPTS, len(collector.data), collector.prompts)
    small = dataclasses.replace(collector, how=how, prompts=prompts, refills=0)
    shape = dataclasses.replace(loader.shape, minibatches=1, micro_batches=1, epochs=2)
    tokens = []
    taken: list[float] = []
    batches: Any = RolloutLoader(small, shape, Parallel(), job.device)
    for _ in range(2):
        batch = batches.next_batch()
        model.train()
        began = now(job.device)
        loss, aux, *_ = objective.loss(batch)
        (loss / max(1.0, batch.global_weight) + aux).backward()
        taken.append(now(job.device) - began)
        tokens.append(batch.input_ids.numel())
    model.zero_grad()
    rollout = batches.rollout
    written = sum(len(a.ids) for a in rollout.answers)
    of_answer = (rollout.seconds["rollout"] + rollout.seconds["prepare"]) / max(1, written)
    of_token = taken[1] / tokens[1]
    seconds = work.answers * work.answer * of_answer + work.tokens * of_token
    return seconds, (
        f"measured: {len(rollout.answers)} answers of up to {how.max_new_tokens} tokens, {1 / of_answer:,.0f} tokens a "
        f"second while answering, {1 / of_token:,.0f} while learning; rewards and larger batches not counted"
    )
