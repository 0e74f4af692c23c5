"""Preference pairs on the device, in held-out figures and in samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minimind.data import Corpus
from minimind.data.pair_loader import PairBatch, PairLoader
from minimind.data.weights import NONE, SIDE, class_of
from minimind.modeling import Model
from minimind.objectives.preference import Objective, PreferenceBatch, preference_loss
from minimind.training.answers import Question
from minimind.training.batches import move
from minimind.training.parallel import Parallel

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


def to_device(
    batch: PairBatch,
    device: torch.device,
    boundaries: int | None = None,
    reference: np.ndarray | None = None,
) -> PreferenceBatch:
    """The packed rows as tensors. boundaries: as in batches.to_device; reference: float64 [pairs of the corpus, 2]."""
    arrays = [batch.chosen, batch.rejected]
    if reference is not None:
        arrays += list(np.ascontiguousarray(reference[batch.pairs].T))
    input_ids, targets, bounds, chosen, rejected, *scores = move(batch, device, boundaries, arrays)
    counts = batch.num_targets, batch.global_num_targets, batch.global_num_pairs
    return PreferenceBatch(input_ids, targets, bounds, chosen, rejected, *counts, *scores)


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
