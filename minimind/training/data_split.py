"""The data of a stage: reading --data and --heldout-data, the split into training and held-out parts, and mixtures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minimind.data import Corpus, open_corpus
from minimind.data.formats import FormatName, RowFormat
from minimind.data.mixture import Mixture, MixtureEntry, Weight, describe_mixture, parse_part
from minimind.data.paths import expand_paths, find_files
from minimind.data.split import MAX_TOKENS, repeats, shared, split, split_tail
from minimind.modeling import Model
from minimind.training.arguments import StageArgs, default_epochs, default_optimizer
from minimind.training.evaluation import heldout_loss, named_losses
from minimind.utils.files import write_atomically

if TYPE_CHECKING:
    from minimind.training.batches import TrainingPlan
    from minimind.training.job import Job

HELDOUT_TOKENS = 1 << 16  # as many as `minimind evaluate` scores
Read = Callable[[Sequence[str]], Corpus]
_NAMED = re.compile(r"([A-Za-z]\w*)=(.+)")


@dataclass(frozen=True)
class NamedFiles:
    """The entries of --data and of --heldout-data. heldout: those without a name; sets: NAME=FILE entries by name."""

    data: list[MixtureEntry]
    heldout: list[str]
    sets: dict[str, list[str]]

    @staticmethod
    def from_flags(
        data: Sequence[str], heldout_data: Sequence[str], builtin: tuple[Path | str, ...] = ()
    ) -> NamedFiles:
        """builtin: the files that replace an empty --data, and an empty --heldout-data with it. Raises ValueError,
        naming the flag."""
        heldout, sets = [], dict[str, list[str]]()
        for entry in heldout_data:
            match = _NAMED.fullmatch(entry)
            if match is None or Path(entry).expanduser().exists():
                heldout.append(entry)
            else:
                sets.setdefault(match[1], []).append(match[2])
        if not data:
            first, *second = (str(path) for path in builtin)
            return NamedFiles([MixtureEntry(first)], heldout or second, sets)
        return NamedFiles([parse_part(entry) for entry in data], heldout, sets)

    @property
    def paths(self) -> list[str]:
        """All paths of --data."""
        return [part.path for part in self.data]


@dataclass(frozen=True)
class DataSplit:
    """whole: all of --data; train: its training part; heldout: its held-out part, or --heldout-data, or None; sets:
    further held-out data by name; mixture: how rows are drawn where --data has weights."""

    whole: Corpus
    train: Corpus
    heldout: Corpus | None
    sets: dict[str, Corpus] = field(default_factory=dict)
    mixture: Mixture | None = None

    @property
    def fingerprint(self) -> str:
        return f"{self.train.identity:016x}"

    @property
    def heldout_sets(self) -> dict[str, Corpus]:
        """All held-out data by name; the main part's name is empty."""
        return ({} if self.heldout is None else {"": self.heldout}) | self.sets

    def lines(self, plan: TrainingPlan) -> list[str]:
        """Lines about the named sets and the mixture, printed at start."""
        lines = [
            f"held-out set {name}: {view.num_documents:,} documents, {view.num_tokens:,} tokens"
            for name, view in self.sets.items()
        ]
        if self.mixture is not None:
            sizes = [_tokens(self.train, *part) for part in self.mixture.ranges]
            filled = plan.tokens_before(plan.steps) * plan.loader.fill
            lines.append(describe_mixture(self.mixture, sizes, filled))
        return lines


def open_split(job: Job, files: NamedFiles, read: Read) -> DataSplit:
    """Read and split `files`, settle the flags that depend on the data, and note repeated documents. Raises ValueError
    as `read` and the split do."""
    args = job.args
    for paths in (files.paths, files.heldout, *files.sets.values()):
        job.notes += find_files(paths).lines() if paths else []
    whole = read(files.paths)
    heldout = read(files.heldout) if files.heldout else None
    sets = {name: read(paths) for name, paths in files.sets.items()}
    others = [view for view in (heldout, *sets.values()) if view is not None]
    by_tail = job.settle("split", lambda: ("hash", "")) == "tail"
    if by_tail:
        fraction = 0.0 if heldout is not None else args.heldout
        train, tail = split_tail(whole, fraction)
    else:
        train, tail = _split(job, whole, heldout is None, others)
    heldout = heldout or (tail if tail.num_documents else None)
    _settle_flags(job, train)
    return DataSplit(whole, train, heldout, sets, _mixture(files.data, train))


