"""DPO and its relatives: the reference's log-probabilities, held-out pairs, and their figures.

The log-probabilities under the initial model are computed once for a whole data set and kept on disk, so that training
needs neither a second model nor a second forward pass per step. They are stored under a hash of the weights, the data,
the row length and the precision, so every later run over the same pairs reuses them.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from minimind import ops
from minimind.data import Corpus
from minimind.data.encoding import NONE, SIDE, class_of
from minimind.data.pair_loader import PairBatch, PairLoader
from minimind.lora import adapters_off
from minimind.modeling import Model
from minimind.objectives.preference import PairObjective, PreferenceBatch, pair_log_probs, preference_loss
from minimind.ops.attention import SharedPrefix
from minimind.training.batches import move
from minimind.training.evaluation import rename
from minimind.training.job import Job
from minimind.training.metrics import plot_figures
from minimind.training.parallel import Parallel
from minimind.training.stages.chats import HeldOutQuestion, exact_figures
from minimind.training.stages.pairs import PairArgs, PairSplit, heldout_loader, pair_means, unfold
from minimind.utils.display import Display, duration, say
from minimind.utils.files import cache_root, disk_full, is_disk_full, make_folder, write_atomically

FORMAT_VERSION = 1
# The figures of preference_loss besides the loss, in the order of metrics.jsonl.
FIGURES = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob", "ranking")


def to_device(
    batch: PairBatch, device: torch.device, boundaries: int | None = None, reference: np.ndarray | None = None
) -> PreferenceBatch:
    """The packed rows as tensors. boundaries: as in batches.to_device; reference: float64 [pairs of the corpus, 2]."""
    arrays = [batch.chosen, batch.rejected, batch.prompt]
    scores = [] if reference is None else list(np.ascontiguousarray(reference[batch.pairs].T))
    shared = [batch.position_ids, *unfold(batch, boundaries)] if batch.share else []
    input_ids, targets, bounds, chosen, rejected, prompt, *more = move(
        batch, device, boundaries, [*arrays, *scores, *shared]
    )
    counts = batch.num_targets, batch.global_num_targets, batch.global_num_pairs
    named: dict[str, Any] = dict(zip(("reference_chosen", "reference_rejected"), more[: len(scores)], strict=False))
    if shared:
        named |= {"position_ids": more[len(scores)], "shared_prefix": SharedPrefix(*more[len(scores) + 1 :])}
    return PreferenceBatch(input_ids, targets, bounds, chosen, rejected, *counts, prompt=prompt, **named)


@dataclass(frozen=True)
class HeldOutPairs:
    """Held-out pairs and their log-probabilities under the reference, if the loss needs one."""

    loader: PairLoader
    reference: np.ndarray | None


def open_heldout(
    split: PairSplit, job: Job, args: PairArgs, rows: int, reference: Callable[[Corpus], np.ndarray | None]
) -> dict[str, tuple[HeldOutPairs, HeldOutPairs]]:
    """By the name of every held-out set, empty for the main one: (the pairs evaluated during training, all of them)."""

    def opened(view: Corpus) -> HeldOutPairs:
        return HeldOutPairs(heldout_loader(view, args, rows, job.parallel), reference(view))

    return {name: (opened(view.head(args.eval_tokens)), opened(view)) for name, view in split.heldout_sets.items()}


def evaluate_pairs(
    model: Model,
    heldout: Mapping[str, tuple[HeldOutPairs, HeldOutPairs]],
    loss: PairObjective,
    job: Job,
    questions: int,
    final: bool,
) -> dict[str, Any]:
    """The loss and its figures on every held-out set, and the share of prompts answered like the chosen answers.
    heldout: from open_heldout; questions: prompts to answer during training, 0 for none."""
    values: dict[str, Any] = {}
    for name, views in heldout.items():
        pairs = views[final]
        figures = heldout_figures(model, pairs.loader, pairs.reference, loss, job.parallel)
        say(
            job.console,
            f"of {figures['heldout_pairs']:,} held-out pairs{f' of {name}' if name else ''} "
            f"{figures['heldout_ranking']:.1%} have the chosen answer likelier, {figures['heldout_accuracy']:.1%} the "
            f"higher reward for it; margin {figures['heldout_margin']:.3f}",
        )
        if questions and not name:
            count = figures["heldout_pairs"] if final else questions
            figures |= exact_figures(model, prompts(pairs.loader.view, count), job, "heldout")
        values |= (rename(name, figures) if name else figures) | {"heldout_all": final}
    return values


@torch.no_grad()
def heldout_figures(
    model: Model, loader: PairLoader, reference: np.ndarray | None, objective: PairObjective, parallel: Parallel
) -> dict[str, Any]:
    """Means over the pairs of `loader`, as heldout_NAME: of the objective, called loss, and of FIGURES. All ranks call
    it and return the same."""
    model.eval()
    return pair_means(
        lambda batch: preference_loss(model, to_device(batch, model.device, None, reference), objective),
        loader,
        FIGURES,
        model.device,
        parallel,
    )


def prompts(corpus: Corpus, count: int) -> list[HeldOutQuestion]:
    """`count` prompts spread over `corpus`, each with its last chosen answer."""
    questions = []
    for i in range(0, corpus.num_documents, max(1, corpus.num_documents // count)):
        length = int(np.flatnonzero(corpus.codes(i) & SIDE)[0])
        ids = corpus.document(i)[:length].tolist()
        silent = np.flatnonzero(class_of(corpus.codes(i)[:length]) == NONE)
        start = int(silent[-1]) + 1
        questions.append(HeldOutQuestion(ids[:start], ids[start:-1]))
    return questions[:count]


def draw_pairs(run: Path) -> None:
    """Draw how the held-out figures changed over the run."""
    shares = {
        "heldout_ranking": "chosen answer likelier",
        "heldout_accuracy": "chosen answer's reward higher",
        "heldout_exact": "chosen answer given exactly",
    }
    rewards = {"heldout_chosen_reward": "chosen", "heldout_rejected_reward": "rejected", "heldout_margin": "margin"}
    plot_figures(run / "metrics.jsonl", run / "accuracy.png", run.name, "share of held-out pairs", shares)
    plot_figures(run / "metrics.jsonl", run / "rewards.png", run.name, "reward, held-out pairs", rewards)


def find_reference(job: Job, args: PairArgs, model: Model, rows: int, view: Corpus) -> np.ndarray:
    """float64 [pairs of `view`, 2]: log-probabilities under the model that the run began with, without its adapter.
    Call it before Job.fit changes `model`. rows: of a batch over all ranks."""
    if args.plan:
        return np.zeros((view.num_documents, 2))
    weights = job.initial.fingerprint()
    where = job.parallel, job.console, args.cache_dir
    with adapters_off(model):
        return reference_log_probs(model, weights, view, args.row, rows, *where, args.share_prompts)


def reference_log_probs(
    model: Model,
    weights: str | None,
    view: Corpus,
    seq_len: int,
    rows: int,
    parallel: Parallel,
    console: Console,
    cache_dir: str | None = None,
    share: bool = False,
) -> np.ndarray:
    """float64 [pairs of `view`, 2], memory-mapped: log p(chosen) and log p(rejected), 0 for pairs longer than a row.

    weights: the fingerprint of the model's weights. rows: of a batch over all ranks, which share the work; all call it
    and return the same. share: as in PairLoader. Raises ValueError if the cache's folder cannot be written.
    """
    folder = make_folder(cache_root(cache_dir) / "reference")
    path = folder / f"{_key(model, weights, view, seq_len, share)}.npy"
    shape = (view.num_documents, 2)
    if not _exists_everywhere(path, shape, parallel, model.device):
        scores = _compute(model, view, seq_len, rows, parallel, console, share)
        if _open(path, shape) is None:  # every node may have a folder of its own
            _write(path, scores)
        parallel.sum(torch.zeros(1, device=model.device))  # until all have written
    scores_on_disk = _open(path, shape)
    if scores_on_disk is None:
        raise ValueError(f"{path}: cannot be read back after writing; check the disk")
    return scores_on_disk


def _key(model: Model, weights: str | None, view: Corpus, seq_len: int, share: bool) -> str:
    precision = [str(model.compute_dtype), model.device.type, ops.get_mode()]
    parts = [FORMAT_VERSION, weights, model.config.to_dict(), view.identity, seq_len, share, *precision]
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _open(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The scores, or None where the file is missing or damaged."""
    try:
        scores = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return scores if scores.shape == shape and scores.dtype == np.float64 else None


