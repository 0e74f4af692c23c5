"""Preference pairs as stages open them, on the device, in held-out figures and in samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from minimind.data import Corpus
from minimind.data.builtin.preferences import builtin_preferences
from minimind.data.cache import open_preferences
from minimind.data.encoding import row_tokens
from minimind.data.formats import FormatName
from minimind.data.loss_mask import NONE, SIDE, class_of
from minimind.data.packing import row_length
from minimind.data.pair_loader import PairBatch, PairLoader, sides
from minimind.modeling import Model
from minimind.objectives.preference import Objective, PreferenceBatch, preference_loss
from minimind.ops.attention import SharedPrefix
from minimind.tokenization import ChatEncoder
from minimind.training.arguments import StageArgs
from minimind.training.batches import move
from minimind.training.job import Job, TrainingPlan
from minimind.training.parallel import Parallel
from minimind.training.parts import DataSplit, NamedFiles, form_of, open_parts
from minimind.training.stages.answers import HeldOutQuestion

_UNREAD = 64  # tokens of a document that pads an unfolding: short, as attention costs their square
# What preference_loss tells besides the loss, in the order of metrics.jsonl.
FIGURES = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob", "ranking")


@dataclass(frozen=True)
class PairArgs(StageArgs):
    """Flags of a stage that learns from pairs."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"chosen": [{"role": ..., "content": ...}, ...],
    "rejected": [...]} rows. None: a thousand pairs about manners that come with the program.
    FILE:2 draws twice as many of its rows as FILE:1 (docs/data.md)."""
    format: FormatName = "auto"
    """The form of --data's rows: auto, ours and upstream's; messages, OpenAI's and trl's; sharegpt and alpaca, as
    LLaMA-Factory has them (docs/data.md)."""
    heldout_data: tuple[str, ...] = ()
    """Pairs to measure on, instead of --heldout; NAME=FILE is measured beside it, with figures of its own."""
    epochs: float | None = None
    """Passes over the training part of the data. None: 6 over the built-in pairs, 1 over others, more where they are
    few (docs/training.md)."""
    seq_len: int | None = None
    """Tokens in a row, which holds both answers of a pair; longer pairs are cut at the beginning of their prompt. None:
    2048, or 4096 where more than one pair in a hundred is longer and the tokens of a step and a GPU's memory allow."""
    share_prompts: bool = True
    """Compute what both answers of a pair begin with once."""

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"epochs": 6.0, "seq_len": 2048, "cut_prompts": False}


@dataclass(frozen=True)
class PairSplit(DataSplit):
    """cut: pairs of train whose prompt was cut to fit into a row."""

    cut: int = 0


def open_pairs(job: Job, args: PairArgs, encoder: ChatEncoder) -> PairSplit:
    """The pairs of --data and --heldout-data, or the built-in ones; settles --seq-len by them."""
    builtin = () if args.data else builtin_preferences(args.cache_dir, job.console)
    named = NamedFiles.of(args.data, args.heldout_data, builtin)
    read = partial(
        open_preferences,
        encoder=encoder,
        cache_dir=args.cache_dir,
        on_bad_row=args.on_bad_row,
        console=job.console,
        form=form_of(job),
    )
    share = job.settle("share_prompts", lambda: (True, ""))
    whole = read(named.paths)
    lengths = _tokens_of_pairs(whole, share)
    most = job.longest_row()
    row = job.settle("seq_len", lambda: row_length(lengths, min(2048, most), most, "pairs"))
    if not job.settle("cut_prompts", lambda: (True, "")):
        return PairSplit(**vars(open_parts(job, named, read)))
    parts = open_parts(job, named, partial(read, longest=row, share=share))
    cut = int((_tokens_of_pairs(parts.whole, share) < lengths).sum())
    job.shortened = cut / len(lengths)
    return PairSplit(**vars(parts), cut=cut)


def pair_loader(parts: PairSplit, args: PairArgs) -> Callable[..., PairLoader]:
    """What Job.plan takes: the loader of the training pairs, of as many rows as it asks for."""
    return partial(PairLoader, parts.train, args.row, seed=args.seed, share=args.share_prompts, mixture=parts.mixture)


def _tokens_of_pairs(view: Corpus, share: bool) -> np.ndarray:
    """int64 [pairs]: what each takes of a row."""
    middles, shared = sides(view, share)
    return row_tokens(middles, view.lengths(np.arange(view.num_documents)) - middles, shared)


