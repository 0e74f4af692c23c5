"""Teach a pretrained model to answer: `python train/sft.py` continues from the newest pretraining run.

Supervised fine-tuning on packed conversations; the loss covers the assistant's words and the token that ends its turn.
After an interruption the same command continues from the last checkpoint. A run leaves its metrics, plot, answers and
weights in a folder under runs/.
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
from minimind.data.builtin.problems import NAME as ARITHMETIC
from minimind.data.builtin.problems import weak_arithmetic
from minimind.environments.builtin.tasks import NAME as AGENT
from minimind.environments.builtin.tasks import weak_agent
from minimind.objectives.next_token import next_token_loss
from minimind.tokenization import ChatEncoder
from minimind.training.arguments import FromFlag
from minimind.training.evaluation import describe_batch
from minimind.training.initial_model import from_newest
from minimind.training.job import Job, run_script
from minimind.training.stages.chats import ChatArgs, chat_figures, chat_sample, describe_chats, open_chats
from minimind.training.trainer import Stage

# Peak rates by preset; not tuned yet.
PEAK_LR = {"nano": 2e-3, "minimind2-small": 5e-4}
# Built-in conversations of a weak model, which rewards are to improve, by their --data.
WEAK = {ARITHMETIC: weak_arithmetic, AGENT: weak_agent}


@dataclass(frozen=True)
class Args(ChatArgs):
    """Fine-tune a language model on conversations. All defaults work after train/pretrain.py."""

    from_: FromFlag = None
    """The pretrained model: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and
    --tokenizer). None: the newest finished run of train/pretrain.py under runs/; for builtin:arithmetic and
    builtin:agent random weights."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [{"role": ..., "content": ...},
    ...]} rows. Empty: a few thousand built-in short conversations. builtin:arithmetic: sums whose answers are mostly
    wrong, as a start for train/grpo.py, ppo.py and spo.py; builtin:agent: tasks with tools, a third of them solved,
    as a start for train/agent.py.
    FILE:2 draws rows of this file twice as often as FILE:1 (docs/data.md)."""
    epochs: float | None = None
    """Passes over the training data. None: 3 over the built-in conversations, 2 over others, more where they are few
    (docs/training.md)."""

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"epochs": 3.0}


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    weak = WEAK.get(args.data[0]) if len(args.data) == 1 else None
    if args.from_ is None and weak is None:
        args = dataclasses.replace(args, from_=from_newest(args, "pretrain"))
    job = Job.begin("sft", args, console)
    make = weak or builtin_conversations
    data = () if weak else args.data
    builtin = () if data else make(args.cache_dir, console)
    split = open_chats(job, data, args.heldout_data, ChatEncoder(job.tokenizer), builtin)
    args, train, heldout = cast(Args, job.args), split.train, split.heldout
    plan = job.plan(partial(PackedLoader, train, args.row, seed=args.seed, mixture=split.mixture))
    job.open_run()
    model, trained = job.build_model()
    stage = Stage(
        loss=lambda batch: next_token_loss(trained, batch),
        evaluate=lambda final: chat_figures(model, split, job, args, final),
        sample=lambda: chat_sample(job.parallel.whole(model), heldout or train, job, args),
        describe=lambda batch: describe_batch(batch, train, job.tokenizer),
        data_fingerprint=split.fingerprint,
        peak_lr=PEAK_LR.get(job.initial.preset, 5e-4),
    )
    return job.fit(plan, model, stage, describe_chats(split, plan))


if __name__ == "__main__":
    run_script(main, Args, __doc__)
