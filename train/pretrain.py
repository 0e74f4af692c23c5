"""Pretrain a model from nothing: `python train/pretrain.py` works as it is, on text found on this machine.

Next-token prediction over packed documents. Run the same command again after any interruption and it continues
where the last checkpoint was. Every run leaves a folder under runs/ with its metrics, plot, samples and weights.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

from dataclasses import dataclass
from functools import partial

from rich.console import Console

from minimind.data import PackedLoader, builtin_corpus
from minimind.objectives.next_token import next_token_loss
from minimind.training.arguments import StageArgs
from minimind.training.heldout import describe
from minimind.training.job import Job, Objective
from minimind.training.parts import NamedFiles, all_losses, open_parts, read_texts
from minimind.training.script import run_script
from minimind.training.stages.answers import continue_texts

# Peak rates by preset; nano was tuned (docs/LOG.md), the others are not yet.
PEAK_LR = {"nano": 4e-3, "minimind2-small": 2e-3}


@dataclass(frozen=True)
class Args(StageArgs):
    """Pretrain a language model. Every default works."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl ({"text": ...} rows) and .txt, plain, .gz or .zst. FILE:2 draws twice as many
    rows of it as of FILE:1, FILE:0..3 more and more of them (docs/data.md). None: the docstrings of the installed
    Python packages."""
    seq_len: int = 512
    """Tokens in a row; longer documents are cut into pieces, of which none is lost."""
    heldout_data: tuple[str, ...] = ()
    """Text to measure on, instead of --heldout; NAME=FILE is measured beside it, with figures of its own."""


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    job = Job.begin("pretrain", args, console)
    builtin = () if args.data else (builtin_corpus(args.cache_dir, console),)
    named = NamedFiles.of(args.data, args.heldout_data, builtin)
    parts = open_parts(job, named, partial(read_texts, job))
    train, heldout = parts.train, parts.heldout
    plan = job.plan(partial(PackedLoader, train, args.row, seed=args.seed, mixture=parts.mixture))
    job.open_run()
    model, trained = job.build_model()
    objective = Objective(
        loss=lambda batch: next_token_loss(trained, batch),
        evaluate=lambda final: all_losses(model, parts, job, final),
        sample=lambda: continue_texts(job.parallel.whole(model), job.tokenizer, heldout or train),
        describe=lambda batch: describe(batch, train, job.tokenizer),
        data_fingerprint=f"{parts.whole.identity:016x}",
        peak_lr=PEAK_LR.get(job.origin.preset, 1e-3),
    )
    size = f"data: {train.num_documents:,} documents, {plan.loader.tokens_per_epoch:,} tokens to train on"
    held = f"; held out {heldout.num_documents:,} documents" if heldout else ""
    return job.fit(plan, model, objective, [size + held, *parts.lines(plan)])


if __name__ == "__main__":
    run_script(main, Args, __doc__)
