"""What a stage trains on and what it is measured on: parts with weights, the split, copies, named evaluation sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from minimind.data import Corpus, open_corpus
from minimind.data.formats import FormatName, RowFormat
from minimind.data.mixture import Mixture, MixtureEntry, Weight, describe_mixture, parse_part
from minimind.data.paths import expand_paths, find_files
from minimind.data.split import MAX_TOKENS, repeats, shared, split, split_tail
from minimind.modeling import Model
from minimind.training.arguments import StageArgs
from minimind.training.defaults import optimizer, passes
from minimind.training.heldout import heldout_loss, named_losses
from minimind.training.job import Job, TrainingPlan

Read = Callable[[Sequence[str]], Corpus]
_NAMED = re.compile(r"([A-Za-z]\w*)=(.+)")


@dataclass(frozen=True)
class NamedFiles:
    """The entries of --data, and of --heldout-data those without a name and those of each name."""

    data: list[MixtureEntry]
    heldout: list[str]
    sets: dict[str, list[str]]

    @staticmethod
    def of(data: Sequence[str], heldout_data: Sequence[str], builtin: tuple[Path | str, ...] = ()) -> NamedFiles:
        """builtin: what stands for an empty --data, and for --heldout-data beside it. ValueError names the flag."""
        heldout, sets = [], dict[str, list[str]]()
        for entry in heldout_data:
            found = _NAMED.fullmatch(entry)
            if found is None or Path(entry).expanduser().exists():
                heldout.append(entry)
            else:
                sets.setdefault(found[1], []).append(found[2])
        if not data:
            first, *second = (str(path) for path in builtin)
            return NamedFiles([MixtureEntry(first)], heldout or second, sets)
        return NamedFiles([parse_part(entry) for entry in data], heldout, sets)

    @property
    def paths(self) -> list[str]:
        """All of --data."""
        return [part.path for part in self.data]


@dataclass(frozen=True)
class DataSplit:
    """whole: --data; train: what of it is trained on; heldout: what of it never is, or --heldout-data, None without;
    sets: further held-out data by name; mixture: how rows are drawn where --data has weights."""

    whole: Corpus
    train: Corpus
    heldout: Corpus | None
    sets: dict[str, Corpus] = field(default_factory=dict)
    mixture: Mixture | None = None

    @property
    def fingerprint(self) -> str:
        return f"{self.train.identity:016x}"

    @property
    def measured(self) -> dict[str, Corpus]:
        """All held-out data by name, "" for the main one."""
        return ({} if self.heldout is None else {"": self.heldout}) | self.sets

    def lines(self, plan: TrainingPlan) -> list[str]:
        """About the named sets and the mixture, for the start of a run."""
        found = [
            f"held-out set {name}: {view.num_documents:,} documents, {view.num_tokens:,} tokens"
            for name, view in self.sets.items()
        ]
        if self.mixture is not None:
            sizes = [_tokens(self.train, *part) for part in self.mixture.ranges]
            filled = plan.steps * plan.step_tokens * plan.loader.fill
            found.append(describe_mixture(self.mixture, sizes, filled))
        return found


def open_parts(job: Job, named: NamedFiles, read: Read) -> DataSplit:
    """Read and split what `named` names, and settle the flags that depend on it; says what copies there are. Raises
    ValueError as `read` and the split do."""
    args = job.args
    for paths in (named.paths, named.heldout, *named.sets.values()):
        job.notes += find_files(paths).lines() if paths else []
    whole = read(named.paths)
    heldout = read(named.heldout) if named.heldout else None
    sets = {name: read(paths) for name, paths in named.sets.items()}
    others = [view for view in (heldout, *sets.values()) if view is not None]
    by_tail = job.settle("split", lambda: ("hash", "")) == "tail"
    if by_tail:
        fraction = 0.0 if heldout is not None else args.heldout
        train, tail = split_tail(whole, fraction)
    else:
        train, tail = _split(job, whole, heldout is None, others)
    heldout = heldout or (tail if tail.num_documents else None)
    _settle(job, train)
    return DataSplit(whole, train, heldout, sets, _mixture(named.data, train))


def read_texts(job: Job, paths: Sequence[str]) -> Corpus:
    """Documents of plain text."""
    form = form_of(job)
    if form.name != "auto":
        raise ValueError(f"--format {form.name}: is about conversations, and this run reads text; drop the flag")
    where = job.args.cache_dir, job.args.on_bad_row, job.console
    return open_corpus(paths, job.tokenizer, *where, form=form)


def form_of(job: Job) -> RowFormat:
    """How the rows of a run's files are read; settles whether fields that would be lost are errors."""
    form = named_form(job.args)
    return form if job.settle("fields", lambda: ("checked", "")) == "checked" else replace(form, checked=False)


