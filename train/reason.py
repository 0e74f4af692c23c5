"""Teach a chat model to reason before it answers: `python train/reason.py` goes on from the newest SFT run.

Reasoning distillation as DeepSeek-R1's (2025): fine-tuning on conversations with another model's reasoning in front of
the answers. The markers around the reasoning weigh more than other tokens; a share of the conversations is learnt
without reasoning, so that the chat template's enable_thinking switches it on and off. Run the same command again after
any interruption and it continues where the last checkpoint was. Every run leaves a folder under runs/ with its metrics,
plots, answers and weights.
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
from minimind.data.builtin.reasoning import builtin_reasoning
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss
from minimind.tokenization.reasoning import ReasoningEncoder
from minimind.training.adapters import AdapterArgs, Adapting
from minimind.training.arguments import FromFlag
from minimind.training.heldout import describe
from minimind.training.job import Job, Objective
from minimind.training.origin import begin_from
from minimind.training.parts import DataSplit, all_losses
from minimind.training.script import run_script
from minimind.training.stages.chats import ChatArgs, chat_sample, describe_chats, open_chats
from minimind.training.stages.figures import plot_figures
from minimind.training.stages.reasoning import MODES, ReasoningQuestions, has_reasoning, reasoning_figures
from minimind.utils.display import say

# Peak rates by preset; not tuned yet.
PEAK_LR = {"nano": 2e-3, "minimind2-small": 5e-4}


@dataclass(frozen=True)
class Args(ChatArgs, AdapterArgs):
    """Fine-tune a chat model on conversations with reasoning. Every default works after train/sft.py."""

    from_: FromFlag = None
    """The chat model: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and --tokenizer). None:
    the newest finished run of train/sft.py under runs/."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [{"role": ..., "content": ...},
    ...]} rows; the assistant's messages have "reasoning_content", or <think>...</think> in front of the answer, which
    may stand in <answer>...</answer>. None: a few thousand short questions that come with the program.
    FILE:2 draws twice as many of its rows as FILE:1 (docs/data.md)."""
    seq_len: int | None = None
    """Tokens in a row; conversations lose their last turns beyond it, and one whose first answer does not fit is left
    out: cut, it would teach to begin reasoning and not to end it. None: 512, or as many up to 4096 as leave at most one
    conversation in a hundred longer, where the tokens of a step and a GPU's memory allow."""
    marker_weight: float = 10.0
    """Weight in the loss of the tokens of <think>, </think>, <answer> and </answer>; that of others is 1. The loss is
    divided by the sum of the weights."""
    direct: float = 0.3
    """Share of the conversations learnt without their reasoning, as enable_thinking=false asks for them; 0 for a
    template that does not know it."""
    eval_questions: int | None = None
    """Held-out questions of each kind, with reasoning and without, that are answered on the way; at the end all are.
    None: 64."""
    epochs: float | None = None
    """Passes over the training part of the data. None: 4 over the built-in questions, 1 over others, more where they
    are few (docs/training.md)."""

    @property
    def questions(self) -> int:
        return 64 if self.eval_questions is None else self.eval_questions

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"epochs": 4.0, "whole_answers": False}


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    if not 0 < args.marker_weight < math.inf:
        raise ValueError(f"--marker-weight {args.marker_weight:g}: must be above 0")
    args = dataclasses.replace(args, from_=begin_from(args, "sft"))
    job = Job.begin("reason", args, console)
    encoder = ReasoningEncoder(job.tokenizer, args.direct)
    builtin = () if args.data else builtin_reasoning(args.cache_dir, console)
    parts = open_chats(job, args.data, args.heldout_data, encoder, builtin)
    args, train, heldout = cast(Args, job.args), parts.train, parts.heldout
    if not has_reasoning(train):
        raise ValueError(
            "--data: no conversation has reasoning; give reasoning_content or <think>...</think>, or use train/sft.py"
        )
    asked = ReasoningQuestions([], [])
    if heldout is not None and args.questions:
        asked = ReasoningQuestions.of(heldout, job.tokenizer, args.row)
    loader = partial(
        PackedLoader,
        train,
        args.row,
        seed=args.seed,
        marker_weight=args.marker_weight,
        whole_answers=job.settle("whole_answers", lambda: (True, "")),
        mixture=parts.mixture,
    )
    plan = job.plan(loader)
    adapting = Adapting.of(job, args)
    job.open_run()
    model, trained = job.build_model(adapting.prepare)
    objective = Objective(
        loss=lambda batch: next_token_loss(trained, batch),
        evaluate=lambda final: evaluate(model, parts, asked, job, args, final),
        sample=lambda: chat_sample(job.parallel.whole(model), heldout or train, job, args),
        describe=lambda batch: describe(batch, train, job.tokenizer),
        data_fingerprint=parts.fingerprint,
        peak_lr=adapting.rate(PEAK_LR.get(job.origin.preset, 5e-4)),
        **adapting.files(),
    )
    lines = [*describe_chats(parts, plan), describe_questions(asked), *adapting.lines(model)]
    if not job.fit(plan, model, objective, lines):
        return False
    if job.parallel.main and asked.reasoned:
        draw(job.run.path)
    return True


def describe_questions(asked: ReasoningQuestions) -> str:
    return f"asked on held-out data: {len(asked.reasoned):,} questions with reasoning, {len(asked.plain):,} without"


def evaluate(
    model: Model, parts: DataSplit, asked: ReasoningQuestions, job: Job, args: Args, final: bool
) -> dict[str, Any]:
    """Loss over the assistant's held-out tokens, each with weight 1; the replies' format and answers."""
    figures = all_losses(model, parts, job, final)
    mine = asked.first(None if final else args.questions)
    whole = job.parallel.whole(model)
    figures |= job.parallel.share(lambda: reasoning_figures(cast(Model, whole), job.tokenizer, mine))
    for mode, meaning in MODES.items():
        if f"{mode}_format" in figures:
            kept, right = figures[f"{mode}_format"], figures[f"{mode}_exact"]
            say(job.console, f"reasoning {meaning}: {kept:.1%} in the format, {right:.1%} right")
    if mine.plain:
        say(job.console, f"without reasoning in the data: {figures['plain_exact']:.1%} to the letter")
    return figures


def draw(run: Path) -> None:
    """The format and the answers over the run."""
    for what, unit in (("format", "share in the format"), ("exact", "share of right answers")):
        labels = {f"{mode}_{what}": f"reasoning {meaning}" for mode, meaning in MODES.items()}
        if what == "exact":
            labels["plain_exact"] = "questions without reasoning"
        plot_figures(run / "metrics.jsonl", run / f"{what}.png", run.name, unit, labels)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