def _exists_everywhere(path: Path, shape: tuple[int, int], parallel: Parallel, device: torch.device) -> bool:
    missing = torch.tensor([float(_open(path, shape) is None)], device=device)
    return parallel.sum(missing).item() == 0


@torch.no_grad()
def _compute(
    model: Model, view: Corpus, seq_len: int, rows: int, parallel: Parallel, console: Console, share: bool
) -> np.ndarray:
    model.eval()
    device = model.device
    loader = PairLoader(view, seq_len, rows, 0, False, parallel.rank, parallel.world_size, share)
    steps = -(-loader.tokens_per_epoch // (rows * seq_len))  # about: padding adds a few
    scores = np.zeros((view.num_documents, 2))
    display, began = Display(console, steps, 0), time.monotonic()
    try:
        for step, host in enumerate(loader.epoch_batches(), 1):
            batch = to_device(host, device)
            pairs, _ = pair_log_probs(model, batch)
            scores[host.pairs] = torch.stack((pairs.chosen, pairs.rejected), 1).cpu().numpy()
            left = (time.monotonic() - began) / step * max(0, steps - step)
            display.update(min(step, steps), f"of the reference log-probabilities  ETA {duration(left)}")
    finally:
        display.close()
    seconds = time.monotonic() - began
    say(console, f"reference log-probabilities of {loader.num_pairs:,} pairs in {seconds:.1f} s")
    return parallel.sum(torch.from_numpy(scores).to(device)).cpu().numpy()


def _write(path: Path, scores: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, scores)
    try:
        write_atomically(path, data.getvalue())
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(path.parent, len(data.getvalue())) from None
        raise