def named_form(args: StageArgs) -> RowFormat:
    """What --format and --ignore-fields say; ValueError where there is no --data that they could be about."""
    name: FormatName = getattr(args, "format", "auto")
    if name != "auto" and not args.data:
        raise ValueError(f"--format {name}: says how the rows of --data are read; name the files")
    return RowFormat(name, args.ignore_fields)


def all_losses(model: Model, parts: DataSplit, job: Job, final: bool) -> dict[str, Any]:
    """heldout_loss of the held-out data and of every named set; at the end of all of it."""
    measured = job.args.row, None if final else job.args.eval_tokens, job.parallel
    return heldout_loss(model, parts.heldout, *measured) | named_losses(model, parts.sets, *measured)


def _settle(job: Job, train: Corpus) -> None:
    """What the size of the training data and the weights decide, where no flag says."""
    builtin = all(name.startswith("builtin:") for name in job.given.data)
    if job.given.epochs is None and job.given.tokens is None:
        job.settle("epochs", lambda: passes(job.stage, builtin, job.args.scaled(train.num_tokens)))
    if job.given.optimizer is None:
        job.settle("optimizer", lambda: optimizer(job.origin.weights, bool(getattr(job.args, "lora_rank", None))))
    job.args.check()  # flags that go with one optimizer


def _split(job: Job, whole: Corpus, measured: bool, others: Sequence[Corpus]) -> tuple[Corpus, Corpus]:
    """(training, held-out) documents; what copies there are goes to the job's notes."""
    args = job.args
    again = repeats(whole)
    known = shared(whole, *others) if others else np.empty(0, np.int64)
    what = "left out" if args.dedupe else "--dedupe leaves them out"
    if len(again) and args.scale == 1:
        side = "on one side of the split with it" if measured and args.heldout else "kept"
        text = f"{len(again):,} of {whole.num_documents:,} documents repeat an earlier one"
        job.notes.append(f"copies: {text}, {what if args.dedupe else f'{side}; {what}'}")
    if len(known):
        job.notes.append(f"copies: {len(known):,} documents of --data are also in --heldout-data; {what}")
    fraction = args.heldout if measured else 0.0
    return split(whole, fraction, max(1, int(MAX_TOKENS / args.scale)), args.dedupe, known if args.dedupe else None)


def _mixture(parts: Sequence[MixtureEntry], train: Corpus) -> Mixture | None:
    """None where no entry of --data has a weight; else entries without one weigh 1."""
    if not any(part.weight for part in parts):
        return None
    files = [expand_paths([part.path]) for part in parts]
    resolved = [path.resolve() for group in files for path in group]
    twice = next((path for path in resolved if resolved.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"--data: {twice} is in two entries; give it one weight")
    ranges = tuple(train.range_of(group) for group in files)
    weights = tuple(part.weight or Weight() for part in parts)
    return Mixture(tuple(Path(part.path).name for part in parts), weights, ranges)


def _tokens(corpus: Corpus, first: int, stop: int) -> int:
    return int(corpus.lengths(np.arange(first, stop)).sum())