def read_texts(job: Job, paths: Sequence[str]) -> Corpus:
    """Documents of plain text."""
    form = form_of(job)
    if form.name != "auto":
        raise ValueError(f"--format {form.name}: is about conversations, and this run reads text; drop the flag")
    where = job.args.cache_dir, job.args.on_bad_row, job.console
    return open_corpus(paths, job.tokenizer, *where, row_format=form)


def form_of(job: Job) -> RowFormat:
    """The form of the rows in a run's files; settles whether unknown fields are errors."""
    form = named_form(job.args)
    return form if job.settle("fields", lambda: ("checked", "")) == "checked" else replace(form, checked=False)


def named_form(args: StageArgs) -> RowFormat:
    """The form that --format and --ignore-fields name. Raises ValueError if there is no --data to apply them to."""
    name: FormatName = getattr(args, "format", "auto")
    if name != "auto" and not args.data:
        raise ValueError(f"--format {name}: says how the rows of --data are read; name the files")
    return RowFormat(name, args.ignore_fields)


def save_heldout(job: Job, heldout: Corpus | None) -> None:
    """Write the first held-out texts, of about HELDOUT_TOKENS tokens, to heldout.jsonl in the run folder, for
    `minimind evaluate --ppl`."""
    path = job.run.path / "heldout.jsonl"
    if heldout is None or not job.parallel.main or job.flags.plan or path.exists():
        return
    rows, tokens = [], 0
    for i in range(heldout.num_documents):
        ids = heldout.document(i)
        rows.append(json.dumps({"text": job.tokenizer.decode(ids[1:-1])}, ensure_ascii=False) + "\n")
        tokens += len(ids)
        if tokens >= HELDOUT_TOKENS:
            break
    write_atomically(path, "".join(rows).encode())


def all_losses(model: Model, split: DataSplit, job: Job, final: bool) -> dict[str, Any]:
    """heldout_loss of the held-out data and of every named set; the final one of all documents."""
    limits = job.args.row, None if final else job.args.eval_tokens, job.parallel
    return heldout_loss(model, split.heldout, *limits) | named_losses(model, split.sets, *limits)


def _settle_flags(job: Job, train: Corpus) -> None:
    """Choose --epochs by the size of the training data and --optimizer by the weights, where they are left open."""
    builtin = all(name.startswith("builtin:") for name in job.flags.data)
    if job.flags.epochs is None and job.flags.tokens is None:
        job.settle("epochs", lambda: default_epochs(job.stage, builtin, job.args.scaled(train.num_tokens)))
    if job.flags.optimizer is None:
        adapter = bool(getattr(job.args, "lora_rank", None))
        job.settle("optimizer", lambda: default_optimizer(job.initial.weights, adapter))
    job.args.check()  # some flags go with one optimizer only


def _split(job: Job, whole: Corpus, hold_out: bool, others: Sequence[Corpus]) -> tuple[Corpus, Corpus]:
    """(training, held-out) documents; notes repeated ones. hold_out: whether --heldout applies."""
    args = job.args
    repeated = repeats(whole)
    also_heldout = shared(whole, *others) if others else np.empty(0, np.int64)
    action = "left out" if args.dedupe else "--dedupe leaves them out"
    if len(repeated) and args.scale == 1:
        side = "on one side of the split with it" if hold_out and args.heldout else "kept"
        text = f"{len(repeated):,} of {whole.num_documents:,} documents repeat an earlier one"
        job.notes.append(f"copies: {text}, {action if args.dedupe else f'{side}; {action}'}")
    if len(also_heldout):
        job.notes.append(f"copies: {len(also_heldout):,} documents of --data are also in --heldout-data; {action}")
    fraction = args.heldout if hold_out else 0.0
    excluded = also_heldout if args.dedupe else None
    return split(whole, fraction, max(1, int(MAX_TOKENS / args.scale)), args.dedupe, excluded)


def _mixture(parts: Sequence[MixtureEntry], train: Corpus) -> Mixture | None:
    """None where no entry of --data has a weight; else entries without one have weight 1."""
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
