"""Teach a chat model to reason before it answers: `python train/reason.py` continues from the newest SFT run.

Reasoning distillation as in DeepSeek-R1 (2025): fine-tuning on conversations with another model's reasoning in front of
the answers. The markers around the reasoning weigh more than other tokens; a share of the conversations is learnt
without reasoning, so that the chat template's enable_thinking switches it on and off. After an interruption the same
command continues from the last checkpoint. A run leaves its metrics, plots, answers and weights in a folder under
runs/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from minimind.data import PackedLoader
from minimind.data.builtin.problems import builtin_reasoning
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss
from minimind.tokenization.reasoning import ReasoningEncoder
from minimind.training.adapters import AdapterArgs, AdapterSetup
from minimind.training.arguments import FromFlag
from minimind.training.data_split import DataSplit, all_losses
from minimind.training.evaluation import describe_batch
from minimind.training.initial_model import from_newest
from minimind.training.job import Job, run_script
from minimind.training.metrics import plot_figures
from minimind.training.stages.chats import (
    MODES,
    ChatArgs,
    ReasoningQuestions,
    chat_sample,
    describe_chats,
    has_reasoning,
    open_chats,
    reasoning_figures,
)
from minimind.training.trainer import Stage
from minimind.utils.display import say

# Peak rates by preset; not tuned yet.
PEAK_LR = {"nano": 2e-3, "minimind2-small": 5e-4}


@dataclass(frozen=True)
class Args(ChatArgs, AdapterArgs):
    """Fine-tune a chat model on conversations with reasoning. All defaults work after train/sft.py."""

    from_: FromFlag = None
    """The chat model: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and --tokenizer). None:
    the newest finished run of train/sft.py under runs/."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [{"role": ..., "content": ...},
    ...]} rows; the assistant's messages have "reasoning_content", or <think>...</think> in front of the answer, which
    may stand in <answer>...</answer>. Empty: a few thousand built-in short questions.
    FILE:2 draws rows of this file twice as often as FILE:1 (docs/data.md)."""
    seq_len: int | None = None
    """Tokens in a row; longer conversations lose their last turns. One whose first answer does not fit is left out: cut
    off, it would teach reasoning without an end. None: 512, or as many up to 4096 as leave at most one conversation in
    a hundred longer, where the tokens of a step and a GPU's memory allow."""
    marker_weight: float = 10.0
    """Weight in the loss of the tokens of <think>, </think>, <answer> and </answer>; others have weight 1. The loss is
    divided by the sum of the weights."""
    direct: float = 0.3
    """Share of the conversations learnt without reasoning, as enable_thinking=false requests; use 0 for a template
    without that switch."""
    eval_questions: int | None = None
    """Held-out questions of each kind, with reasoning and without, that are answered during training; at the end all
    are. None: 64."""
    epochs: float | None = None
    """Passes over the training data. None: 4 over the built-in questions, 1 over others, more where they are few
    (docs/training.md)."""

    @property
    def questions(self) -> int:
        return 64 if self.eval_questions is None else self.eval_questions

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"epochs": 4.0, "whole_answers": False}


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    if not 0 < args.marker_weight < math.inf:
        raise ValueError(f"--marker-weight {args.marker_weight:g}: must be above 0")
    args = dataclasses.replace(args, from_=from_newest(args, "sft"))
    job = Job.begin("reason", args, console)
    encoder = ReasoningEncoder(job.tokenizer, args.direct)
    builtin = () if args.data else builtin_reasoning(args.cache_dir, console)
    split = open_chats(job, args.data, args.heldout_data, encoder, builtin)
    args, train, heldout = cast(Args, job.args), split.train, split.heldout
    if not has_reasoning(train):
        raise ValueError(
            "--data: no conversation has reasoning; give reasoning_content or <think>...</think>, or use train/sft.py"
        )
    questions = ReasoningQuestions([], [])
    if heldout is not None and args.questions:
        questions = ReasoningQuestions.from_corpus(heldout, job.tokenizer, args.row)
    loader = partial(
        PackedLoader,
        train,
        args.row,
        seed=args.seed,
        marker_weight=args.marker_weight,
        whole_answers=job.settle("whole_answers", lambda: (True, "")),
        mixture=split.mixture,
    )
    plan = job.plan(loader)
    adapter = AdapterSetup.from_args(job, args)
    job.open_run()
    model, trained = job.build_model(adapter.prepare)
    stage = Stage(
        loss=lambda batch: next_token_loss(trained, batch),
        evaluate=lambda final: evaluate(model, split, questions, job, args, final),
        sample=lambda: chat_sample(job.parallel.whole(model), heldout or train, job, args),
        describe=lambda batch: describe_batch(batch, train, job.tokenizer),
        data_fingerprint=split.fingerprint,
        peak_lr=adapter.peak_lr(PEAK_LR.get(job.initial.preset, 5e-4)),
        **adapter.checkpoint_functions(),
    )
    lines = [*describe_chats(split, plan), describe_questions(questions), *adapter.lines(model)]
    if not job.fit(plan, model, stage, lines):
        return False
    if job.parallel.main and questions.reasoned:
        draw(job.run.path)
    return True


def describe_questions(questions: ReasoningQuestions) -> str:
    reasoned, plain = len(questions.reasoned), len(questions.plain)
    return f"asked on held-out data: {reasoned:,} questions with reasoning, {plain:,} without"


def evaluate(
    model: Model, split: DataSplit, questions: ReasoningQuestions, job: Job, args: Args, final: bool
) -> dict[str, Any]:
    """Loss over the assistant's held-out tokens, each with weight 1, and the shares of replies in the format and of
    right answers."""
    figures = all_losses(model, split, job, final)
    asked = questions.first(None if final else args.questions)
    whole = job.parallel.whole(model)
    figures |= job.parallel.share(lambda: reasoning_figures(cast(Model, whole), job.tokenizer, asked))
    for mode, meaning in MODES.items():
        if f"{mode}_format" in figures:
            formatted, right = figures[f"{mode}_format"], figures[f"{mode}_exact"]
            say(job.console, f"reasoning {meaning}: {formatted:.1%} in the format, {right:.1%} right")
    if asked.plain:
        say(job.console, f"without reasoning in the data: {figures['plain_exact']:.1%} exact")
    return figures


def draw(run: Path) -> None:
    """Draw the shares of replies in the format and of right answers over the run."""
    for figure, unit in (("format", "share in the format"), ("exact", "share of right answers")):
        labels = {f"{mode}_{figure}": f"reasoning {meaning}" for mode, meaning in MODES.items()}
        if figure == "exact":
            labels["plain_exact"] = "questions without reasoning"
        plot_figures(run / "metrics.jsonl", run / f"{figure}.png", run.name, unit, labels)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
