"""Preference pairs as training data: flags, reading, packing on the device, and held-out figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind.data import Corpus
from minimind.data.builtin.chat import builtin_preferences
from minimind.data.cache import open_preferences
from minimind.data.encoding import row_tokens
from minimind.data.formats import FormatName
from minimind.data.packing import row_length
from minimind.data.pair_loader import PairBatch, PairLoader, sides
from minimind.tokenization import ChatEncoder
from minimind.training.arguments import StageArgs
from minimind.training.batches import TrainingPlan, longest_row
from minimind.training.data_split import DataSplit, NamedFiles, form_of, open_split
from minimind.training.job import Job
from minimind.training.parallel import Parallel

_PADDING = 64  # tokens of a document of padding: short, as attention costs the square of the length


@dataclass(frozen=True)
class PairArgs(StageArgs):
    """Flags of a stage that learns from preference pairs."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"chosen": [{"role": ..., "content": ...}, ...],
    "rejected": [...]} rows. Empty: a thousand built-in pairs about manners.
    FILE:2 draws rows of this file twice as often as FILE:1 (docs/data.md)."""
    format: FormatName = "auto"
    """Form of the rows of --data: auto (ours and upstream's), messages (OpenAI's and trl's), sharegpt or alpaca (as
    LLaMA-Factory has them; docs/data.md)."""
    heldout_data: tuple[str, ...] = ()
    """Files of pairs to evaluate on instead of --heldout. NAME=FILE adds a further held-out set with figures of its
    own."""
    epochs: float | None = None
    """Passes over the training data. None: 6 over the built-in pairs, 1 over others, more where they are few
    (docs/training.md)."""
    seq_len: int | None = None
    """Tokens in a row, which holds both answers of a pair; longer pairs lose the beginning of their prompt. None: 2048,
    or 4096 where more than one pair in a hundred is longer and the tokens of a step and a GPU's memory allow."""
    share_prompts: bool = True
    """Compute the common beginning of both answers of a pair only once."""

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"epochs": 6.0, "seq_len": 2048, "cut_prompts": False}


@dataclass(frozen=True)
class PairSplit(DataSplit):
    """cut: the number of pairs whose prompt was cut to fit into a row."""

    cut: int = 0


def open_pairs(job: Job, args: PairArgs, encoder: ChatEncoder) -> PairSplit:
    """The pairs of --data and --heldout-data, or the built-in ones; settles --seq-len by their lengths."""
    builtin = () if args.data else builtin_preferences(args.cache_dir, job.console)
    files = NamedFiles.from_flags(args.data, args.heldout_data, builtin)
    read = partial(
        open_preferences,
        encoder=encoder,
        cache_dir=args.cache_dir,
        on_bad_row=args.on_bad_row,
        console=job.console,
        row_format=form_of(job),
    )
    share = job.settle("share_prompts", lambda: (True, ""))
    lengths = _tokens_of_pairs(read(files.paths), share)
    most = longest_row(job)
    row = job.settle("seq_len", lambda: row_length(lengths, min(2048, most), most, "pairs"))
    if not job.settle("cut_prompts", lambda: (True, "")):
        return PairSplit(**vars(open_split(job, files, read)))
    split = open_split(job, files, partial(read, longest=row, share=share))
    cut = int((_tokens_of_pairs(split.whole, share) < lengths).sum())
    job.shortened = cut / len(lengths)
    return PairSplit(**vars(split), cut=cut)


def pair_loader(split: PairSplit, args: PairArgs) -> Callable[..., PairLoader]:
    """make_loader of the training pairs, as Job.plan takes it."""
    return partial(PairLoader, split.train, args.row, seed=args.seed, share=args.share_prompts, mixture=split.mixture)


def heldout_loader(view: Corpus, args: PairArgs, rows: int, parallel: Parallel) -> PairLoader:
    """A loader for one pass over held-out pairs; every rank takes its share of the rows."""
    return PairLoader(view, args.row, rows, 0, False, parallel.rank, parallel.world_size, share=args.share_prompts)


def _tokens_of_pairs(view: Corpus, share: bool) -> np.ndarray:
    """int64 [pairs]: the tokens of a row that each pair takes."""
    middles, shared = sides(view, share)
    return row_tokens(middles, view.lengths(np.arange(view.num_documents)) - middles, shared)


def describe_pairs(split: PairSplit, plan: TrainingPlan) -> list[str]:
    """Lines about the data, printed at start."""
    loader, held = plan.loader, f"; held out {split.heldout.num_documents:,}" if split.heldout else ""
    lines = [f"data: {loader.num_pairs:,} pairs, {loader.tokens_per_epoch:,} tokens a pass{held}"]
    if loader.share:
        lines.append(f"prompts computed once for both answers: {loader.saved:.1%} of the tokens saved")
    fates = [f"{split.cut:,} of all pairs cut at the beginning of their prompt"] if split.cut else []
    fates += [f"{loader.left_out:,} pairs left out"] if loader.left_out else []
    if fates:
        lines.append(f"longer than --seq-len {loader.seq_len}: {', '.join(fates)}")
    return [*lines, *split.lines(plan)]


def unfold(batch: PairBatch, boundaries: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of a SharedPrefix: attention reads a shared prompt again before the rejected answer; the chosen one
    follows its prompt in the batch already.

    boundaries: the padded length of cu_seqlens. The tokens that attention reads are then padded with empty documents to
    twice the batch size, an upper bound, so that there is one shape to compile.
    """
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
        starts = np.append(starts, np.arange(len(rows), size, _PADDING)[1:])
        room = boundaries + total // _PADDING + 2
        starts = np.pad(starts, (0, room - len(starts)), constant_values=size)
        rows = np.pad(rows, (0, size - len(rows)))
    return rows, starts.astype(np.int32), places


@torch.no_grad()
def pair_means(
    loss: Callable[[PairBatch], tuple[Tensor, Tensor, dict[str, Tensor]]],
    loader: PairLoader,
    names: tuple[str, ...],
    device: torch.device,
    parallel: Parallel,
) -> dict[str, Any]:
    """Means over the pairs of `loader`, as heldout_NAME: of the loss and of the sums called `names` that loss(host
    batch) returns with it; and heldout_pairs. Every rank computes its share and all return the same."""
    sums = torch.zeros(1 + len(names), dtype=torch.float64, device=device)
    for batch in loader.epoch_batches():
        total, _, figures = loss(batch)
        sums += torch.stack((total, *(figures[name] for name in names))).double()
    means = (parallel.sum(sums) / loader.num_pairs).tolist()
    named = zip(("loss", *names), means, strict=True)
    return {f"heldout_{name}": value for name, value in named} | {"heldout_pairs": loader.num_pairs}
