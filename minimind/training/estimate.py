"""Estimates the cost of a run over packed data, for --plan, from its loader, its model and a short step here.

The operations are the model's (Model.flops_per_token). Hours on known GPUs are computed from them with an assumed
utilisation, and are marked as projected.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minimind.data import PackedLoader
from minimind.data.packing import tokens_in_rows
from minimind.data.pair_loader import PairLoader
from minimind.modeling import Model
from minimind.training.batches import GPU_BATCH, MOST_TOKENS, halved, step_bytes, tokens_that_fit
from minimind.training.plan import CardFigures, DataFigures, Estimate
from minimind.utils.device import describe_device

if TYPE_CHECKING:
    from minimind.training.batches import TrainingPlan
    from minimind.training.job import Job
    from minimind.training.trainer import Stage

_MEASURED_TOKENS = 1024  # of a forward and backward on a CPU
_MEASURED_SECONDS = 2.0

SHARE_OF_BANDWIDTH = 0.6  # reached while decoding
LAUNCH_SECONDS = 2.5e-6  # of each kernel of a decode step
_LAYER_KERNELS, _FINAL_KERNELS = 5, 7


@dataclass(frozen=True)
class Card:
    """A GPU. tflops: dense bf16 with float32 sums; bandwidth: GB/s; memory: GiB; utilisation: the share of tflops that
    a step spends on the model's own operations; assumed, as nobody has measured it."""

    name: str
    tflops: float
    bandwidth: float
    memory: int
    utilisation: float

    def training_seconds(self, flops: float) -> float:
        return flops / (self.utilisation * self.tflops * 1e12)

    def decode_step_seconds(self, weight_bytes: float, kv_bytes: float, flops: float, layers: int) -> float:
        """Seconds of decoding one token for every sequence of a batch: memory or arithmetic, whichever takes longer,
        plus kernel launches."""
        memory = (weight_bytes + kv_bytes) / (SHARE_OF_BANDWIDTH * self.bandwidth * 1e9)
        launches = LAUNCH_SECONDS * (_LAYER_KERNELS * layers + _FINAL_KERNELS)
        return max(memory, self.training_seconds(flops)) + launches


# NVIDIA's whitepapers of GA102, AD102, A100 and H100 (SXM, 80 GB).
CARDS = (
    Card("RTX 3090", 71.0, 936, 24, 0.4),
    Card("RTX 4090", 165.2, 1008, 24, 0.4),
    Card("A100 80 GB", 312.0, 2039, 80, 0.4),
    Card("H100 SXM", 989.4, 3350, 80, 0.3),
)


def estimate(job: Job, plan: TrainingPlan, model: Model, stage: Stage, lines: Sequence[str]) -> Estimate:
    """The plan of a stage that trains on packed data. lines: about the data, as `Job.fit` would print them."""
    args, loader = job.args, plan.loader
    data, context = _packed_data(job, loader)
    shallow = plan.depth.work(0, plan.steps) / plan.steps  # share of the cost that the first, shallower steps leave
    training = shallow * cost(model, context, args.recompute, stage.frozen_models)
    tokens = plan.tokens_before(plan.steps)
    positions = data.tokens / loader.fill
    first = stage.first_passes * positions * model.flops_per_token(context, training=False)
    flops = tokens * training + first
    share = 1 + first / (tokens * training)
    per_token, per_update, measured = _measure(job, plan, model, stage)
    return Estimate(
        **common_fields(job, model, stage, [*lines[1:], *_gpu_note(job)]),
        what="pairs" if isinstance(loader, PairLoader) else "documents",
        data=data,
        row=args.row,
        rows=math.ceil(positions / args.row),
        fill=loader.fill,
        epochs=tokens / positions,
        steps=plan.steps,
        step_tokens=plan.step_tokens,
        micro_tokens=plan.step_tokens // plan.micro_batches,
        tokens=tokens,
        flops_per_token=training,
        flops=flops,
        measured=measured,
        measured_hours=(tokens * share * per_token + plan.steps * per_update) * shallow / 3600,
        cards=tuple(_on_card(card, job, plan, model, stage.frozen_models, flops) for card in CARDS),
    )


def common_fields(job: Job, model: Model, stage: Stage, notes: Sequence[str]) -> dict[str, Any]:
    """The fields of Estimate that all stages fill alike: about the model and its optimizer."""
    args = job.args
    schedule = args.rate_schedule(1)
    fall = {"constant": "constant", "cosine": f"cosine down to {schedule.final:g} of it"}.get(args.schedule)
    fall = fall or f"flat, then down to {schedule.final:g} of it over the last {schedule.cooldown:.0%}"
    return dict(
        stage=job.stage,
        preset=job.initial.preset,
        parameters=model.num_parameters(),
        active=model.num_parameters(active=True),
        trained=_trained(model),
        optimizer=str(args.optimizer),
        peak_lr=args.peak_lr(stage.peak_lr),
        schedule=f"up over {args.warmup:.0%} of the steps, {fall}",
        device=describe_device(job.device),
        notes=(*notes, *job.notes),
    )