def describe_pairs(parts: PairSplit, plan: TrainingPlan) -> list[str]:
    """Lines for the start of a run."""
    loader, held = plan.loader, f"; held out {parts.heldout.num_documents:,}" if parts.heldout else ""
    lines = [f"data: {loader.num_pairs:,} pairs, {loader.tokens_per_epoch:,} tokens a pass{held}"]
    if loader.share:
        lines.append(f"prompts computed once for both answers: {loader.saved:.1%} of the tokens saved")
    told = [f"{parts.cut:,} of all pairs cut at the beginning of their prompt"] if parts.cut else []
    told += [f"{loader.left_out:,} pairs left out"] if loader.left_out else []
    if told:
        lines.append(f"longer than --seq-len {loader.seq_len}: {', '.join(told)}")
    return [*lines, *parts.lines(plan)]


def to_device(
    batch: PairBatch, device: torch.device, boundaries: int | None = None, reference: np.ndarray | None = None
) -> PreferenceBatch:
    """The packed rows as tensors. boundaries: as in batches.to_device; reference: float64 [pairs of the corpus, 2]."""
    arrays = [batch.chosen, batch.rejected, batch.prompt]
    scores = [] if reference is None else list(np.ascontiguousarray(reference[batch.pairs].T))
    once = [batch.position_ids, *unfold(batch, boundaries)] if batch.share else []
    input_ids, targets, bounds, chosen, rejected, prompt, *more = move(
        batch, device, boundaries, [*arrays, *scores, *once]
    )
    counts = batch.num_targets, batch.global_num_targets, batch.global_num_pairs
    named: dict[str, Any] = dict(zip(("reference_chosen", "reference_rejected"), more[: len(scores)], strict=False))
    if once:
        named |= {"position_ids": more[len(scores)], "unfolding": SharedPrefix(*more[len(scores) + 1 :])}
    return PreferenceBatch(input_ids, targets, bounds, chosen, rejected, *counts, prompt=prompt, **named)


def unfold(batch: PairBatch, boundaries: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of an Unfolding: a chosen side stands behind its prompt already, before a rejected answer the prompt
    is read again. boundaries: those that cu_seqlens is padded to; the tokens read are then padded to twice the batch,
    more than which no prompts can make of it, with documents that nothing is taken from: one shape, compiled once."""
    bounds, total = batch.cu_seqlens.astype(np.int64), batch.input_ids.size
    begins, again = bounds[batch.prompt], bounds[batch.rejected]
    lengths = bounds[batch.chosen] - begins
    copied = np.arange(lengths.sum()) + (begins - lengths.cumsum() + lengths).repeat(lengths)
    rows = np.insert(np.arange(total), again.repeat(lengths), copied)
    back = np.arange(total) + np.bincount(again, lengths, total).astype(np.int64).cumsum()
    repeated = np.ones(len(rows), bool)
    repeated[back] = False
    places = np.stack([back, np.full(total, -1)], 1)
    places[rows[repeated], 1] = np.flatnonzero(repeated)
    starts = back[bounds[:-1]]
    starts[batch.rejected] -= lengths
    starts = np.append(np.delete(starts, batch.chosen), len(rows))
    if boundaries is not None:
        size = 2 * total
        starts = np.append(starts, np.arange(len(rows), size, _UNREAD)[1:])
        room = boundaries + total // _UNREAD + 2
        starts = np.pad(starts, (0, room - len(starts)), constant_values=size)
        rows = np.pad(rows, (0, size - len(rows)))
    return rows, starts.astype(np.int32), places


@torch.no_grad()
def heldout_figures(
    model: Model, loader: PairLoader, reference: np.ndarray | None, objective: Objective, parallel: Parallel
) -> dict[str, Any]:
    """heldout_loss, the objective's mean over the pairs of `loader`, and the means of FIGURES, as heldout_NAME; every
    rank takes its share of the rows and all return the same."""
    model.eval()
    device = model.device
    sums = torch.zeros(1 + len(FIGURES), dtype=torch.float64, device=device)
    for host in loader.epoch_batches():
        loss, _, figures = preference_loss(model, to_device(host, device, None, reference), objective)
        sums += torch.stack((loss, *(figures[name] for name in FIGURES))).double()
    means = (parallel.sum(sums) / loader.num_pairs).tolist()
    named = zip(("loss", *FIGURES), means, strict=True)
    return {f"heldout_{name}": value for name, value in named} | {"heldout_pairs": loader.num_pairs}


def prompts(corpus: Corpus, count: int) -> list[HeldOutQuestion]:
    """`count` prompts from all over `corpus`, each with its last chosen answer."""
    found = []
    for i in range(0, corpus.num_documents, max(1, corpus.num_documents // count)):
        length = int(np.flatnonzero(corpus.codes(i) & SIDE)[0])
        ids = corpus.document(i)[:length].tolist()
        silent = np.flatnonzero(class_of(corpus.codes(i)[:length]) == NONE)
        start = int(silent[-1]) + 1
        found.append(HeldOutQuestion(ids[:start], ids[start:-1]))
    return found[:count]
