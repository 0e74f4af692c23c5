"""Preference pairs as stages open them, on the device, in held-out figures and in samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from minimind.attention import Unfolding
from minimind.data import Corpus
from minimind.data.builtin_preferences import builtin_preferences
from minimind.data.pair_loader import PairBatch, PairLoader
from minimind.data.preferences import open_preferences
from minimind.data.weights import NONE, SIDE, class_of
from minimind.modeling import Model
from minimind.objectives.preference import Objective, PreferenceBatch, preference_loss
from minimind.tokenization import ChatEncoder
from minimind.training.answers import Question
from minimind.training.arguments import StageArgs
from minimind.training.batches import move
from minimind.training.parallel import Parallel

_UNREAD = 64  # tokens of a document that pads an unfolding: short, as attention costs their square
# What preference_loss tells besides the loss, in the order of metrics.jsonl.
FIGURES = (
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_log_prob",
    "rejected_log_prob",
    "ranking",
)


def open_pairs(
    args: StageArgs, heldout_data: Sequence[str], encoder: ChatEncoder, console: Console
) -> tuple[Corpus, Corpus | None]:
    """(training, held-out) pairs: those of --data and --heldout-data, or the built-in ones."""
    read = partial(
        open_preferences,
        encoder=encoder,
        cache_dir=args.cache_dir,
        on_bad_row=args.on_bad_row,
        console=console,
    )
    data, heldout = list(args.data), list(heldout_data)
    if not data:
        train, held = builtin_preferences(args.cache_dir, console)
        data, heldout = [str(train)], heldout or [str(held)]
    if heldout:
        return read(data), read(heldout)
    return read(data).split(args.heldout) if args.heldout != 0 else (read(data), None)


def describe_pairs(loader: PairLoader, heldout: Corpus | None) -> list[str]:
    """Lines for the start of a run."""
    held = f"; held out {heldout.num_documents:,}" if heldout else ""
    first = f"data: {loader.num_pairs:,} pairs, {loader.tokens_per_epoch:,} tokens a pass{held}"
    lines = [first]
    if loader.share:
        lines.append(f"prompts computed once for both answers: {loader.saved:.1%} of the tokens saved")
    if loader.left_out:
        lines.append(f"longer than --seq-len {loader.seq_len}: {loader.left_out:,} pairs left out")
    return lines


def to_device(
    batch: PairBatch,
    device: torch.device,
    boundaries: int | None = None,
    reference: np.ndarray | None = None,
) -> PreferenceBatch:
    """The packed rows as tensors. boundaries: as in batches.to_device; reference: float64 [pairs of the corpus, 2]."""
    arrays = [batch.chosen, batch.rejected, batch.prompt]
    scores = [] if reference is None else list(np.ascontiguousarray(reference[batch.pairs].T))
    once = [batch.position_ids, *unfold(batch, boundaries)] if batch.share else []
    input_ids, targets, bounds, chosen, rejected, prompt, *more = move(
        batch, device, boundaries, [*arrays, *scores, *once]
    )
    counts = batch.num_targets, batch.global_num_targets, batch.global_num_pairs
    named: dict[str, Any] = dict(
        zip(("reference_chosen", "reference_rejected"), more[: len(scores)], strict=False)
    )
    if once:
        named |= {"position_ids": more[len(scores)], "unfolding": Unfolding(*more[len(scores) + 1 :])}
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
    model: Model,
    loader: PairLoader,
    reference: np.ndarray | None,
    objective: Objective,
    parallel: Parallel,
) -> dict[str, Any]:
    """heldout_loss, the objective's mean over the pairs of `loader`, and the means of FIGURES, as heldout_NAME; every
    rank takes its share of the rows and all return the same."""
    model.eval()
    device = model.head_weight.device
    sums = torch.zeros(1 + len(FIGURES), dtype=torch.float64, device=device)
    for host in loader.epoch_batches():
        loss, _, figures = preference_loss(model, to_device(host, device, None, reference), objective)
        sums += torch.stack((loss, *(figures[name] for name in FIGURES))).double()
    means = (parallel.sum(sums) / loader.num_pairs).tolist()
    named = zip(("loss", *FIGURES), means, strict=True)
    return {f"heldout_{name}": value for name, value in named} | {"heldout_pairs": loader.num_pairs}


def prompts(corpus: Corpus, count: int) -> list[Question]:
    """`count` prompts from all over `corpus`, each with its last chosen answer."""
    found = []
    for i in range(0, corpus.num_documents, max(1, corpus.num_documents // count)):
        length = int(np.flatnonzero(corpus.codes(i) & SIDE)[0])
        ids = corpus.document(i)[:length].tolist()
        silent = np.flatnonzero(class_of(corpus.codes(i)[:length]) == NONE)
        start = int(silent[-1]) + 1
        found.append(Question(ids[:start], ids[start:-1]))
    return found[:count]
