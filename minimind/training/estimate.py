"""What a run would take: counted from its loader, its model and a short step on this machine, for --plan.

Operations are those of the model (Model.flops_per_token); hours on other cards follow from them by an assumed
utilisation (cards.py) and are marked as projected. Figures of data of which a part was read are extrapolated: a plan
gives them with two standard errors.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minimind.data import PackedLoader
from minimind.data.packing import tokens_in_rows
from minimind.data.pair_loader import PairLoader
from minimind.modeling import Model
from minimind.training.cards import CARDS, Card
from minimind.training.memory import GPU_BATCH, MOST_TOKENS, halved, step_bytes, tokens_that_fit
from minimind.utils.device import describe_device

if TYPE_CHECKING:
    from minimind.training.job import Job, Objective, TrainingPlan

_GROUPS = 32  # of consecutive documents, whose differences say how sure a sample's figures are
_MEASURED_TOKENS = 1024  # of a forward and backward on a CPU
_MEASURED_SECONDS = 2.0


@dataclass(frozen=True)
class DataSize:
    """bytes: of the text of --data; sizes: int64, bytes of each row that was read; scale: how many times as much there
    is; whole: whether all was read; declared: whether --plan-gb says the bytes."""

    bytes: int
    sizes: np.ndarray
    scale: float
    whole: bool
    declared: bool


@dataclass(frozen=True)
class OnCard:
    """micro_tokens: tokens of a forward and backward; bytes: of the card's memory; hours: projected."""

    name: str
    utilisation: float
    micro_tokens: int
    bytes: int
    fits: bool
    hours: float


@dataclass(frozen=True)
class Data:
    """documents: what a pass is over, held-out ones left out; tokens: of one pass, as rows hold them; error and
    documents_error: two standard errors as a share, 0 where all was read. p50 to longest: tokens of a document. cut,
    dropped: shares of the documents that do not fit a row whole, and of those that are left out; in_pieces: whether all
    of what is cut is learnt. lengths: of the documents read."""

    documents: int
    tokens: int
    p50: int
    p95: int
    p99: int
    longest: int
    cut: float
    dropped: float
    in_pieces: bool = False
    error: float = 0.0
    documents_error: float = 0.0
    bytes: int | None = None
    read_bytes: int | None = None
    declared: bool = False
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)


@dataclass(frozen=True)
class Estimate:
    """A plan. tokens: of the whole run, padding included, of reinforcement learning at most; flops: of the run;
    measured_hours: on this machine, by `measured`, which is empty where nothing was; notes: what was chosen and why."""

    stage: str
    preset: str
    parameters: int
    active: int
    trained: int
    what: str
    data: Data
    row: int
    rows: int
    fill: float
    epochs: float
    steps: int
    step_tokens: int
    micro_tokens: int
    tokens: int
    optimizer: str
    peak_lr: float
    schedule: str
    flops_per_token: float
    flops: float
    device: str
    measured: str
    measured_hours: float
    cards: tuple[OnCard, ...]
    notes: tuple[str, ...] = ()

    def about(self, source: DataSize) -> Estimate:
        """The same, its data being of these bytes."""
        known: dict[str, Any] = {"bytes": source.bytes, "read_bytes": int(source.sizes.sum())}
        if not source.whole:
            lengths = self.data.lengths
            known["error"] = relative_error(lengths, source.sizes)
            known["documents_error"] = relative_error(np.ones_like(lengths), source.sizes)
        data = dataclasses.replace(self.data, **known, declared=source.declared)
        return dataclasses.replace(self, data=data)

    def figures(self) -> dict[str, Any]:
        """As plain values."""
        found = dataclasses.asdict(self)
        found["data"].pop("lengths")
        return found

    def lines(self) -> list[str]:
        """For people."""
        trained = "" if self.trained == self.parameters else f", {self.trained / 1e6:.3f}M of them trained"
        size = f"{self.parameters / 1e6:.1f}M parameters ({self.active / 1e6:.1f}M active){trained}"
        return [
            f"plan of {self.stage}, {self.preset}, {size}: nothing is trained, no run folder is made",
            *_data_lines(self.data, self.what),
            *([self._rows()] if self.rows else []),
            f"run: passes {self.epochs:.3g}, steps {self.steps:,}{self._step()}; {spell_count(self.tokens)} tokens"
            f"{'' if self.rows else ' at most, prompts included'}",
            f"optimizer: {self.optimizer}, peak rate {self.peak_lr:g}, {self.schedule}",
            *(["what decided that, from the rows that were read:"] if self.data.error and self.notes else []),
            *self.notes,
            f"compute: {self.flops_per_token / 1e6:,.0f} MFLOP a token, {self.flops:.2e} FLOP in all",
            *(
                [f"this machine, {self.device}: {spell_hours(self.measured_hours)}, {self.measured}"]
                if self.measured
                else []
            ),
            "projected, not measured, from the share of a card's bf16 rate that a step is assumed to reach:",
            *(self._on(card) for card in self.cards),
        ]

    def _rows(self) -> str:
        data = self.data
        fates = f"{data.cut:.2%} of the {self.what} are cut, {data.dropped:.2%} left out"
        if data.in_pieces:
            fates = f"{data.cut:.2%} of the {self.what} are longer and cut into pieces, of which none is lost"
        return f"rows: --seq-len {self.row}, {self.rows:,} a pass, {self.fill:.1%} filled; {fates}"

    def _step(self) -> str:
        return f" of {self.step_tokens:,} tokens" if self.step_tokens else ""

    def _on(self, card: OnCard) -> str:
        room = "" if card.fits else ", which does not fit"
        return (
            f"  {card.name} at {card.utilisation:.0%}: {spell_hours(card.hours)}; {card.bytes / 2**30:.1f} GiB with "
            f"{card.micro_tokens:,} tokens at once{room}"
        )


