"""Teach a pretrained model to answer: `python train/sft.py` goes on from the newest pretraining run.

Supervised fine-tuning on packed conversations; the loss is that of the assistant's words and of the token that ends
its turn. Run the same command again after any interruption and it continues where the last checkpoint was. Every run
leaves a folder under runs/ with its metrics, plot, answers and weights.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from rich.console import Console

from minimind.data import PackedLoader, builtin_conversations
from minimind.data.builtin.arithmetic import NAME as WEAK
from minimind.data.builtin.arithmetic import weak_arithmetic
from minimind.objectives.next_token import next_token_loss
from minimind.tokenization import ChatEncoder
from minimind.training.arguments import FromFlag
from minimind.training.heldout import describe
from minimind.training.job import Job, Objective
from minimind.training.origin import begin_from
from minimind.training.script import run_script
from minimind.training.stages.chats import ChatArgs, chat_figures, chat_sample, describe_chats, open_chats

# Peak rates by preset; not tuned yet.
PEAK_LR = {"nano": 2e-3, "minimind2-small": 5e-4}


@dataclass(frozen=True)
class Args(ChatArgs):
    """Fine-tune a language model on conversations. Every default works after train/pretrain.py."""

    from_: FromFlag = None
    """The pretrained model: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and
    --tokenizer). None: the newest finished run of train/pretrain.py under runs/; for builtin:arithmetic random
    weights."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [{"role": ..., "content": ...},
    ...]} rows. None: a few thousand short conversations that come with the program. builtin:arithmetic: sums whose
    answers are mostly wrong, for train/grpo.py, ppo.py and spo.py to go on from.
    FILE:2 draws twice as many of its rows as FILE:1 (docs/data.md)."""
    epochs: float | None = None
    """Passes over the training part of the data. None: 3 over the built-in conversations, 2 over others, more where
    they are few (docs/training.md)."""

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"epochs": 3.0}


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    weak = args.data == (WEAK,)
    if args.from_ is None and not weak:
        args = dataclasses.replace(args, from_=begin_from(args, "pretrain"))
    job = Job.begin("sft", args, console)
    make = weak_arithmetic if weak else builtin_conversations
    data = () if weak else args.data
    builtin = () if data else make(args.cache_dir, console)
    parts = open_chats(job, data, args.heldout_data, ChatEncoder(job.tokenizer), builtin)
    args, train, heldout = cast(Args, job.args), parts.train, parts.heldout
    plan = job.plan(partial(PackedLoader, train, args.row, seed=args.seed, mixture=parts.mixture))
    job.open_run()
    model, trained = job.build_model()
    objective = Objective(
        loss=lambda batch: next_token_loss(trained, batch),
        evaluate=lambda final: chat_figures(model, parts, job, args, final),
        sample=lambda: chat_sample(job.parallel.whole(model), heldout or train, job, args),
        describe=lambda batch: describe(batch, train, job.tokenizer),
        data_fingerprint=parts.fingerprint,
        peak_lr=PEAK_LR.get(job.origin.preset, 5e-4),
    )
    return job.fit(plan, model, objective, describe_chats(parts, plan))


if __name__ == "__main__":
    run_script(main, Args, __doc__)