def _gpu_note(job: Job) -> list[str]:
    if job.default_device == "cuda" or job.initial.preset == "nano" or job.flags.batch_tokens is not None:
        return []
    return [f"a GPU's steps have up to {GPU_BATCH:,} tokens by default: --plan-gpu plans with these"]


def cost(model: Model, context: int, recompute: bool, frozen: Sequence[Model]) -> float:
    """Operations of a step per token: the forward, the gradients of activations, those of trained weights, the second
    forward of --recompute, and the forwards of `frozen` models."""
    forward = model.flops_per_token(context, training=False)
    trained = _trained(model) / model.num_parameters()
    beside = sum(other.flops_per_token(context, training=False) for other in frozen)
    return forward * (2 + trained + recompute) + beside


def _trained(model: Model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _packed_data(job: Job, loader: PackedLoader) -> tuple[DataFigures, int]:
    """(the data of a pass, the context of the average token)."""
    view, count = loader.view, loader.view.num_documents
    pairs = isinstance(loader, PairLoader)
    lengths = loader.tokens if isinstance(loader, PairLoader) else tokens_in_rows(view)
    longer = float((lengths > loader.seq_len).mean())
    dropped = loader.cuts.left_out / count if view.weighted else 0.0
    contexts = np.minimum(lengths, loader.seq_len).astype(np.float64)
    if pairs:
        contexts = contexts / 2  # two answers do not see each other
    p50, p95, p99 = np.percentile(lengths, (50, 95, 99)).round().astype(int).tolist()
    data = DataFigures(
        documents=job.args.scaled(count),
        tokens=job.args.scaled(loader.tokens_per_epoch),
        p50=p50,
        p95=p95,
        p99=p99,
        longest=int(lengths.max()),
        cut=job.shortened + max(0.0, longer - dropped),
        dropped=dropped,
        in_pieces=not view.weighted,
        lengths=lengths,
    )
    return data, round(float((contexts**2).sum() / max(1.0, contexts.sum())))


def _on_card(
    card: Card, job: Job, plan: TrainingPlan, model: Model, frozen: Sequence[Model], flops: float
) -> CardFigures:
    """The run on `card`, with as many tokens at once as its memory allows."""
    args, memory = job.args, card.memory << 30
    parameters, trained = model.num_parameters(), _trained(model)
    beside = sum(6 * other.num_parameters() for other in frozen)
    beside += 0 if args.ema is None else 4 * trained  # the average, in float32
    limit = min(MOST_TOKENS, tokens_that_fit(job.config, parameters, memory - beside, args.recompute))
    micro = args.micro_tokens or halved(plan.step_tokens, limit, args.row, 1)
    size = step_bytes(job.config, parameters, trained, micro, args.recompute) + beside
    return CardFigures(card.name, card.utilisation, micro, size, size <= memory, card.training_seconds(flops) / 3600)


def _measure(job: Job, plan: TrainingPlan, model: Model, stage: Stage) -> tuple[float, float, str]:
    """(seconds of a token's forward and backward, seconds of an update, how they were measured) on this machine, at a
    learning rate of 0."""
    if not job.args.plan_measure:
        return 0.0, 0.0, ""
    row = job.args.row
    gpu = job.device.type == "cuda"
    rows = plan.step_tokens // plan.micro_batches // row if gpu else max(1, _MEASURED_TOKENS // row)
    loader: Any = job.make_loader(rows=rows, rank=0, world_size=1)
    optimizers = job.optimizers(model, stage)
    optimizers.set_lr_factor(0.0)
    model.train()
    passes = list[float]()
    while len(passes) < 2 or (sum(passes) < _MEASURED_SECONDS and len(passes) < 20):
        batch = stage.place(loader.next_batch(), job.device)
        began = now(job.device)
        loss, aux, *_ = stage.loss(batch)
        (loss / max(1.0, batch.global_weight) + aux).backward()
        passes.append(now(job.device) - began)
    updates = []
    for _ in range(2):  # the first allocates the optimizer's state
        began = now(job.device)
        optimizers.step()
        updates.append(now(job.device) - began)
    optimizers.zero_grad()
    per_token = min(passes[1:]) / (rows * row)
    measured = f"{rows * row:,} tokens at once, {1 / per_token:,.0f} a second, and {updates[1]:.3f} s an update"
    return per_token, updates[1], f"measured: {measured}"


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