class PlanOnly(Exception):  # noqa: N818 - no error
    """What a stage under --plan ends with, in place of training."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__("planned")
        self.estimate = estimate


def base(job: Job, model: Model, objective: Objective, notes: Sequence[str]) -> dict[str, Any]:
    """What plans of all stages have: the fields of Estimate about the model and its optimizer."""
    args = job.args
    peak = args.lr if args.lr is not None else objective.peak_lr
    final = 0.1 if args.final_lr is None else args.final_lr
    down = {"constant": "constant", "cosine": f"cosine down to {final:g} of it"}.get(args.schedule)
    cooldown = 0.2 if args.cooldown is None else args.cooldown
    down = down or f"flat, then down to {final:g} of it over the last {cooldown:.0%}"
    return dict(
        stage=job.stage,
        preset=job.origin.preset,
        parameters=model.num_parameters(),
        active=model.num_parameters(active=True),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        optimizer=str(args.optimizer),
        peak_lr=peak,
        schedule=f"up over {args.warmup:.0%} of the steps, {down}",
        device=describe_device(job.device),
        notes=(*notes, *job.notes),
    )


def relative_error(lengths: np.ndarray, sizes: np.ndarray) -> float:
    """Two standard errors, as a share, of tokens that are extrapolated by bytes: the ratio estimator over groups of
    consecutive documents, `lengths` tokens each, and rows of `sizes` bytes."""
    groups = min(_GROUPS, len(lengths), len(sizes))
    if groups < 2:
        return 1.0
    tokens, weight = (
        np.array([part.sum() for part in np.array_split(values.astype(np.float64), groups)])
        for values in (lengths, sizes)
    )
    rest = tokens - tokens.sum() / weight.sum() * weight
    return float(2 * math.sqrt(groups) * rest.std(ddof=1) / tokens.sum())


def estimate(job: Job, plan: TrainingPlan, model: Model, objective: Objective, lines: Sequence[str]) -> Estimate:
    args, loader = job.args, plan.loader
    data, context = _packed_data(job, loader)
    training = cost(model, context, args.recompute, objective.others)
    tokens = plan.steps * plan.step_tokens
    positions = data.tokens / loader.fill
    first = objective.first_passes * positions * model.flops_per_token(context, training=False)
    flops = tokens * training + first
    share = 1 + first / (tokens * training)
    per_token, per_update, how = _measure(job, plan, model, objective)
    notes = [*lines[1:], *_of_a_gpu(job)]
    return Estimate(
        **base(job, model, objective, notes),
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
        measured=how,
        measured_hours=(tokens * share * per_token + plan.steps * per_update) / 3600,
        cards=tuple(_on_card(card, job, plan, model, objective.others, flops) for card in CARDS),
    )


def _of_a_gpu(job: Job) -> list[str]:
    """What else a step would be there."""
    if job.rules == "cuda" or job.origin.preset == "nano" or job.given.batch_tokens is not None:
        return []
    return [f"a GPU's steps have up to {GPU_BATCH:,} tokens unless told otherwise: --plan-gpu plans with these"]


def cost(model: Model, context: int, recompute: bool, others: Sequence[Model]) -> float:
    """Operations that a step takes for each token: forward, what the backward passes on, the gradients of what is
    trained, the forward again under --recompute, and those of frozen models beside."""
    third = model.flops_per_token(context, training=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / model.num_parameters()
    beside = sum(other.flops_per_token(context, training=False) for other in others)
    return third * (2 + trained + recompute) + beside


def _packed_data(job: Job, loader: PackedLoader) -> tuple[Data, int]:
    """(the data of a pass, the context of the average token)."""
    view, count = loader.view, loader.view.num_documents
    pairs = isinstance(loader, PairLoader)
    lengths = loader.tokens if isinstance(loader, PairLoader) else tokens_in_rows(view)
    longer = float((lengths > loader.seq_len).mean())
    dropped = loader.cuts.left_out / count if view.weighted else 0.0
    held = np.minimum(lengths, loader.seq_len).astype(np.float64)
    if pairs:
        held = held / 2  # two answers do not see each other
    p50, p95, p99 = np.percentile(lengths, (50, 95, 99)).round().astype(int).tolist()
    data = Data(
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
    return data, round(float((held**2).sum() / max(1.0, held.sum())))


def _on_card(card: Card, job: Job, plan: TrainingPlan, model: Model, others: Sequence[Model], flops: float) -> OnCard:
    """With as many tokens at once as the card has memory for."""
    args, memory = job.args, card.memory << 30
    parameters = model.num_parameters()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    beside = sum(6 * other.num_parameters() for other in others)
    beside += 0 if args.ema is None else 4 * trained  # the average, in float32
    room = min(MOST_TOKENS, tokens_that_fit(job.config, parameters, memory - beside, args.recompute))
    micro = args.micro_tokens or halved(plan.step_tokens, room, args.row, 1)
    size = step_bytes(job.config, parameters, trained, micro, args.recompute) + beside
    return OnCard(card.name, card.utilisation, micro, size, size <= memory, card.training_seconds(flops) / 3600)


def _measure(job: Job, plan: TrainingPlan, model: Model, objective: Objective) -> tuple[float, float, str]:
    """(seconds of a token's forward and backward, of an update; how they were measured) on this machine. The weights
    are not kept."""
    if not job.args.plan_measure:
        return 0.0, 0.0, ""
    row = job.args.row
    gpu = job.device.type == "cuda"
    rows = plan.step_tokens // plan.micro_batches // row if gpu else max(1, _MEASURED_TOKENS // row)
    loader: Any = job.make_loader(rows=rows, rank=0, world_size=1)
    optimizers = job.optimizers(model, objective, 0.0)
    model.train()
    taken = list[float]()
    while len(taken) < 2 or (sum(taken) < _MEASURED_SECONDS and len(taken) < 20):
        batch = objective.place(loader.next_batch(), job.device)
        began = now(job.device)
        loss, aux, *_ = objective.loss(batch)
        (loss / max(1.0, batch.global_weight) + aux).backward()
        taken.append(now(job.device) - began)
    updates = []
    for _ in range(2):  # the first makes the state
        began = now(job.device)
        optimizers.step()
        updates.append(now(job.device) - began)
    optimizers.zero_grad()
    per_token = min(taken[1:]) / (rows * row)
    how = f"measured: {rows * row:,} tokens at once, {1 / per_token:,.0f} a second, and {updates[1]:.3f} s an update"
    return per_token, updates[1], how


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _data_lines(data: Data, what: str) -> list[str]:
    sure, sure_too = (f" ±{error:.1%}" if data.error else "" for error in (data.documents_error, data.error))
    found = []
    if data.error and data.bytes is not None and data.read_bytes is not None:
        told = "as --plan-gb says" if data.declared else "from all over"
        found.append(
            f"data: {data.bytes / 1e9:.3g} GB, of which {data.read_bytes / 1e6:.3g} MB were read, {told}; what follows "
            "from them is extrapolated, ± two standard errors"
        )
    longest = f"longest {'read ' if data.error else ''}{data.longest:,}"
    found.append(
        f"{what}: {spell_count(data.documents)}{sure}, {spell_count(data.tokens)} tokens a pass{sure_too}; tokens of "
        f"one: p50 {data.p50:,}, p95 {data.p95:,}, p99 {data.p99:,}, {longest}"
    )
    return found


def spell_count(number: float) -> str:
    """To three digits."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def spell_hours(hours: float) -> str:
    """In the unit that suits it."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
