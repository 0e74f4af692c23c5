"""Conversations as training data: flags, reading, held-out figures and samples of the stages that learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minimind.data import Corpus, open_conversations
from minimind.data.formats import FormatName
from minimind.data.packing import row_rule
from minimind.modeling import Model
from minimind.tokenization import ChatEncoder
from minimind.training.arguments import StageArgs
from minimind.training.batches import TrainingPlan, longest_row
from minimind.training.data_split import DataSplit, NamedFiles, all_losses, form_of, open_split
from minimind.training.job import Job
from minimind.training.stages.answers import HeldOutQuestion, exact_figures, read_questions, show_answers


@dataclass(frozen=True)
class ChatArgs(StageArgs):
    """Flags of a stage that learns from conversations."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [{"role": ..., "content": ...},
    ...]} rows."""
    format: FormatName = "auto"
    """Form of the rows of --data: auto (ours and upstream's), messages (OpenAI's and trl's), sharegpt or alpaca (as
    LLaMA-Factory has them; docs/data.md)."""
    heldout_data: tuple[str, ...] = ()
    """Files of conversations to evaluate on instead of --heldout. NAME=FILE adds a further held-out set with figures of
    its own."""
    seq_len: int | None = None
    """Tokens in a row; longer conversations lose their last turns. None: 512, or as many up to 4096 as leave at most
    one conversation in a hundred longer, where the tokens of a step and a GPU's memory allow."""
    eval_questions: int | None = None
    """Held-out questions that are answered during training and compared exactly with the expected answers; at
    the end all are. None: 64 of built-in conversations, 0 of others."""

    @property
    def questions(self) -> int:
        return self.eval_questions if self.eval_questions is not None else 0 if self.data else 64

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"seq_len": 512}


def open_chats(
    job: Job, data: Sequence[str], heldout_data: Sequence[str], encoder: ChatEncoder, builtin: tuple[Path, ...]
) -> DataSplit:
    """The conversations of `data`, or of the `builtin` files where that is empty; settles --seq-len by their
    lengths."""
    files = NamedFiles.from_flags(data, heldout_data, builtin)
    split = open_split(job, files, partial(read_chats, job, encoder))
    job.settle("seq_len", row_rule(split.train, 512, longest_row(job), "conversations"))
    return split


def read_chats(job: Job, encoder: ChatEncoder, paths: Sequence[str]) -> Corpus:
    where = job.args.cache_dir, job.args.on_bad_row, job.console
    return open_conversations(paths, encoder, *where, row_format=form_of(job))


def describe_chats(split: DataSplit, plan: TrainingPlan) -> list[str]:
    """Lines about the data, printed at start."""
    loader, held = plan.loader, f"; held out {split.heldout.num_documents:,}" if split.heldout else ""
    first = f"data: {split.train.num_documents:,} conversations, {loader.tokens_per_epoch:,} tokens a pass{held}"
    cuts = str(loader.cuts)
    return [first, *([f"longer than --seq-len {loader.seq_len}: {cuts}"] if cuts else []), *split.lines(plan)]


def chat_figures(model: Model, split: DataSplit, job: Job, args: ChatArgs, final: bool) -> dict[str, Any]:
    """Loss over the assistant's tokens of the held-out data and of every named set, and the share of held-out questions
    answered exactly."""
    figures = all_losses(model, split, job, final)
    if split.heldout is not None and args.questions:
        figures |= exact_figures(model, chat_questions(split.heldout, args, final), job, "heldout")
    return figures


def chat_questions(corpus: Corpus, args: ChatArgs, final: bool) -> list[HeldOutQuestion]:
    """The questions of `corpus` to answer in an evaluation: the first few, or all of them in the final one."""
    return read_questions(corpus, args.row, None if final else args.questions)


def chat_sample(model: Model | None, source: Corpus, job: Job, args: ChatArgs) -> str:
    """Answers to five questions spread over `source`. Empty without a model, as on ranks other than 0."""
    if model is None:
        return ""
    questions = read_questions(source.head(args.eval_tokens), args.row)
    return show_answers(model, job.tokenizer, questions[:: max(1, len(questions) // 5)][:5])
