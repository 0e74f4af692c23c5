"""Upper bounds of the cost of a reinforcement learning run, for --plan.

The model decides when an answer ends, so tokens, memory and hours are those of answers as long as --max-new-tokens
allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from minimind.modeling import Model
from minimind.training.batches import step_bytes
from minimind.training.estimate import CARDS, Card, common_fields, cost, now
from minimind.training.parallel import Parallel
from minimind.training.plan import CardFigures, DataFigures, Estimate
from minimind.training.rl.actor_critic import ActorCritic
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.rl.collector import Collector
from minimind.training.rl.loader import RolloutLoader

if TYPE_CHECKING:
    from minimind.training.batches import TrainingPlan
    from minimind.training.job import Job
    from minimind.training.trainer import Stage

_PROMPTS, _TOKENS = 4, 16  # of the rollout that is measured


@dataclasses.dataclass(frozen=True)
class RolloutWork:
    """The work of a run. answers: their number; batch: answers that decode together; prompt: mean tokens of a prompt;
    answer: most tokens of an answer; passes: forwards and backwards on each answer; scorings: further forwards."""

    answers: int
    batch: int
    prompt: float
    answer: int
    passes: int
    scorings: int

    @property
    def tokens(self) -> int:
        """Tokens trained on, prompts included."""
        return round(self.answers * (self.prompt + self.answer)) * self.passes


def estimate_rollouts(job: Job, plan: TrainingPlan, model: Model, stage: Stage, lines: Sequence[str]) -> Estimate:
    """The plan of a run on rollouts. lines: about the data, as `Job.fit` would print them."""
    args, loader = cast(RolloutArgs, job.args), cast(RolloutLoader, plan.loader)
    collector = cast(Collector, loader.collect)
    lengths = np.array([len(prompt.ids) for prompt in collector.data.prompts])
    answers = args.rollouts * collector.prompts * collector.options.samples
    extra = (collector.reference is not None) + (collector.annotate is not None) + collector.rescore
    batch = min(256, collector.prompts * collector.options.samples)
    work = RolloutWork(
        answers, batch, float(lengths.mean()), collector.options.max_new_tokens, loader.shape.epochs, extra
    )
    context = round(work.prompt + work.answer)
    training = cost(model, context, args.recompute, ())
    forward = _policy(model, context)
    scored = work.answers * context * forward * work.scorings
    generated = work.answers * context * forward
    seconds, measured = _measure(job, collector, loader, stage, model, work)
    p50, p95, p99 = np.percentile(lengths, (50, 95, 99)).round().astype(int).tolist()
    documents = args.scaled(len(lengths))
    tokens = args.scaled(int(lengths.sum()))
    data = DataFigures(documents, tokens, p50, p95, p99, int(lengths.max()), 0.0, 0.0, lengths=lengths)
    return Estimate(
        **common_fields(job, model, stage, lines[1:]),
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
        measured=measured,
        measured_hours=seconds / 3600,
        cards=tuple(
            _on_card(card, job, model, collector, plan.micro_batches, loader, work, training, forward) for card in CARDS
        ),
    )


def _policy(model: Model, context: int) -> float:
    """Operations per token of a forward of the policy, without those of a separate critic."""
    whole = model.flops_per_token(context, training=False)
    if not isinstance(model, ActorCritic):
        return whole
    critic = sum(p.numel() for p in model.critic.parameters() if p.ndim > 1)
    return whole - 2 * critic


def _on_card(
    card: Card, job: Job, model: Model, collector: Collector, micro_batches: int, loader: RolloutLoader,
    work: RolloutWork, training: float, forward: float,
) -> CardFigures:  # fmt: skip
    parameters, trunks = model.num_parameters(), 1 + isinstance(model, ActorCritic)
    context = work.prompt + work.answer
    of_step = -(-collector.prompts * collector.options.samples // loader.shape.minibatches)
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
    return CardFigures(card.name, card.utilisation, micro, size, size <= memory, seconds / 3600)


def _measure(
    job: Job, collector: Collector, loader: RolloutLoader, stage: Stage, model: Model, work: RolloutWork
) -> tuple[float, str]:
    """(seconds of the run, how they were measured), from a small rollout with one forward and backward."""
    if not job.args.plan_measure:
        return 0.0, ""
    options = dataclasses.replace(
        collector.options, max_new_tokens=min(_TOKENS, work.answer), samples=min(4, collector.options.samples)
    )
    prompts = min(_PROMPTS, len(collector.data), collector.prompts)
    small = dataclasses.replace(collector, options=options, prompts=prompts, refills=0)
    shape = dataclasses.replace(loader.shape, minibatches=1, micro_batches=1, epochs=2)
    tokens = []
    passes: list[float] = []
    batches: Any = RolloutLoader(small, shape, Parallel(), job.device)
    for _ in range(2):
        batch = batches.next_batch()
        model.train()
        began = now(job.device)
        loss, aux, *_ = stage.loss(batch)
        (loss / max(1.0, batch.global_weight) + aux).backward()
        passes.append(now(job.device) - began)
        tokens.append(batch.input_ids.numel())
    model.zero_grad()
    rollout = batches.rollout
    written = sum(a.written for a in rollout.answers)
    per_answer_token = (rollout.seconds["rollout"] + rollout.seconds["prepare"]) / max(1, written)
    per_token = passes[1] / tokens[1]
    seconds = work.answers * work.answer * per_answer_token + work.tokens * per_token
    return seconds, (
        f"measured: {len(rollout.answers)} answers of up to {options.max_new_tokens} tokens, "
        f"{1 / per_answer_token:,.0f} tokens a second while answering, {1 / per_token:,.0f} while learning; rewards "
        "and larger batches not counted"
    )
